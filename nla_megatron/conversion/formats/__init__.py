"""What a model directory holds, decided once for every command.

`config_keys` and `config_file`: which keys of config.json matter; `weights`: which files and tensors count, and that
they are finite; `token_ids`: ids against the rows of the embedding; `notes`: what a user is told of what was passed
over.
"""
