"""Evaluation on held-out rows, and the report of a run."""
