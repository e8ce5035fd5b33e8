"""`rl`: the AV writes, the AR reads, both learn, and the sampler gets the new weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nla_megatron import geometry
from nla_megatron.algorithms import make_algorithm
from nla_megatron.config.run_directory import check_run_directory, mark_done
from nla_megatron.config.schema import RlConfig
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import ConfigError, LayoutError, RolloutError
from nla_megatron.models.batching import Batch
from nla_megatron.models.builder import check_layout
from nla_megatron.parallel.world import World, data_parallel_size
from nla_megatron.rewards import make_reward
from nla_megatron.rollout.engine import Engine, check_rollout_layout
from nla_megatron.tasks.nla import NlaTask, explanations_of, response_logprobs
from nla_megatron.training.data_order import rows_of_step
from nla_megatron.training.export import descended, export
from nla_megatron.training.loop import train
from nla_megatron.training.losses import reconstruction
from nla_megatron.training.module import FrozenCopy, TrainModule, Update
from nla_megatron.training.policy_loss import STATISTICS, policy_loss
from nla_megatron.training.recorder import RolloutRecorder
from nla_megatron.training.sft import load_ar, load_av, model_shape
from nla_megatron.types import RolloutBatch


def check(config: RlConfig, world_size: int) -> None:
    """Everything that can be known before the first step; raises a named error."""
    data_parallel_size(config.parallel, world_size)
    task = NlaTask.open(config.data, "rl", config.av)
    task.check_model(config.av, "av")
    task.check_model(config.ar, "ar")
    shape = read_shape(config.av)
    check_layout(shape, config.parallel)
    check_layout(model_shape("ar", config.ar, task), config.parallel)
    check_rollout_layout(shape, config.rollout.tp, world_size)
    longest = len(task.prompt_ids) + config.rollout.max_new_tokens
    limit = min(config.rollout.max_model_len, shape.max_positions)
    if longest > limit:
        raise LayoutError(
            f"a prompt of {len(task.prompt_ids)} tokens and rollout.max_new_tokens={config.rollout.max_new_tokens}",
            f"at most {limit} tokens in all", "lower rollout.max_new_tokens or raise rollout.max_model_len",
        )  # fmt: skip
    if config.eval_every and config.held_out is None:
        raise ConfigError(
            f"eval_every={config.eval_every} without held_out", "a table of held-out rows", "add held_out="
        )
    if config.held_out is not None:
        NlaTask.open(config.held_out, "rl", config.av).check_model(config.av, "av")
    make_algorithm(config.algorithm)
    make_reward(config.reward)
    check_run_directory("rl", config)


def run(config: RlConfig, world: World) -> None:
    torch.manual_seed(config.seed)
    trainer = RlTrainer(config, world)
    modules = {"av": trainer.av, "ar": trainer.ar}
    train("rl", "rl", config, world, modules, trainer.step, on_resume=trainer.load_engine)
    if config.export:
        trainer.export()
    if world.is_main:
        mark_done(config)
    trainer.engine.close()


@dataclass
class PhaseClock:
    """Seconds per phase of the current step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"seconds_{name}"] = time.perf_counter() - start


class RlTrainer:
    """The models, the sampler and one step of the loop."""

    def __init__(self, config: RlConfig, world: World):
        self.config, self.world = config, world
        self.task = NlaTask.open(config.data, "rl", config.av)
        self.held_out = None if config.held_out is None else NlaTask.open(config.held_out, "rl", config.av)
        self.algorithm, self.reward = make_algorithm(config.algorithm), make_reward(config.reward)
        av, ar = load_av(config.av, self.task, world, config.dtype), load_ar(config.ar, self.task, world, config.dtype)
        # The reference is the policy this stage starts from, also after a resume: it is taken before one loads.
        self.reference = FrozenCopy(av) if config.algorithm.kl_coef > 0 else None
        steps, micro, dtype = config.steps, config.micro_batch_size, config.dtype
        self.av = TrainModule(av, world, config.optim, steps, micro, dtype)
        self.ar = TrainModule(ar, world, config.ar_optim, steps, micro, dtype)
        task, shape = self.task, av.shape
        eos_id = int(task.tokenizer.eos_token_id)
        self.engine = Engine(
            config.av, shape, config.rollout, task.interventions, world, eos_id, config.seed, marker=task.marker
        )
        # It imports vLLM, for which the checks before the run need not wait.
        from nla_megatron.reshard.resharder import Resharder

        self.resharder = Resharder(av, shape, self.engine.llm, read_shape(config.av), world)
        self.recorder = RolloutRecorder(config, world)
        # The sampler starts from the same directory, but the trainer's weights are the ones that count.
        self.load_engine()

    def step(self, number: int) -> dict[str, float]:
        """One step: write, read, credit, learn, hand over. Returns what to log."""
        clock = PhaseClock()
        with clock.phase("generate"):
            rollouts = self._rollouts(number)
        rows = [rollout.row for rollout in rollouts.rollouts]
        explanations = explanations_of(rollouts.rollouts)
        with clock.phase("score"):
            mse_N, failed_N = self.task.score(self.ar.rows, rows, explanations)
            rewards_N = self.reward(mse_N, failed_N)
        credit = self.algorithm.credit(rewards_N, torch.tensor([rollout.group for rollout in rollouts.rollouts]))
        with clock.phase("av"):
            av = self._update_av(number, rollouts, credit.advantages)
        with clock.phase("ar"):
            ar = self._update_ar(number, rows, explanations)
        with clock.phase("reload"):
            self.load_engine()
        scalars = self._scalars(rollouts, mse_N, failed_N, rewards_N, av, ar)
        if self.config.eval_every and (number + 1) % self.config.eval_every == 0 and self.held_out is not None:
            with clock.phase("eval"):
                scalars["eval_fve"] = self._held_out_fve(number)
        return {**scalars, **clock.seconds}

    def load_engine(self) -> None:
        """Hand the AV's present weights to the sampler."""
        with self.engine.replacing_weights():
            self.resharder.load()

    def export(self) -> None:
        """The AV and the AR as Hugging Face directories with their sidecars."""
        training = {
            "steps": self.config.steps,
            "prompts_per_step": self.config.batch_size,
            "samples_per_prompt": self.config.samples_per_prompt,
            "lr": self.config.optim.lr,
            "ar_lr": self.config.ar_optim.lr,
            "kl_coef": self.config.algorithm.kl_coef,
        }
        for role, source, module in (("av", self.config.av, self.av), ("ar", self.config.ar, self.ar)):
            parent = self.task.check_model(source, role)
            sidecar = descended(parent, "rl", source, self.task.sidecar.dataset_id, training)
            export(module.model, source, Path(self.config.out) / role, self.world, sidecar)

    def _rollouts(self, number: int) -> RolloutBatch:
        rows = rows_of_step(self.task.table.n_rows, self.config.batch_size, number, self.config.seed)
        recorded = self.recorder.replayed(number)
        if recorded is not None:
            positions = [self.task.marker_position] * len(recorded)
            return self.engine.score(recorded, positions, self.task.table.vectors)
        rollouts = self.engine.generate(
            self.task.requests(rows, self.config.seed, number), self.task.table.vectors, self.config.samples_per_prompt
        )
        self.recorder.record(number, rollouts)
        return rollouts

    def _update_av(self, number: int, rollouts: RolloutBatch, advantages_N: Tensor) -> list[Update]:
        """One optimizer step per minibatch of whole groups; the old log-probs are those before the first of them."""
        fields = self._policy_fields(rollouts, advantages_N)
        groups = torch.tensor([rollout.group for rollout in rollouts.rollouts])
        temperature = self.config.rollout.temperature
        updates = []
        for minibatch in torch.arange(int(groups.max()) + 1).chunk(self.config.algorithm.minibatches):
            chosen = [index for index, group in enumerate(groups.tolist()) if group in set(minibatch.tolist())]
            batch = self._policy_batch(rollouts, chosen, {name: values[chosen] for name, values in fields.items()})
            total = float(batch.fields["mask"].sum())
            loss = policy_loss(self.algorithm, total, temperature)
            updates.append(self.av.update(batch, loss, STATISTICS, number, check=self._check_gap))
        return updates

    def _policy_batch(self, rollouts: RolloutBatch, chosen: list[int], fields: dict[str, Tensor]) -> Batch:
        picked = [rollouts.rollouts[index] for index in chosen]
        return self.task.response_batch([r.row for r in picked], [r.response_ids for r in picked], **fields)

    def _policy_fields(self, rollouts: RolloutBatch, advantages_N: Tensor) -> dict[str, Tensor]:
        """Per-rollout and per-token inputs of the policy loss, aligned with the mask: (N,) and (N, T)."""
        everything = list(range(len(rollouts.rollouts)))
        plain = self._policy_batch(rollouts, everything, {})
        width, first = plain.longest, len(self.task.prompt_ids) - 1
        sampler = torch.zeros(len(everything), width)
        for index, rollout in enumerate(rollouts.rollouts):
            sampler[index, first : first + len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
        fields = {"advantages": advantages_N, "sampler": sampler}
        collect = response_logprobs(self.config.rollout.temperature)
        if self.reference is not None:
            with self.reference.in_place():
                fields["reference"] = self.av.rows(plain, collect, width)
        if self.config.algorithm.minibatches > 1:
            fields["old"] = self.av.rows(plain, collect, width)
        return fields

    def _check_gap(self, statistics: dict[str, float]) -> None:
        limit, gap = self.config.rollout.max_logprob_gap, statistics["logprob_gap_max"]
        if limit is not None and not gap <= limit:
            raise RolloutError(
                f"log-probs of sampler and trainer differ by {gap:.3g} at one token",
                f"at most rollout.max_logprob_gap={limit:g}",
                "check the injection and the weight sync; the gap's usual floor is 1e-4 in fp32 and 0.02 in bf16",
            )

    def _update_ar(self, number: int, rows: list[int], explanations: list[str | None]) -> list[Update]:
        good = [index for index, text in enumerate(explanations) if text is not None]
        order = np.random.default_rng([self.config.seed, 3, number]).permutation(len(good))
        updates = []
        for part in np.array_split(order, self.config.ar_updates):
            chosen = [good[index] for index in part]
            if chosen:
                texts = [str(explanations[index]) for index in chosen]
                batch = self.task.text_batch([rows[index] for index in chosen], texts)
                updates.append(self.ar.update(batch, reconstruction(len(chosen)), ("loss",), number))
        return updates

    def _held_out_fve(self, number: int) -> float:
        """FVE of fresh samples on the first `eval_rows` held-out rows, with the models as they are now."""
        assert self.held_out is not None
        rows = list(range(min(self.config.eval_rows, self.held_out.table.n_rows)))
        requests = self.held_out.requests(rows, self.config.seed, number)
        rollouts = self.engine.generate(requests, self.held_out.table.vectors, 1)
        mse_N, _ = self.held_out.score(self.ar.rows, rows, explanations_of(rollouts.rollouts))
        return geometry.fve(mse_N, torch.from_numpy(self.held_out.table.vectors(rows)), self.held_out.mse_scale)

    def _scalars(
        self,
        rollouts: RolloutBatch,
        mse_N: Tensor,
        failed_N: Tensor,
        rewards_N: Tensor,
        av: list[Update],
        ar: list[Update],
    ) -> dict[str, float]:
        samples = rollouts.rollouts
        tokens = sum(len(rollout.response_ids) for rollout in samples)
        means = [name for name in STATISTICS if not name.endswith("_max")]
        policy = {name: sum(update.statistics[name] for update in av) / len(av) for name in means}
        rows = list(dict.fromkeys(rollout.row for rollout in samples))
        spread = geometry.variance(torch.from_numpy(self.task.table.vectors(rows)), self.task.mse_scale)
        return {
            "reward": float(rewards_N.mean()),
            "reward_std": float(rewards_N.std()),
            "batch_fve": 1 - float(mse_N.mean()) / spread if spread else float("nan"),
            "response_length": tokens / len(samples),
            "truncated": sum(not rollout.finished for rollout in samples) / len(samples),
            "extraction_failed": float(failed_N.float().mean()),
            "injected": rollouts.injections.injected,
            "expected_injections": rollouts.injections.expected,
            "av_loss": policy["loss"],
            "kl": policy["kl"],
            "entropy": policy["entropy"],
            "clipped": policy["clipped"],
            "logprob_gap": policy["logprob_gap"],
            "logprob_gap_max": max(update.statistics["logprob_gap_max"] for update in av),
            "av_grad_norm": av[-1].grad_norm,
            "av_lr": av[-1].learning_rate,
            "ar_loss": sum(update.statistics["loss"] for update in ar) / max(1, len(ar)),
            "ar_grad_norm": ar[-1].grad_norm if ar else 0.0,
            "skipped": sum(update.skipped for update in (*av, *ar)),
        }
