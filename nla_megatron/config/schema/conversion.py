"""The commands that read and write checkpoints, and `plan`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import MISSING

from nla_megatron.config.schema.checks import DTYPES, STORED_DTYPES, at_least, one_of
from nla_megatron.config.schema.shared import ParallelConfig, StageConfig
from nla_megatron.errors import ConfigError


@dataclass(frozen=True)
class ConvertConfig(StageConfig):
    """Between a Hugging Face directory and a megatron-core distributed checkpoint (`torch_dist`), and whether the two
    are the same model."""

    direction: str = "import"
    """import (hf to out), export (checkpoint to out) or verify (hf against checkpoint)."""
    out: str = ""
    """The directory that an import or an export makes. The same command continues one that was killed."""
    hf: str = ""
    """A Hugging Face directory: what is imported, what a checkpoint is verified against, and in an export the
    configuration and tokenizer of a checkpoint that has none beside it."""
    checkpoint: str = ""
    """A megatron-core checkpoint: of an import, of a training run, or of another tool. To verify also another Hugging
    Face directory."""
    dtype: str | None = None
    """Of the weights that are written, and in which `verify` computes. None: as they are; `verify` takes float32."""
    layers: int | None = None
    """Import the first so many blocks as an AR: K+1 of them, where activations are of block K."""
    shard_size: str = "5GB"
    """The most that one file of an export or a checkpoint holds."""
    processes: int | None = None
    """Workers of an import or export; each holds one tensor. None: as many as `parallel` has ranks."""
    dry_run: bool = False
    """Print files, bytes, memory and time from config.json alone, and do nothing."""
    disk_rate: float = 1.0
    """GB per second that the disk of a dry run reads and writes."""
    text: str = "The capital of France is Paris, and 2 + 2 = 4.\ndef f(x):\n    return x"
    """On what `verify` compares logits."""
    logits: bool = True
    """Compare logits too, which needs memory for the model; else only the weights, tensor by tensor."""

    def __post_init__(self) -> None:
        one_of("direction", self.direction, ("import", "export", "verify"))
        if self.dtype is not None:
            one_of("dtype", self.dtype, STORED_DTYPES)
        for key in ("layers", "processes"):
            if getattr(self, key) is not None:
                at_least(key, getattr(self, key), 1)
        if not self.disk_rate > 0:
            raise ConfigError(f"disk_rate={self.disk_rate}", "above 0", "set disk_rate= to GB per second")
        if not self.shard_bytes:
            raise ConfigError(
                f"shard_size={self.shard_size!r}", "a size such as 5GB or 500MB", "set shard_size= to one"
            )

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; 0 where it is none."""
        match = re.fullmatch(r"([0-9.]+) *([KMGT]?)B?", self.shard_size.strip().upper())
        if match is None or match[1].count(".") > 1 or not match[1].strip("."):
            return 0
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))

    @property
    def layout(self) -> ParallelConfig:
        """Ranks share files and tensors, not a model; `verify` cuts one by `parallel` afterwards."""
        return ParallelConfig(timeout_minutes=24 * 60.0)

    @property
    def ranks(self) -> int:
        if self.dry_run:
            return 1
        return self.processes if self.processes is not None and self.direction != "verify" else super().ranks


@dataclass(frozen=True)
class MergeConfig(StageConfig):
    """A LoRA adapter merged into its base model."""

    base: str = MISSING
    """The Hugging Face directory that the adapter was trained on."""
    adapter: str = MISSING
    """A directory that `peft` saved, or an adapter of ours."""
    out: str = MISSING
    """The merged Hugging Face directory; it must not exist yet."""
    dtype: str | None = None
    """Of the weights that are written. None: each keeps its own."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class AdoptConfig(StageConfig):
    """Another NLA trainer's checkpoint made a directory of ours. What its sidecar does not say is told here."""

    checkpoint: str = MISSING
    """A whole AV or AR, or an adapter of one."""
    out: str = MISSING
    """The adopted directory; it must not exist yet. `rl` and `eval` take it where its injection is that of their
    table."""
    base: str | None = None
    """The whole model that an adapter was trained on."""
    sidecar: str | None = None
    """A directory with the sidecar, where the checkpoint has none."""
    trainer: str | None = None
    """Whose conventions fill what the sidecar leaves out: kitft or easynla."""
    layer_index: int | None = None
    """Block K of the activations, where the sidecar has none."""
    bos_policy: str | None = None
    """Whether prompts as text get the tokenizer's special tokens: tokenizer or none."""
    dtype: str | None = None
    """Of merged weights. None: each keeps its own."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class PlanConfig(StageConfig):
    """What something would take, on paper: from config.json alone, nothing is started."""

    what: str = "reshard"
    """reshard: how the trainer's weights would reach the sampler."""
    out: str = ""
    """Nothing is written."""
    hf: str = ""
    """A Hugging Face directory, of which only config.json is read."""
    rollout_tp: int = 1
    """Ranks of one replica of the sampler; the replicas fill the training ranks."""
    expert_parallel: bool = False
    """Whether the sampler shares experts out whole in place of cutting each."""
    dtype: str = "bfloat16"
    """Of the trainer's parameters."""
    rollout_dtype: str = "bfloat16"
    """Of the sampler's."""
    staging_mb: int = 256
    """Packed messages on one rank at once, MiB."""

    def __post_init__(self) -> None:
        one_of("what", self.what, ("reshard",))
        for key in ("dtype", "rollout_dtype"):
            one_of(key, getattr(self, key), ("float32", "bfloat16"))
        for key in ("rollout_tp", "staging_mb"):
            at_least(key, getattr(self, key), 1)
