"""The NLA side: the AV is the policy, the AR reads what it writes, gives its error, and learns from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nla_megatron import geometry
from nla_megatron.config.schema import RlConfig
from nla_megatron.conversion.description import check_directory
from nla_megatron.conversion.hf import check_vocabulary
from nla_megatron.errors import ConfigError
from nla_megatron.models.batching import Batch
from nla_megatron.models.builder import beside_av, check_layout
from nla_megatron.parallel.world import World
from nla_megatron.rollout.requests import PromptRequest
from nla_megatron.tasks.nla import NlaTask, explanations_of
from nla_megatron.tasks.nla_held_out import Baseline, Measure, check_rows, greedy, held_out_rows
from nla_megatron.training.checkpoint import Stateful
from nla_megatron.training.export import descended, export
from nla_megatron.training.lora import adapt, check_lora, lora_record
from nla_megatron.training.losses import make_reconstruction_loss
from nla_megatron.training.module import TrainModule, Update
from nla_megatron.training.reference import Reference, copied
from nla_megatron.training.sampler import Sampler
from nla_megatron.training.sft import load_ar, load_av, model_shape
from nla_megatron.training.sides import register
from nla_megatron.training.sides.base import Policy, Prompts
from nla_megatron.types import Measured, Rollout, RolloutBatch

_AR_NAMES = {"loss": "ar_loss", "mse": "ar_mse"}


@register("nla")
class NlaSide:
    """Activations to prompts, explanations to errors; `measure` gives "mse", 2 where there is no explanation."""

    own_keys: ClassVar[tuple[str, ...]] = (
        "av", "ar", "ar_optim", "ar_updates", "ar_loss", "curriculum", "lora", "ar_lora",
    )  # fmt: skip

    def __init__(self, config: RlConfig, world: World):
        self.config, self.world = config, world
        self.task = task = NlaTask.open(config.data, "rl", config.av, config.curriculum)
        # Both have the engine's interventions, whose numbers requests name.
        self.held_out = None
        if config.held_out is not None:
            self.held_out = NlaTask.open(config.held_out, "rl", config.av, config.curriculum)
        self.baseline = self._baseline(task)
        self.ar_loss = make_reconstruction_loss(config.ar_loss)
        self.directory, self.n_rows, self.vectors = config.av, task.table.n_rows, task.inputs
        self.tokenizer, self.interventions, self.marker = task.tokenizer, task.interventions, task.marker
        av = load_av(config.av, task, world, config.dtype, quantize=config.lora.quantize)
        ar = load_ar(
            config.ar, task, beside_av(world), config.dtype, seed=config.seed, quantize=config.ar_lora.quantize
        )
        # Adapted before they are wrapped: what is frozen by then gets no gradient and no optimizer state.
        adapt(av, config.lora, world, config.seed)
        adapt(ar, config.ar_lora, world, config.seed)
        steps, micro, dtype = config.steps, config.micro_batch_size, config.dtype
        self.policy: Policy = TrainModule(av, world, config.optim, steps, micro, dtype)
        self.ar = TrainModule(ar, world, config.ar_optim, steps, micro, dtype)
        self.model, self.shape = av, av.shape
        self.learners: Mapping[str, Stateful] = {"av": self.policy, "ar": self.ar}

    def _baseline(self, task: NlaTask) -> Baseline:
        found = Baseline.of(task)
        if self.world.is_main and (note := found.note(task)) is not None:
            print(note, file=sys.stderr, flush=True)
        return found

    @cached_property
    def _measure(self) -> tuple[NlaTask, list[int], Measure] | None:
        """The held-out rows, the same at every evaluation."""
        task = self.held_out
        if task is None:
            return None
        rows = held_out_rows(task, self.config.eval_rows, self.config.seed)
        return task, rows, Measure.of(task, self._baseline(task), rows)

    @staticmethod
    def directory_of(config: RlConfig) -> str:
        return config.av

    @staticmethod
    def check(config: RlConfig, world_size: int) -> Prompts:
        for key in ("av", "ar", "data"):
            if not getattr(config, key):
                raise ConfigError(f"no {key}= for task nla", "an AV, an AR and their rl table", f"add {key}=...")
        task = NlaTask.open(config.data, "rl", config.av, config.curriculum)
        task.check_model(config.av, "av")
        task.check_model(config.ar, "ar")
        ar_shape = model_shape("ar", config.ar, task)
        check_directory(config.av, model_shape("av", config.av, task))
        check_directory(config.ar, ar_shape, with_head=False)
        check_vocabulary(Path(config.av), ar_shape.vocab_size)  # whose tokens the AR reads
        check_layout(ar_shape, beside_av(config.parallel), stages="ar_stages")
        check_lora(config.ar_lora, ar_shape, config.parallel, "ar_lora")
        if config.eval_every and config.held_out is None:
            raise ConfigError(
                f"eval_every={config.eval_every} without held_out", "a table of held-out rows", "add held_out="
            )
        tasks = [task]
        if config.held_out is not None:
            tasks.append(NlaTask.open(config.held_out, "rl", config.av))
            tasks[1].check_model(config.av, "av")
            if config.eval_every:
                check_rows(tasks[1], config.eval_rows, config.seed, "eval_rows")
        for each in tasks:
            Baseline.of(each)
        longest = max(len(each.prompt_ids) for each in tasks)
        return Prompts(task.table.n_rows, longest, ("mse", "d_model"))

    @staticmethod
    def alone(config: RlConfig) -> Callable[[RlConfig, World], None] | None:
        return None

    def make_reference(self) -> Reference:
        return copied(self.model, self.config.algorithm)

    def requests(self, rows: Sequence[int], step: int) -> list[PromptRequest]:
        # Further rounds of a step draw as steps beyond the run's end, each `steps` later than the one before.
        return self.task.requests(rows, self.config.seed, step, step % self.config.steps)

    def place(self, row: int) -> Mapping[str, Any]:
        return self.task.place(row)

    def batch(self, rollouts: Sequence[Rollout], step: int, fields: Mapping[str, Tensor]) -> Batch:
        rows = [rollout.row for rollout in rollouts]
        return self.task.response_batch(rows, [rollout.response_ids for rollout in rollouts], step, **fields)

    def measure(self, batch: RolloutBatch, step: int) -> Measured:
        texts = explanations_of(batch.rollouts)
        mse_N, _ = self.task.score(self.ar.rows, batch.rows, texts)
        width_N = torch.full_like(mse_N, self.task.table.d_model)
        return Measured(batch.rollouts, tuple(texts), {"mse": mse_N, "d_model": width_N})

    def learn(self, batch: RolloutBatch, measured: Measured, step: int) -> dict[str, float]:
        """The AR's optimizer steps, over the explanations in as many minibatches."""
        good = [index for index, text in enumerate(measured.texts) if text is not None]
        order = np.random.default_rng([self.config.seed, 3, step]).permutation(len(good))
        updates: list[Update] = []
        for part in np.array_split(order, self.config.ar_updates):
            chosen = [good[index] for index in part]
            if chosen:
                texts = [str(measured.texts[index]) for index in chosen]
                rows = self.task.text_batch([batch.rollouts[index].row for index in chosen], texts)
                updates.append(self.ar_loss.update(self.ar, rows, step))

        def mean(name: str) -> float:
            return sum(update.statistics[name] for update in updates) / max(1, len(updates))

        return {
            "batch_fve": self._batch_fve(batch, measured.values["mse"]),
            "extraction_failed": float(measured.failed.float().mean()),
            **{_AR_NAMES.get(name, name): mean(name) for name in self.ar_loss.names},
            "ar_grad_norm": updates[-1].grad_norm if updates else 0.0,
            "ar_skipped": sum(update.skipped for update in updates),
        }

    def _batch_fve(self, batch: RolloutBatch, mse_N: Tensor) -> float:
        """Compared with the mean of the training rows; where the table does not know it, with the variance of the
        step's rows, as an estimate without bias; NaN of a single row.
        """
        if self.baseline.mean_D is not None:
            return geometry.fve(mse_N, self.baseline.deviations(self.task, batch.rows))
        rows = list(dict.fromkeys(batch.rows))
        spread = geometry.variance(self.task.normalised_targets(rows), None) if len(rows) > 1 else 0.0
        return 1 - float(mse_N.mean()) / spread if spread else float("nan")

    def evaluate(self, engine: Sampler, step: int) -> dict[str, float]:
        """FVE on `eval_rows` held-out rows by the rule of `eval`, which gives the same of what is exported."""
        if self._measure is None:
            return {}
        task, rows, measure = self._measure
        rollouts = engine.generate(greedy(task.requests(rows, self.config.seed, step)), task.inputs, 1, step)
        mse_N, _ = task.score(self.ar.rows, rows, explanations_of(rollouts.rollouts))
        found, in_sample = measure.fve(mse_N), measure.fve_in_sample(mse_N)
        return {
            "eval_fve": found.value,
            "eval_fve_low": found.low,
            "eval_fve_high": found.high,
            "eval_fve_in_sample": in_sample,
        }

    def export(self) -> None:
        """The AV and the AR as Hugging Face directories with their sidecars."""
        config = self.config
        training = {
            "steps": config.steps,
            "prompts_per_step": config.batch_size,
            "samples_per_prompt": config.samples_per_prompt,
            "lr": config.optim.lr,
            "ar_lr": config.ar_optim.lr,
            "algorithm": config.algorithm.name,
            "kl_coef": config.algorithm.kl_coef,
            **lora_record(config.lora),
            **lora_record(config.ar_lora, "ar_lora"),
        }
        for role, source, model in (("av", config.av, self.model), ("ar", config.ar, self.ar.model)):
            parent = self.task.check_model(source, role)
            sidecar = descended(parent, "rl", source, self.task.sidecar.dataset_id, training)
            export(model, source, Path(config.out) / role, self.world, sidecar)
