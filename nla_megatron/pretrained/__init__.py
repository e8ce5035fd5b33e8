"""Pretrained models from packages of the Python index: ordinary Hugging Face directories, without a hub."""
