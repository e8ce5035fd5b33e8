"""Mathematics with short answers: problems, a format that is checked, answers that are compared."""
