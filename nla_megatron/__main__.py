"""`python -m nla_megatron` is `nla-megatron`."""

import sys

from nla_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
