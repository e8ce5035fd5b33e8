"""A Hugging Face directory to a megatron-core checkpoint: the same options as `nla-megatron convert import`."""

import sys

from nla_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "import", *sys.argv[1:]]))
