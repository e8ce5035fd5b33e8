"""LoRA in the training stages: which adapters a configuration asks for, on a model that was just loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nla_megatron.config.schema import AlgorithmConfig, LoraConfig, ParallelConfig, RlConfig, RolloutConfig
from nla_megatron.config.schema.shared import LARGEST_ADAPTER
from nla_megatron.conversion.peft import attach, check_targets
from nla_megatron.errors import LayoutError
from nla_megatron.models.lora_spec import ALL_LINEAR, PROJECTIONS, LoraSpec, targets_of
from nla_megatron.models.quantized import BLOCK, NONE, check_installed
from nla_megatron.parallel.world import World
from nla_megatron.types import ModelShape


def lora_spec(config: LoraConfig) -> LoraSpec | None:
    """None where all weights are trained. Raises ConfigError for an unknown projection."""
    if not config.rank:
        return None
    targets = PROJECTIONS if list(config.targets) == [ALL_LINEAR] else targets_of(config.targets)
    return LoraSpec(config.rank, config.alpha, targets, config.rslora)


def check_lora(config: LoraConfig, shape: ModelShape, parallel: ParallelConfig, key: str = "lora") -> None:
    """Whether a model of this shape can be adapted as the configuration says under `key`.

    Raises:
        ConfigError: an unknown projection.
        UnsupportedModel: feed-forward targets of a mixture of experts.
        LayoutError: sequence parallelism, or blocks of 4-bit weights that a layer's inputs do not divide into.
        VersionError: 4-bit weights without what quantises.
    """
    spec = lora_spec(config)
    if spec is None:
        return
    check_targets(spec, shape)
    if parallel.sequence_parallel:
        raise LayoutError(
            f"{key}.rank={config.rank} with parallel.sequence_parallel", "one of the two",
            f"set parallel.sequence_parallel=false, or leave {key} out",
        )  # fmt: skip
    if config.quantize != NONE:
        check_installed()
        _check_blocks(shape, parallel, f"{key}.quantize={config.quantize}")


def _check_blocks(shape: ModelShape, parallel: ParallelConfig, setting: str) -> None:
    """Whether the inputs of every linear layer are whole blocks on each rank: then no layout changes a number."""
    width, ranks, cut_by = shape.ffn_hidden_size, parallel.tp, "tp"
    if shape.experts is not None:
        width = shape.experts.ffn_hidden_size
        ranks, cut_by = (parallel.etp, "etp") if parallel.etp else (parallel.tp, "tp")
    inputs = {
        "hidden dimensions": (shape.hidden_size, 1, "tp"),
        "dimensions of all heads": (shape.num_heads * shape.head_dim, parallel.tp, "tp"),
        "feed-forward columns": (width, ranks, cut_by),
    }
    for name, (size, parts, key) in inputs.items():
        if size % (parts * BLOCK):
            raise LayoutError(
                f"{setting} for {size} {name} on {parts} rank{'s' if parts > 1 else ''}",
                f"a multiple of {BLOCK} on each, the weights that share a scale",
                f"lower parallel.{key}" if size % BLOCK == 0 else "leave quantize out",
            )  # fmt: skip


def adapt(model: Any, config: LoraConfig, world: World, seed: int) -> None:
    """Put fresh adapters on a model as the configuration says; it computes as before, and only they (and a head) learn.

    Called before the model is wrapped for training: what is frozen by then gets no gradient and no optimizer state.
    """
    spec = lora_spec(config)
    if spec is not None:
        attach(model, model.shape, world, spec, seed)


def rollout_of(config: RlConfig, shape: ModelShape) -> RolloutConfig:
    """The sampler's configuration with what it leaves open of a LoRA policy decided: how it is handed over."""
    lora, given = config.lora, config.rollout
    taken = lora.quantize == NONE and 0 < lora.rank <= (given.lora_rank or LARGEST_ADAPTER) and shape.experts is None
    if given.engine != "vllm":  # it is the policy itself
        return given
    how = given.lora or ("adapter" if taken else "merged")
    return replace(given, lora=how, lora_rank=given.lora_rank or lora.rank if how == "adapter" else None)


def algorithm_of(config: RlConfig, shape: ModelShape) -> AlgorithmConfig:
    """The algorithm's configuration with its correction decided, where it leaves that open."""
    sampler = rollout_of(config, shape)
    loses = config.lora.rank > 0 and sampler.lora == "merged" and sampler.dtype != "float32"
    return replace(config.algorithm, correction=config.algorithm.correction or ("tis" if loses else "none"))


def lora_record(config: LoraConfig, key: str = "lora") -> dict[str, Any]:
    """What a sidecar's `training` says of it; nothing where all weights were trained."""
    return {key: dict(vars(config))} if config.rank else {}
