"""`plan reshard`: what a layout would move, from a config.json alone: no weights, no process group, no GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_megatron.config.schema import ParallelConfig, PlanConfig
from nla_megatron.conversion.formats.config_file import settled_directory
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import ConfigError
from nla_megatron.models.builder import check_layout, check_rollout_layout
from nla_megatron.parallel.world import data_parallel_size
from nla_megatron.reshard.carriers import Sampler
from nla_megatron.reshard.megatron_side import TrainLayout, claims_of, tensors_of
from nla_megatron.reshard.plan import check_claims, compile_plan, world_bytes
from nla_megatron.reshard.vllm_side import check_taken, trace
from nla_megatron.types import ModelShape

_PLANNED_RANKS = 16


def vllm_config(directory: str | Path, dtype: Any) -> Any:
    """vLLM's configuration of a model of which there need be only a config.json."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(directory), hf_config_path=str(settled_directory(directory)), skip_tokenizer_init=True,
        enforce_eager=True, dtype=dtype, load_format="dummy",
    ).create_engine_config()  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Bytes over all ranks of a world; messages and staging of the busiest of the ranks that were planned.

    `received` is counted from the messages of the planned ranks, `received_bound` is what these need and do not hold.
    """

    ranks: int
    planned: int
    needed: int
    local: int
    received: int
    received_bound: int
    sent_most: int
    messages_most: int
    staging_most: int
    buckets_most: int
    ordinary: tuple[str, ...]
    seconds_traced: float
    seconds_planned: float

    @property
    def bound(self) -> int:
        """What must travel: needed and not held."""
        return self.needed - self.local

    def lines(self) -> list[str]:
        gb, ordinary = 1e9, self.ordinary
        rows = [
            ("ranks", f"{self.ranks}, of which {self.planned} were planned"),
            ("needed by the sampler", f"{self.needed / gb:.3f} GB over all ranks"),
            ("copied locally", f"{self.local / gb:.3f} GB"),
            ("to be sent, at least", f"{self.bound / gb:.3f} GB"),
            ("sent / lower bound", f"{ratio(self.received, self.received_bound):.4f} on the planned ranks"),
            ("sent by one rank", f"at most {self.sent_most / gb:.3f} GB in {self.messages_most} messages"),
            ("staging", f"at most {self.staging_most / 1e6:.1f} MB in {self.buckets_most} buckets"),
            ("ordinary path", f"{len(ordinary)} tensors" + (f", first {ordinary[0]}" if ordinary else "")),
            ("planning", f"{self.seconds_traced:.2f} s for vLLM's loaders, {self.seconds_planned:.2f} s for a rank"),
        ]
        return [f"{name:<22} {value}" for name, value in rows]


def ratio(sent: int, bound: int) -> float:
    """1 where nothing is sent and nothing need be."""
    return sent / bound if bound else (float("inf") if sent else 1.0)


def summarise(
    shape: ModelShape, config: Any, layout: TrainLayout, tp: int, expert_parallel: bool, dtype: str, staging: int,
    ranks: Sequence[int] | None = None,
) -> Summary:  # fmt: skip
    """Plan some ranks of a world and count the bytes of all; `config` is vLLM's."""
    start = time.perf_counter()
    tensors = tensors_of(shape)
    traces = [trace(config, tensors, rank, tp, expert_parallel) for rank in range(tp)]
    check_taken(traces, tensors)
    traced = time.perf_counter()
    size = len(layout.ranks)
    samplers = [Sampler(tuple(range(rank, size, tp)), one.needs) for rank, one in enumerate(traces)]
    claims = claims_of(shape, layout)
    check_claims(claims)
    common = time.perf_counter() - traced
    chosen = list(ranks or range(0, size, max(1, size // _PLANNED_RANKS)))
    plans = [compile_plan(claims, samplers, rank, dtype, staging) for rank in chosen]
    each = common + (time.perf_counter() - traced - common) / len(chosen)
    needed, local = world_bytes(claims, samplers, dtype)
    return Summary(
        ranks=size,
        planned=len(chosen),
        needed=needed,
        local=local,
        received=sum(plan.bytes_received for plan in plans),
        received_bound=sum(plan.bytes_bound for plan in plans),
        sent_most=max(plan.bytes_sent for plan in plans),
        messages_most=max(plan.messages for plan in plans),
        staging_most=max(plan.staging for plan in plans),
        buckets_most=max(len(plan.buckets) for plan in plans),
        ordinary=tuple(dict.fromkeys(name for one in traces for name in one.ordinary)),
        seconds_traced=traced - start,
        seconds_planned=each,
    )


def layout_of(config: ParallelConfig) -> TrainLayout:
    stages = None if config.stages is None else tuple(config.stages)
    etp = config.etp or config.tp
    return TrainLayout(config.tp, config.pp, config.dp or 1, config.ep, etp, config.vpp, stages)


def check(config: PlanConfig, world_size: int) -> None:
    """Raises ConfigError, LayoutError, MissingFile or UnsupportedModel."""
    if not config.hf:
        raise ConfigError("no hf=", "a directory with a config.json", "add hf=...")
    shape, layout = read_shape(config.hf), layout_of(config.parallel)
    data_parallel_size(config.parallel, len(layout.ranks))
    check_layout(shape, layout, "convert")
    check_rollout_layout(shape, config.rollout_tp, len(layout.ranks), config.expert_parallel, "rollout_tp")


def run(config: PlanConfig) -> None:
    summary = summarise(
        read_shape(config.hf), vllm_config(config.hf, config.rollout_dtype), layout_of(config.parallel),
        config.rollout_tp, config.expert_parallel, config.dtype, config.staging_mb << 20,
    )  # fmt: skip
    print("\n".join(summary.lines()))
