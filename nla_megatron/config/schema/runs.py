"""The commands that run other commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nla_megatron.config.schema.checks import at_least, one_of


@dataclass(frozen=True)
class DemoConfig:
    """The whole loop on text that is on every machine with Python."""

    out: str = "runs/demo"
    seed: int = 0
    model: str | None = None
    """What the NLA is of: `smollm2` or `gemma3`, made of packages of the Python index (`tools/real_model.py`), or a
    directory of yours. None: a small model that the demo trains first."""
    vocab_size: int = 2048
    """Of the tokenizer that is trained for the small model."""
    corpus_limit: int | None = None
    """Documents; None takes all."""
    stages: dict[str, list[str]] = field(default_factory=dict)
    """Overrides of each stage's command, as they would be typed."""


@dataclass(frozen=True)
class LauncherConfig:
    """Where the jobs of a sweep or a comparison run."""

    name: str = "local"
    """Processes of this machine, or a job array of Slurm by submitit."""
    partition: str | None = None
    """Slurm's; null takes the cluster's default, here and in the keys that follow."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that a node must have."""
    nodes: int = 1
    """Nodes of one job; its ranks are divided evenly among them."""
    gpus_per_node: int | None = None
    """GPUs of one job on each of its nodes."""
    cpus_per_task: int | None = None
    """CPU cores of one task: the job on one node, a rank on several."""
    memory_gb: float | None = None
    """Memory of one job on each of its nodes."""
    minutes: int = 1440
    """Time limit of one job."""
    requeues: int = 3
    """How often a job that was preempted or met its time limit is queued again, to resume."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that each job begins with, such as `module load cuda`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `sbatch`, without their dashes."""
    wait: bool = True
    """Wait for the queue to finish. false leaves: the same command tells later how the jobs stand."""

    def __post_init__(self) -> None:
        one_of("launcher.name", self.name, ("local", "slurm"))
        at_least("launcher.nodes", self.nodes, 1)
        at_least("launcher.minutes", self.minutes, 1)
        at_least("launcher.requeues", self.requeues, 0)


@dataclass(frozen=True)
class SweepConfig:
    """One command many times, with every combination of the values given. `COMMAND -m key=a,b out=DIR` says the same as
    `sweep COMMAND key=a,b out=DIR`; there, the keys below begin with `sweep.`, all others but `out` are the command's.
    """

    command: str = MISSING
    """The command that is repeated."""
    out: str = MISSING
    """The sweep's directory; each job has its own inside, `sweep.json` says how they stand. The same command resumes,
    with more values it adds jobs. With `${...}` in it, the job's own directory."""
    overrides: list[str] = field(default_factory=list)
    """What is typed for the command, by Hydra's grammar: `a,b`, `choice(a,b)`, `range(0,3)`, `glob(*)`."""
    subdir: str | None = None
    """A job's directory in `out`, with `${...}` for values of its configuration; null takes number and swept values."""
    jobs: int = 1
    """Jobs at a time; on GPUs each has its own. On Slurm, the most of the array that run at once."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """Where jobs run."""

    def __post_init__(self) -> None:
        at_least("jobs", self.jobs, 1)


@dataclass(frozen=True)
class CompareConfig:
    """Every finished run under a folder, evaluated and put beside the others."""

    root: str = MISSING
    """The folder; runs are found at any depth."""
    out: str = MISSING
    """Tables, charts, the page and the evaluations. The same command does what is new since."""
    command: str = "rl"
    """Runs of this command are compared."""
    checkpoints: str = "final"
    """What a run exported at its end (final), every checkpoint that `keep_every` kept (permanent), or all of these."""
    metric: str | None = None
    """What runs are sorted by: a figure of the evaluations or a scalar of `metrics.jsonl`. null: the first there
    is of FVE, the gain of steering, accuracy, richness, reward and loss."""
    best: str | None = None
    """Whether the largest or the smallest value comes first. null: the smallest of a loss, else the largest."""
    last: int = 10
    """A scalar of `metrics.jsonl` is its mean over so many last steps that have it."""
    data: str | None = None
    """The rows to evaluate on; null takes those that each run held out, where it did."""
    evaluate: bool = True
    """Run `eval` for each. false takes what runs have recorded themselves."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every `eval`; typed one by one as `eval.rows=100 eval.rollout.max_new_tokens=40`."""
    curves: list[str] = field(default_factory=list)
    """Scalars of `metrics.jsonl` to draw; empty takes those that say most."""
    png: bool = True
    """Write each chart as PNG too."""
    jobs: int = 1
    """Evaluations at a time; on GPUs each has its own."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """Where evaluations run."""

    def __post_init__(self) -> None:
        one_of("checkpoints", self.checkpoints, ("final", "permanent", "all"))
        one_of("command", self.command, ("rl", "sft", "pretrain"))
        if self.best is not None:
            one_of("best", self.best, ("max", "min"))
        at_least("last", self.last, 1)
        at_least("jobs", self.jobs, 1)
