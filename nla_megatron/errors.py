"""One base error; each mistake a user can make has a named subclass: what was found, what was expected, what to do."""

from __future__ import annotations


class NlaError(Exception):
    """A mistake that ends the run before it starts, told in one message.

    Args:
        found: what is there, with the value and where it was read.
        expected: what should have been there.
        remedy: what the user can do now.

    Example:
        >>> raise MissingFile("no 'data/rl.parquet'", "the table `build` writes", "run `nla-megatron build` first")
    """

    exit_code = 2

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(found, expected, remedy)
        self.found, self.expected, self.remedy = found, expected, remedy

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.found}\n  expected: {self.expected}\n  to do:    {self.remedy}"


class ConfigError(NlaError):
    """An unknown key, a wrong type, a value out of range, or two options that contradict each other."""


class MissingFile(NlaError):
    """A file or directory named in the configuration is not there."""


class ColumnError(NlaError):
    """A table lacks a column, or a column has another type than the data contract says."""


class WidthError(NlaError):
    """Vectors of another width than the model's hidden size."""


class SidecarError(NlaError):
    """A sidecar is missing, malformed, or was written for another tokenizer, model or layer."""


class MarkerError(NlaError):
    """The injection marker is not exactly one token, or not where the sidecar says."""


class LayoutError(NlaError):
    """A parallel layout that does not fit the world size or the model."""


class VersionError(NlaError):
    """A library of a version whose interface is not the one that was tested."""


class UnsupportedModel(NlaError):
    """An architecture or a model feature that conversion does not honour."""


class CheckpointError(NlaError):
    """A checkpoint that is incomplete, of another stage, or does not fit the model."""


class RunDirectoryError(NlaError):
    """The output directory holds another run."""


class DiskFull(NlaError):
    """There is no room for what a command writes."""


class IndexUnreachable(NlaError):
    """The Python index cannot be reached, or has no such package."""


class DamagedPackage(NlaError):
    """A package of the Python index holds something else than it should."""


class MemoryShort(NlaError):
    """There is no room in memory for what a command keeps there."""


class ProviderError(NlaError):
    """Who was asked for explanations or judgements refused, or failed too often."""


class ReshardError(NlaError):
    """The trainer's weights cannot become the sampler's."""


class UnheldRegion(ReshardError):
    """Part of a tensor that the sampler needs is held by no rank of the trainer."""


class OverlappingClaims(ReshardError):
    """Two different places claim to hold the same part of a tensor."""


class ModelsDiffer(ReshardError):
    """Trainer and sampler are not the same model: another family, vocabulary, tensor or shape."""


class RunError(NlaError):
    """Something went wrong while the run was under way: the step stops on all ranks."""

    exit_code = 1


class InjectionError(RunError):
    """An activation that should have been injected was not, or was injected somewhere else."""


class ConversionMismatch(RunError):
    """Two forms of a model that should be the same differ."""


class RolloutError(RunError):
    """Ranks disagree about the rollouts, or the sampler and the trainer disagree about their log-probs."""


class RewardError(RunError):
    """A reward that is not one finite number per rollout, or that reads what the task does not measure."""


class NotFinite(RunError):
    """A weight or a reward is NaN or infinite; nothing of it was handed over."""


class ReshardMismatch(RunError):
    """After a load, the sampler holds other weights than the trainer."""


class PeerLost(RunError):
    """Another rank ended in the middle of a load of weights."""


class HalfLoaded(RunError):
    """A load of weights did not finish: the sampler holds old and new ones, and does not generate."""
