"""The data contract: columns, sidecars, document splits, prompts with their marker, and memory-mapped tables.

Everything two programs must agree on about a file stands in this room, and nothing else does.
"""
