"""A task brings rows, prompts, interventions and rewards; the training loop knows none of it."""
