"""The commands: which room runs each, and how a command becomes checked, started and run."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nla_megatron.config.compose import compose
from nla_megatron.config.hub_keys import with_paths
from nla_megatron.config.run_directory import is_done, owned, refuse_owned
from nla_megatron.config.unread import Unread, idle
from nla_megatron.conversion.formats.config_keys import admitting
from nla_megatron.disk import room_on
from nla_megatron.errors import ConfigError
from nla_megatron.hub import CACHE_ONLY
from nla_megatron.launch.ending import exit_code_after
from nla_megatron.parallel import started


@dataclass(frozen=True)
class Command:
    """`module` offers `check(config, world_size)`, `run(config[, world])`.

    `on_ranks`: run by every Megatron rank. `samples`: with vLLM. `verb`: the key whose value may come first as a bare
    word. `estimate`: the module whose `run(config)` takes the command's place when `dry_run` is set. `passes_on`: some
    of its words are another command's, and `module` offers `configured(arguments)` to tell them apart. `lays_out`: it
    reads `parallel` though no ranks run it. `owns_out`: it fills the directory `out` bit by bit, and nobody else may
    meanwhile; the others write nothing, or hold what they make it from. A module may offer `unread(config)`, see
    `config.unread`.
    """

    module: str
    on_ranks: bool
    about: str
    samples: bool = False
    verb: str | None = None
    estimate: str | None = None
    passes_on: bool = False
    lays_out: bool = False
    owns_out: bool = True


AS_JOB = "NLA_MEGATRON_JOB"
"""In the environment of one of many jobs that are told the same words: who starts them names what none reads."""

COMMANDS: dict[str, Command] = {
    "demo": Command("nla_megatron.launch.demo", False, "the whole loop on text that every Python has"),
    "pretrain": Command("nla_megatron.training.pretrain", True, "a small base model from nothing"),
    "extract": Command("nla_megatron.datagen.extract", True, "activations of a model at sampled positions of a corpus"),
    "explain": Command("nla_megatron.datagen.explain", False, "gold explanations for the rows of a base table"),
    "build": Command(
        "nla_megatron.datagen.build", False, "document-level splits into the tables of the training stages"
    ),
    "sft": Command("nla_megatron.training.sft", True, "warm start of one model, or of both: role=av, ar or both"),
    "rl": Command(
        "nla_megatron.training.rl", True, "on-policy training of AV and AR, vLLM in the same processes", True
    ),
    "eval": Command(
        "nla_megatron.evaluation.command", True, "held-out figures of a task: FVE and its controls, accuracy, ...", True
    ),
    "export": Command(
        "nla_megatron.training.checkpoint_export",
        True,
        "a checkpoint of an rl run as the models that it ends with",
    ),
    "judge": Command("nla_megatron.evaluation.judges", False, "another model's judgement of an evaluation's texts"),
    "convert": Command(
        "nla_megatron.conversion.command",
        True,
        "between Hugging Face and megatron-core: import, export, verify",
        verb="direction",
        estimate="nla_megatron.conversion.estimate",
        owns_out=False,
    ),
    "plan": Command(
        "nla_megatron.reshard.summary",
        False,
        "what a reshard would move, on paper",
        verb="what",
        lays_out=True,
        owns_out=False,
    ),
    "merge": Command("nla_megatron.conversion.merge", False, "a LoRA adapter into its base model", owns_out=False),
    "adopt": Command(
        "nla_megatron.conversion.artefacts", False, "another NLA trainer's checkpoint into one of ours", owns_out=False
    ),
    "sweep": Command(
        "nla_megatron.launch.sweep", False, "a command with several values of its keys: COMMAND key=a,b", passes_on=True
    ),
    "compare": Command(
        "nla_megatron.launch.compare", False, "every run under a folder, evaluated and side by side", passes_on=True
    ),
}
_LOG_LEVELS = {"TORCH_CPP_LOG_LEVEL": "ERROR", "VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
_WITHOUT_A_MODEL = ("pretrain", "explain", "judge")
"""Commands that read no model's config.json."""
MULTIRUN = ("-m", "--multirun")


def run(argv: Sequence[str]) -> int:
    """A command line without the program's name, to its end; whatever is wrong is told, the exit code returned."""
    try:
        return execute(argv[0], argv[1:])
    except Exception as error:
        return exit_code_after(error)


def execute(name: str, overrides: Sequence[str]) -> int:
    """Run one command to its end; returns the exit code, or raises a named error.

    A command for ranks that nobody started (torchrun, srun) starts as many as it asks for on this machine. Each rank
    checks everything before it does anything.
    """
    if name not in COMMANDS:
        raise ConfigError(f"command {name!r}", f"one of {', '.join(COMMANDS)}", "run `nla-megatron --help`")
    if set(MULTIRUN) & set(overrides):
        name, overrides = "sweep", [name, *(word for word in overrides if word not in MULTIRUN)]
    command = COMMANDS[name]
    config = with_paths(name, configured(name, overrides))
    silence_libraries()
    with admitting(getattr(config, "allow_unknown_config", ())):
        return _execute(name, command, config, overrides)


def _execute(name: str, command: Command, config: Any, overrides: Sequence[str]) -> int:
    if command.estimate is not None and config.dry_run:
        importlib.import_module(command.estimate).run(config)
        return 0
    if command.owns_out and started.rank() == 0 and not is_done(config):
        refuse_owned(config)
    if not command.on_ranks:
        module = _checked(name, config, overrides, 1)
        with _held(command, config), room_on(Path(config.out)):
            if not _finished(config):
                module.run(config)
            elif hasattr(module, "finished"):
                module.finished(config)
        return 0
    ranks = started.world_size()
    size = ranks or config.ranks
    if ranks is None and size > 1:
        from nla_megatron.launch.local import launch

        os.environ[CACHE_ONLY] = "1"  # so many ranks need not ask the hub again, nor could they disagree on its answer
        return launch(run, [name, *overrides], size, preloads(command))
    module = _checked(name, config, overrides, size)
    with _held(command, config), room_on(Path(config.out)):
        return _run_rank(module, config)


def _held(command: Command, config: Any) -> AbstractContextManager[None]:
    """Rank 0 holds what a command fills until it is over; whoever finds it done by another has nothing to hold."""
    holds = command.owns_out and started.rank() == 0 and not is_done(config)
    return owned(config) if holds else nullcontext()


def _checked(name: str, config: Any, overrides: Sequence[str], world_size: int) -> ModuleType:
    """The module of a command, which has nothing against the configuration. Raises named errors."""
    module: ModuleType = importlib.import_module(COMMANDS[name].module)
    module.check(config, world_size)
    if AS_JOB not in os.environ:
        for refusal in idle_words(name, config, overrides).values():
            raise refusal
    return module


def idle_words(name: str, config: Any, overrides: Sequence[str]) -> dict[str, ConfigError]:
    """What was typed for a command and is not read as it is configured, by key; see `config.unread.idle`."""
    if COMMANDS[name].passes_on:
        return {}
    return idle(name, config, as_overrides(COMMANDS[name], overrides), unread(name, config))


def unread(name: str, config: Any) -> list[Unread]:
    """What a command, as it is configured, does not read."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    idle = [] if command.on_ranks or command.lays_out else [("parallel", f"in {name}")]
    if not (name == "export" or (name == "rl" and config.task.name == "nla") or getattr(config, "role", "") == "both"):
        idle.append(("parallel.ar_stages", f"in {name}, where no AR learns beside an AV"))
    idle += [("allow_unknown_config", f"in {name}")] if name in _WITHOUT_A_MODEL else []
    return [*idle, *(module.unread(config) if hasattr(module, "unread") else ())]


def configured(name: str, arguments: Sequence[str]) -> Any:
    """The configuration of a command as typed. Raises ConfigError."""
    if COMMANDS[name].passes_on:
        return importlib.import_module(COMMANDS[name].module).configured(arguments)
    return compose(name, as_overrides(COMMANDS[name], arguments))


def preloads(command: Command) -> list[str]:
    """The modules that the ranks of a command share when they are forked."""
    return [command.module, *(["nla_megatron.rollout.preload"] if command.samples else [])]


def as_overrides(command: Command, arguments: Sequence[str]) -> list[str]:
    """What was typed as Hydra knows it: `import` is `direction=import`, `--dry-run` is `dry_run=true`."""
    overrides = list(arguments)
    if command.verb is not None and overrides and overrides[0].isalpha():
        overrides[0] = f"{command.verb}={overrides[0]}"
    for position, word in enumerate(overrides):
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            overrides[position] = f"{key.replace('-', '_')}={value if equals else 'true'}"
    return overrides


def silence_libraries() -> None:
    """The libraries' notes on what is not installed or deprecated are not the user's concern, nor what they log of a
    failure before it is raised: whoever fails tells it once, at the end.

    Warnings name the caller's file, which may be ours; so do those of processes that libraries start, which learn of
    it from the environment. PYTHONWARNINGS=default brings them back.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    for name, level in _LOG_LEVELS.items():
        os.environ.setdefault(name, level)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    for library in ("megatron", "torch.distributed", "torch.nn.parallel"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _run_rank(module: ModuleType, config: Any) -> int:
    from nla_megatron.parallel.world import initialise, shut_down

    if not _finished(config):
        world = initialise(config.layout)
        try:
            module.run(config, world)
        except Exception:
            # Among several ranks an orderly leave would wait for those that are gone; see `launch.ending`.
            if world.size == 1:
                shut_down()
            raise
        shut_down()
    return 0


def _finished(config: Any) -> bool:
    done = is_done(config)
    if done and started.rank() == 0:
        print(f"{config.out} is finished already", file=sys.stderr)
    return done
