"""`nla-megatron COMMAND [key=value ...]`: compose the configuration, check it, start the ranks, run the stage."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from nla_megatron.config.compose import compose, describe
from nla_megatron.config.run_directory import is_done
from nla_megatron.errors import NlaError

# command -> (module with `check` and `run`, whether it runs on Megatron's ranks, what it does)
COMMANDS: dict[str, tuple[str, bool, str]] = {
    "demo": ("nla_megatron.launch.demo", False, "the whole loop on text that every Python has"),
    "pretrain": ("nla_megatron.training.pretrain", True, "a small base model from nothing"),
    "extract": ("nla_megatron.datagen.extract", True, "activations of a model at sampled positions of a corpus"),
    "explain": ("nla_megatron.datagen.explain", False, "gold explanations for the rows of a base table"),
    "build": ("nla_megatron.datagen.build", False, "document-level splits into the tables of the training stages"),
    "sft": ("nla_megatron.training.sft", True, "warm start of one model: role=av or role=ar"),
    "rl": ("nla_megatron.training.rl", True, "on-policy training of AV and AR with vLLM in the same processes"),
    "eval": ("nla_megatron.evaluation.held_out", True, "held-out FVE with gold text and shuffled vectors beside it"),
    "convert": ("nla_megatron.conversion.command", True, "between Hugging Face and megatron-core checkpoints"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code: 0, 2 for a user's mistake, 1 for a run that failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    command, overrides = arguments[0], arguments[1:]
    try:
        if command in COMMANDS and {"-h", "--help"} & set(overrides):
            print(f"nla-megatron {command}: {COMMANDS[command][2]}\n\n{describe(command)}")
            return 0
        return _execute(command, overrides)
    except NlaError as error:
        if _tells(error):
            print(error, file=sys.stderr, flush=True)
        return _end(error.exit_code)


def _execute(command: str, overrides: list[str]) -> int:
    # The libraries' notes about what is not installed or deprecated are not the user's concern.
    for module in ("megatron", "torch", "vllm", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    config = compose(command, overrides)
    module_name, on_ranks, _ = COMMANDS[command]
    module = importlib.import_module(module_name)
    if not on_ranks:
        module.check(config, 1)
        if not is_done(config):
            module.run(config)
        return 0
    from nla_megatron.parallel.world import initialise, shut_down, world_size_from_environment

    started = world_size_from_environment()
    size = started or config.parallel.tp * config.parallel.pp * (config.parallel.dp or 1)
    module.check(config, size)
    if is_done(config):
        if os.environ.get("RANK", "0") == "0":
            print(f"{config.out} is finished already", file=sys.stderr)
        return 0
    if started is None and size > 1:
        from nla_megatron.launch.local import launch

        return launch([command, *overrides], size)
    world = initialise(config.parallel)
    module.run(config, world)
    shut_down()
    return 0


def _tells(error: NlaError) -> bool:
    """One message whoever sees the mistake first: ranks ask a shared counter, others look at their rank."""
    import_dist = sys.modules.get("torch.distributed")
    if import_dist is None or not import_dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    store: Any = import_dist.distributed_c10d._get_default_store()
    return store.add("nla_megatron/told", 1) == 1


def _end(code: int) -> int:
    """Leave at once when ranks are up: an orderly exit would wait in a collective for those that are gone."""
    import_dist = sys.modules.get("torch.distributed")
    if import_dist is not None and import_dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _usage() -> str:
    lines = [f"  {name:<9} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: nla-megatron COMMAND [key=value ...]", "", *lines, "", "`nla-megatron COMMAND --help` lists a command's keys with their defaults."]
    )

