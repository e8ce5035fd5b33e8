"""The sampler: vLLM, tensor-parallel, inside the processes that train."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.conversion.peft_format import PeftConfig
from nla_megatron.errors import ConfigError, HalfLoaded
from nla_megatron.interventions.checks import Marker, check_layers
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.builder import check_rollout_layout
from nla_megatron.parallel.collectives import gather_objects
from nla_megatron.parallel.world import World
from nla_megatron.rollout.accounting import Asked, Ledger, Report, agreed, changed, missing_samples
from nla_megatron.rollout.adapter import USUAL_RANK, Adapter, install
from nla_megatron.rollout.adapter import request as policy_request
from nla_megatron.rollout.plugin import NAME
from nla_megatron.rollout.requests import (
    Project,
    Prompt,
    PromptRequest,
    Terms,
    Vectors,
    as_interventions,
    encode,
    shares,
)
from nla_megatron.rollout.start import start
from nla_megatron.rollout.worker import runner_of
from nla_megatron.types import ModelShape, Rollout, RolloutBatch

if TYPE_CHECKING:
    from nla_megatron.config.schema import InterventionConfig, RolloutConfig

__all__ = ["Engine", "PromptRequest", "Vectors"]


class Engine:
    """vLLM over all ranks: `world.size / tp` replicas, each serving its share of every batch.

    Every method is collective: all ranks call it with the same arguments. `reports` tells what was injected where in
    this replica's last batch.

    Args:
        intervention: the configuration's one, or any number of `Intervention`.
        end_ids: the ids that end a response, each of which it stops at.
        marker: what must stand at every position; None where any token may.
        project: what the mode `project` does to the vectors; it may be another before each batch.

    Raises:
        LayoutError, ConfigError, VersionError: what it is started with does not fit.
    """

    def __init__(
        self,
        model: str,
        shape: ModelShape,
        config: RolloutConfig,
        intervention: InterventionConfig | Intervention | Sequence[Intervention],
        world: World,
        end_ids: int | Sequence[int],
        seed: int,
        marker: Marker | None = None,
        project: Project | None = None,
    ):
        check_rollout_layout(shape, config.tp, world.size, config.expert_parallel)
        interventions = as_interventions(intervention)
        check_layers(interventions, shape.num_layers)
        if project is None and any(each.mode == "project" for each in interventions):
            raise ConfigError("mode project without a projection", "Engine(project=...)", "pass the trainer's")
        limit = min(config.max_model_len, shape.max_positions)
        self.terms = Terms(interventions, shape.hidden_size, limit, marker, shape.vocab_size)
        self.config, self.world, self.tied = config, world, shape.tied_embeddings
        self.end_ids = (end_ids,) if isinstance(end_ids, int) else tuple(end_ids)
        self.project = project
        self.replicas, self.replica = world.size // config.tp, world.rank // config.tp
        self.llm = start(model, shape, config, interventions, world, seed)
        self.runner = runner_of(self.llm)
        self.marker = self.runner.marker
        self.ledger = Ledger(interventions)
        self.reports: tuple[Report, ...] = ()
        self.policy: Any = None
        self.tokenizer = load_tokenizer(model)
        self.half_loaded = False

    @contextmanager
    def replacing_weights(self) -> Iterator[None]:
        """Around a load of weights: one that does not come to its end leaves an engine that does not generate."""
        self.half_loaded = True
        yield
        self.forget()
        self.half_loaded = False

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a text, a chat or ids; never two beginnings."""
        return encode(self.tokenizer, prompt)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights in place by full HF tensors; every rank passes all of them."""
        with self.replacing_weights():
            self.runner.reload_weights(weights_iterator=self._with_tied_head(tensors), is_checkpoint_format=True)

    def load_adapter(self, tensors: Iterable[tuple[str, Tensor]], config: PeftConfig) -> None:
        """Put a LoRA policy in the place of the one before: pairs by `peft`'s names; every rank passes all of them.

        Raises:
            ConfigError: the engine was not started with `rollout.lora: adapter`, or for a smaller rank.
            UnsupportedModel, CheckpointError: pairs that vLLM has no layer for, or that are none.
        """
        if self.config.lora != "adapter":
            raise ConfigError(f"an adapter with rollout.lora={self.config.lora}", "adapter", "set rollout.lora=adapter")
        # vLLM takes a whole adapter or none, so that no half of one is left, as `replacing_weights` assumes of a load.
        install(self.runner, Adapter.of(tensors, config, self.config.lora_rank or USUAL_RANK))
        self.policy = policy_request()
        self.forget()

    def _with_tied_head(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """vLLM packs a tied output layer apart from the embedding: not named, it would keep its old weights."""
        for name, tensor in tensors:
            yield name, tensor
            if self.tied and name == "model.embed_tokens.weight":
                yield "lm_head.weight", tensor

    def forget(self) -> None:
        """Empty the prefix cache, as `load` does: keys and values of other weights are of no use."""
        assert self.llm.reset_prefix_cache(), "no request is under way"
        self.ledger.clear()

    def sleep(self) -> bool:
        """Give the device's memory back until `wake`; the weights are dropped. False where nothing could be given.

        Needs `rollout.sleep` and a GPU: on a CPU vLLM has nothing to take its memory from.
        """
        if self.world.device.type == "cpu" or not self.config.sleep:
            return False
        self.llm.sleep(level=2)
        self.ledger.clear()
        self.policy = None
        return True

    def wake(self) -> None:
        """Take the memory again; after a `sleep` that gave it back, `load` (and `load_adapter`) come first."""
        if self.world.device.type != "cpu" and self.config.sleep:
            self.llm.wake_up()

    def generate(
        self, requests: Sequence[PromptRequest], vectors: Vectors, samples: int, training_step: int = 0
    ) -> RolloutBatch:
        """`samples` responses per request, with the sampler's log-probs under the sampling temperature.

        Args:
            training_step: for strengths that follow a schedule over training.

        Raises:
            InjectionError: not every request was changed exactly where asked, or it asks for what cannot be.
            LayoutError, ConfigError, WidthError, ColumnError: a request that cannot be served; nothing was generated.
            RolloutError: ranks of one replica sampled differently.
        """
        self.terms.check(requests, samples, [self.config.max_new_tokens] * len(requests))
        counts = [request.samples or samples for request in requests]
        weights = [
            len(request.prompt_ids) + count * self.config.max_new_tokens
            for request, count in zip(requests, counts, strict=True)
        ]
        mine = [requests[index] for index in shares(weights, self.replicas)[self.replica]]
        asked = self.terms.asked(mine, samples, vectors, self.project, training_step)
        params = [
            self._sampling(request, key, each.samples) for request, (key, each) in zip(mine, asked.items(), strict=True)
        ]
        outputs, wrong = self._run([request.prompt_ids for request in mine], params, asked)
        rollouts = [
            request.answered(
                index,
                sample.token_ids,
                [next(iter(step.values())).logprob for step in sample.logprobs],
                sample.finish_reason == "stop",
                self.tokenizer,
                self.end_ids,
            )  # fmt: skip
            for request, output in zip(mine, outputs, strict=True)
            for index, sample in enumerate(output.outputs)
        ]
        return self._exchange(rollouts, wrong, expected=sum(counts))

    def _sampling(self, request: PromptRequest, key: str, samples: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=samples,
            max_tokens=self.config.max_new_tokens,
            temperature=0.0 if request.greedy else self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            seed=request.seed,
            logprobs=0,
            stop_token_ids=list(self.end_ids),
            stop=self.config.stop or None,
            detokenize=bool(self.config.stop),
            # A stop text may be a special token's.
            skip_special_tokens=False,
            extra_args={NAME: key},
        )

    def score(
        self, recorded: Sequence[Rollout], asked_for: Sequence[PromptRequest], vectors: Vectors, training_step: int = 0
    ) -> RolloutBatch:
        """The same rollouts with log-probs under the engine's present weights: nothing is sampled.

        Args:
            asked_for: of each rollout, where and how its prompt is changed; the tokens are the rollout's.

        Raises:
            As `generate`.
        """
        from vllm import SamplingParams

        requests = [request.again(rollout) for request, rollout in zip(asked_for, recorded, strict=True)]
        self.terms.check(requests, 1, [len(rollout.response_ids) + 1 for rollout in recorded])
        weights = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in recorded]
        chosen = shares(weights, self.replicas)[self.replica]
        asked = self.terms.asked([requests[index] for index in chosen], 1, vectors, self.project, training_step)
        params = [
            SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args={NAME: key}) for key in asked
        ]
        mine = [recorded[index] for index in chosen]
        with self.runner.sampler.scoring(self.config.temperature or 1.0):
            outputs, wrong = self._run([(*each.prompt_ids, *each.response_ids) for each in mine], params, asked)
        scored = []
        for index, rollout, output in zip(chosen, mine, outputs, strict=True):
            steps = output.prompt_logprobs[len(rollout.prompt_ids) :]
            logprobs = [step[token].logprob for step, token in zip(steps, rollout.response_ids, strict=True)]
            scored.append(
                requests[index].answered(
                    rollout.sample, rollout.response_ids, logprobs, rollout.finished, self.tokenizer, self.end_ids
                )
            )
        return self._exchange(scored, wrong, expected=len(recorded))

    def changed_tokens(self) -> int:
        """How many the interventions changed in the last batch, with those that were kept as changed before."""
        # The ranks of a replica report the same tokens.
        return sum(gather_objects(changed(self.reports), self.world)[:: self.config.tp])

    def close(self) -> None:
        """Give back the engine's memory and groups; the process group of the trainer may go with them."""
        self.llm.llm_engine.engine_core.shutdown()

    def _run(
        self, prompts: list[tuple[int, ...]], params: list[Any], asked: Mapping[str, Asked]
    ) -> tuple[list[Any], list[str]]:
        """vLLM's outputs, and a line for each request that did not get what it asked for."""
        if self.half_loaded:
            raise HalfLoaded(
                "a load of weights did not finish", "the weights of one step",
                "end the run and resume it: see the first error",
            )  # fmt: skip
        if self.config.lora == "adapter" and self.policy is None:
            raise ConfigError("rollout.lora=adapter and no adapter", "the policy's", "call Engine.load_adapter first")
        self.marker.begin(asked)
        outputs: list[Any] = []
        if prompts:
            inputs = [
                {"prompt_token_ids": list(ids), "cache_salt": each.salt}
                for ids, each in zip(prompts, asked.values(), strict=True)
            ]
            outputs = self.llm.generate(inputs, params, use_tqdm=False, lora_request=self.policy)
        periods = self.marker.finish()
        reports, wrong = self.ledger.settle(asked, periods)
        self.reports = tuple(reports)
        if not self.terms.interventions:
            return outputs, []
        fed = {
            key: [len(ids) + len(sample.token_ids) - 1 for sample in output.outputs]
            for key, ids, output in zip(asked, prompts, outputs, strict=True)
        }
        return outputs, wrong + missing_samples(asked, periods, fed)

    def _exchange(self, mine: list[Rollout], wrong: list[str], expected: int) -> RolloutBatch:
        """Everybody's rollouts on every rank; each replica's first rank sends, the others vouch with a digest."""
        digest = hashlib.sha256(repr([(r.group, r.sample, r.row, r.response_ids) for r in mine]).encode()).hexdigest()
        leads = self.world.rank % self.config.tp == 0
        everyone = gather_objects((digest, wrong, mine if leads else None), self.world)
        if any(problems for _, problems, _ in everyone):
            # Blocks that were computed without their intervention must not be found again, by any rank of a replica.
            self.forget()
        return agreed(everyone, self.config.tp, expected)
