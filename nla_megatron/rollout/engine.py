"""The sampler: vLLM, tensor-parallel, inside the processes that train."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nla_megatron.errors import ColumnError, ConfigError, HalfLoaded, InjectionError, LayoutError, RolloutError
from nla_megatron.interventions.maths import check_vectors
from nla_megatron.parallel.collectives import broadcast_object, gather_objects
from nla_megatron.parallel.world import World
from nla_megatron.rollout.worker import LOAD_FORMAT, InjectingWorker, register_loader
from nla_megatron.types import InjectionCount, ModelShape, Rollout, RolloutBatch

if TYPE_CHECKING:
    from nla_megatron.config.schema import InterventionConfig, RolloutConfig

Vectors = Callable[[Sequence[int]], np.ndarray]
"""Rows of the data table -> activations (N, D) fp32; asked only for this replica's share."""


@dataclass(frozen=True)
class PromptRequest:
    """One prompt to sample: `position` is the marker's index in `prompt_ids`, `row` the activation's."""

    group: int
    row: int
    prompt_ids: tuple[int, ...]
    position: int
    seed: int


def check_rollout_layout(shape: ModelShape, tp: int, world_size: int) -> None:
    """Raises LayoutError where replicas of `tp` ranks do not tile the world, or heads do not divide."""
    if world_size % tp:
        raise LayoutError(
            f"rollout.tp={tp} in a world of {world_size}", f"a divisor of {world_size}", "change rollout.tp"
        )
    fits_groups = shape.num_kv_heads % tp == 0 or tp % shape.num_kv_heads == 0
    if shape.num_heads % tp or shape.ffn_hidden_size % tp or not fits_groups:
        raise LayoutError(
            f"{shape.num_heads} attention heads, {shape.num_kv_heads} key/value heads and {shape.ffn_hidden_size} "
            f"feed-forward columns at rollout.tp={tp}",
            "a tp that divides them",
            "change rollout.tp",
        )


class Engine:
    """vLLM over all ranks: `world.size / tp` replicas, each serving its share of every batch.

    Every method is collective: all ranks call it with the same arguments.
    """

    def __init__(
        self,
        model: str,
        shape: ModelShape,
        config: RolloutConfig,
        intervention: InterventionConfig,
        world: World,
        eos_id: int,
        seed: int,
    ):
        check_rollout_layout(shape, config.tp, world.size)
        self.config, self.world, self.eos_id, self.tied = config, world, eos_id, shape.tied_embeddings
        self.replicas, self.replica = world.size // config.tp, world.rank // config.tp
        self.llm = _start(model, shape, config, intervention, world, seed)
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.runner = runner
        self.injecting = InjectingWorker(runner, intervention.layer)
        self.tokenizer = self.llm.get_tokenizer()
        self.half_loaded = False

    @contextmanager
    def replacing_weights(self) -> Iterator[None]:
        """Around a load of weights: one that does not come to its end leaves an engine that does not generate."""
        self.half_loaded = True
        yield
        self.half_loaded = False

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights in place by full HF tensors; every rank passes all of them."""
        with self.replacing_weights():
            self.runner.reload_weights(weights_iterator=self._with_tied_head(tensors), is_checkpoint_format=True)

    def _with_tied_head(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """vLLM packs a tied output layer apart from the embedding: not named, it would keep its old weights."""
        for name, tensor in tensors:
            yield name, tensor
            if self.tied and name == "model.embed_tokens.weight":
                yield "lm_head.weight", tensor

    def generate(self, requests: Sequence[PromptRequest], vectors: Vectors, samples: int) -> RolloutBatch:
        """`samples` responses per request, with the sampler's log-probs under the sampling temperature.

        Raises:
            InjectionError: not every request's marker was injected exactly where asked.
            RolloutError: ranks of one replica sampled differently.
        """
        from vllm import SamplingParams

        mine = self._share(requests)
        outputs = self._run(
            [request.prompt_ids for request in mine],
            [
                SamplingParams(
                    n=samples,
                    max_tokens=self.config.max_new_tokens,
                    temperature=self.config.temperature,
                    seed=request.seed,
                    logprobs=0,
                    stop_token_ids=[self.eos_id],
                    detokenize=False,
                    extra_args={"slot": slot, "position": request.position},
                )
                for slot, request in enumerate(mine)
            ],
            vectors([request.row for request in mine]) if mine else None,
        )
        rollouts = [
            self._rollout(
                request, index, sample.token_ids, [next(iter(step.values())).logprob for step in sample.logprobs]
            )
            for request, output in zip(mine, outputs, strict=True)
            for index, sample in enumerate(output.outputs)
        ]
        return self._exchange(rollouts, expected=len(requests) * samples)

    def score(self, recorded: Sequence[Rollout], positions: Sequence[int], vectors: Vectors) -> RolloutBatch:
        """The same rollouts with log-probs under the engine's present weights: nothing is sampled.

        Raises:
            ConfigError: at a temperature other than 1, which vLLM does not apply to given tokens.
        """
        from vllm import SamplingParams

        if self.config.temperature != 1.0:
            raise ConfigError(
                f"rollout.temperature={self.config.temperature} with rollout.replay",
                "temperature 1",
                "replay at temperature 1",
            )
        mine = self._share(list(zip(recorded, positions, strict=True)))
        outputs = self._run(
            [(*rollout.prompt_ids, *rollout.response_ids) for rollout, _ in mine],
            [
                SamplingParams(
                    max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args={"slot": slot, "position": position}
                )
                for slot, (_, position) in enumerate(mine)
            ],
            vectors([rollout.row for rollout, _ in mine]) if mine else None,
        )
        scored = []
        for (rollout, _), output in zip(mine, outputs, strict=True):
            steps = output.prompt_logprobs[len(rollout.prompt_ids) :]
            logprobs = [step[token].logprob for step, token in zip(steps, rollout.response_ids, strict=True)]
            request = PromptRequest(rollout.group, rollout.row, rollout.prompt_ids, 0, 0)
            scored.append(self._rollout(request, rollout.sample, rollout.response_ids, logprobs))
        return self._exchange(scored, expected=len(recorded))

    def close(self) -> None:
        """Give back the engine's memory and groups; the process group of the trainer may go with them."""
        self.llm.llm_engine.engine_core.shutdown()

    def _share(self, items: Sequence[Any]) -> list[Any]:
        """This replica's contiguous part; shares differ by at most one."""
        bounds = [len(items) * index // self.replicas for index in range(self.replicas + 1)]
        return list(items[bounds[self.replica] : bounds[self.replica + 1]])

    def _run(self, prompts: list[tuple[int, ...]], params: list[Any], vectors_SD: np.ndarray | None) -> list[Any]:
        if self.half_loaded:
            raise HalfLoaded(
                "a load of weights did not finish", "the weights of one step",
                "end the run and resume it: see the first error",
            )  # fmt: skip
        if vectors_SD is None:
            self.injecting.begin(torch.zeros(1, 1))
            return []
        vectors = torch.from_numpy(vectors_SD)
        if bad := check_vectors(vectors):
            raise ColumnError(
                f"{bad} activations that are zero or not finite", "finite activations", "extract the table again"
            )
        self.injecting.begin(vectors)
        return self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)

    def _rollout(self, request: PromptRequest, sample: int, ids: Sequence[int], logprobs: Sequence[float]) -> Rollout:
        finished = bool(ids) and ids[-1] == self.eos_id
        return Rollout(
            group=request.group,
            sample=sample,
            row=request.row,
            prompt_ids=request.prompt_ids,
            response_ids=tuple(ids),
            logprobs=tuple(logprobs),
            text=self.tokenizer.decode(ids[:-1] if finished else ids),
            finished=finished,
        )

    def _exchange(self, mine: list[Rollout], expected: int) -> RolloutBatch:
        """Everybody's rollouts on every rank; each replica's first rank sends, the others vouch with a digest."""
        digest = hashlib.sha256(repr([(r.group, r.sample, r.row, r.response_ids) for r in mine]).encode()).hexdigest()
        leads = self.world.rank % self.config.tp == 0
        everyone = gather_objects((digest, self.injecting.finish(), mine if leads else None), self.world)
        rollouts: list[Rollout] = []
        requests = marked = applied = 0
        for rank, (seen, counts, sent) in enumerate(everyone):
            if seen != everyone[rank - rank % self.config.tp][0]:
                raise RolloutError(
                    f"rank {rank} holds other rollouts than rank {rank - rank % self.config.tp} of its replica",
                    "the same samples on all ranks of a replica", "check that all ranks run the same code and seeds",
                )  # fmt: skip
            if counts != everyone[rank - rank % self.config.tp][1]:
                raise InjectionError(
                    f"rank {rank} injected {counts[0]} requests and changed {counts[2]} of {counts[1]} marked tokens",
                    "as many as the first rank of its replica",
                    "this is a defect of the rollout engine: report it",
                )
            if sent is not None:
                rollouts += sent
                requests, marked, applied = requests + counts[0], marked + counts[1], applied + counts[2]
        if requests != expected or marked != applied:
            raise InjectionError(
                f"{requests} of {expected} requests injected, {applied} of {marked} marked tokens changed",
                "every request's marker injected", "this is a defect of the rollout engine: report it",
            )  # fmt: skip
        rollouts.sort(key=lambda rollout: (rollout.group, rollout.sample))
        return RolloutBatch(tuple(rollouts), InjectionCount(requests, expected))


def _start(
    model: str, shape: ModelShape, config: RolloutConfig, intervention: InterventionConfig, world: World, seed: int
) -> Any:
    """An `LLM` whose worker lives in this process."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        # The second model runner, the default where Triton is there, has no place to mark the tokens of a batch.
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_CPU_KVCACHE_SPACE=str(config.cpu_kv_cache_gib),
        VLLM_CPU_OMP_THREADS_BIND=_cores(world.size),
    )
    from vllm import LLM

    register_loader()
    dtype: Any = config.dtype
    return LLM(
        model,
        dtype=dtype,
        load_format=LOAD_FORMAT,
        model_loader_extra_config={
            "layer": intervention.layer,
            "method": intervention.method,
            "scale": intervention.scale,
            "max_tokens": config.max_num_batched_tokens,
        },
        max_model_len=min(config.max_model_len, shape.max_positions),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel_size=config.tp,
        distributed_executor_backend="external_launcher",
        worker_cls=_worker_class(world),
        # The op asks how many tokens it changes, which a captured graph cannot.
        enforce_eager=True,
        # Equal prompts hold different activations: a cache keyed on token ids alone would mix them up.
        enable_prefix_caching=False,
        # The trainer's log-probs are of the tempered distribution, so the sampler's must be.
        logprobs_mode="processed_logprobs",
        seed=seed,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


def _worker_class(world: World) -> str:
    """vLLM's own worker on a GPU; on a CPU one whose shared memory belongs to this run alone."""
    if world.device.type != "cpu":
        return "auto"
    from nla_megatron.rollout import cpu_worker

    if world.is_main:
        cpu_worker.remove_stale_segments()
    os.environ[cpu_worker.NAME_VARIABLE] = broadcast_object(cpu_worker.segment_name() if world.is_main else None, world)
    return f"{cpu_worker.__name__}.{cpu_worker.IsolatedCpuWorker.__name__}"


def _cores(ranks: int) -> str:
    """vLLM's CPU binding: the machine's cores dealt to the ranks, shared where there are fewer cores than ranks."""
    cores = os.cpu_count() or 1
    share = max(1, cores // ranks)
    first = [rank * share % cores for rank in range(ranks)]
    return "|".join(f"{core}-{core + share - 1}" if share > 1 else str(core) for core in first)
