"""Hugging Face directories to Megatron models and back: one declarative table per family, read in both directions."""
