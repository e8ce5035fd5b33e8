"""Merge a LoRA adapter into its base model: the same options as `nla-megatron merge`."""

import sys

from nla_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
