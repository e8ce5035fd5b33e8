"""From a corpus to the tables of the training stages."""
