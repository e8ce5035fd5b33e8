"""A megatron-core checkpoint to a Hugging Face directory: the same options as `nla-megatron convert export`."""

import sys

from nla_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "export", *sys.argv[1:]]))
