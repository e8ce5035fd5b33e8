"""Merge a LoRA adapter into its base model: out of place, tensor by tensor, in fp32.

    python tools/merge_lora.py base=DIR adapter=DIR out=DIR [dtype=bfloat16]

`base` is a Hugging Face directory, `adapter` what `peft` saved, `out` a new Hugging Face directory. Without `dtype`
each weight keeps its own.
"""

from __future__ import annotations

import sys

from nla_megatron.conversion.merge import merge
from nla_megatron.errors import ConfigError, NlaError
from nla_megatron.models.builder import DTYPES


def options(arguments: list[str]) -> dict[str, str]:
    """`key=value` arguments as they are typed. Raises ConfigError."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    needed, known = {"base", "adapter", "out"}, {"base", "adapter", "out", "dtype"}
    if wrong := sorted(given.keys() - known) or [f"no {key}=" for key in sorted(needed - given.keys())]:
        raise ConfigError(wrong[0], "base=DIR adapter=DIR out=DIR [dtype=float32|bfloat16]", "see tools/merge_lora.py")
    if given.get("dtype", "float32") not in DTYPES:
        raise ConfigError(f"dtype={given['dtype']!r}", f"one of {', '.join(DTYPES)}", "set dtype= to one of these")
    return given


def main(arguments: list[str]) -> int:
    try:
        given = options(arguments)
        merge(given["base"], given["adapter"], given["out"], DTYPES.get(given.get("dtype", "")))
    except NlaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
