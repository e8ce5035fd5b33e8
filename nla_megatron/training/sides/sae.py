"""The side of the task `sae`: a frozen model answers, steered; how strongly is what learns.

Without steering it is the text task's own side, which trains the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from nla_megatron.config.schema import RlConfig
from nla_megatron.conversion.description import check_directory
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import ColumnError, ConfigError
from nla_megatron.interventions.checks import Marker
from nla_megatron.models.batching import Batch
from nla_megatron.models.builder import check_layout
from nla_megatron.models.strength_files import STEPS_PER_EPOCH, write_predictor
from nla_megatron.parallel.world import World
from nla_megatron.rollout.requests import PromptRequest
from nla_megatron.tasks.sae import OPTIONS, SaeOptions, check_model, check_steering, sae_options, without_steering
from nla_megatron.tasks.sae_rows import names_of
from nla_megatron.tasks.steering import compared, steered, steered_tokens
from nla_megatron.tasks.steering_report import strength_statistics, write_comparison
from nla_megatron.tasks.text import Data, TextTask, evaluation_rows, no_vectors, open_task
from nla_megatron.training.checkpoint import Stateful
from nla_megatron.training.reference import FrozenCopy, Reference
from nla_megatron.training.sampler import Sampler
from nla_megatron.training.sides import register
from nla_megatron.training.sides.base import Prompts
from nla_megatron.training.sides.held_out import held_out_rewards, terms_of_training_rows
from nla_megatron.training.sides.plain import PlainSide
from nla_megatron.training.steering import check_fit, fit, steered_policy
from nla_megatron.training.strengths import MovingPredictor, Unsteered
from nla_megatron.types import Measured, Rollout, RolloutBatch


@register("sae")
class SaeSide:
    """A text task's prompts for a steered model; see `training.sides.base.Side`."""

    marker: Marker | None = None
    model: Any = None
    vectors = staticmethod(no_vectors)

    def __new__(cls, config: RlConfig, world: World) -> Any:
        """Without steering, the side of the text task."""
        options = sae_options(config.task)
        return super().__new__(cls) if options.steering else PlainSide(without_steering(config, options), world)

    own_keys: ClassVar[tuple[str, ...]] = ("model", "lora")

    def __init__(self, config: RlConfig, world: World):
        self.config, self.world, self.directory = config, world, config.model
        self.options = sae_options(config.task)
        self.task, self.held_out = _tasks(config, self.options)
        self.tokenizer, self.n_rows = self.task.tokenizer, self.task.rows
        self.shape = read_shape(config.model)
        self.interventions = self.options.steered()
        self.policy = steered_policy(config, self.options, world)
        self.learners: Mapping[str, Stateful] = {"predictor": self.policy}
        self.names = names_of(self.interventions)

    @staticmethod
    def directory_of(config: RlConfig) -> str:
        return config.model

    @staticmethod
    def check(config: RlConfig, world_size: int) -> Prompts:
        options = sae_options(config.task)
        if not options.steering:
            return PlainSide.check(without_steering(config, options), world_size)
        if config.lora.rank:
            raise ConfigError(
                f"lora.rank={config.lora.rank} with steering", "a model that stays as it is",
                "drop lora=, or set task.options.steering=false",
            )  # fmt: skip
        if options.fixed_strengths:
            raise ConfigError(
                f"{OPTIONS}.fixed_strengths={list(options.fixed_strengths)} in a training", "a predictor that learns",
                "drop it: it is an option of eval",
            )  # fmt: skip
        check_model(config.model)
        shape = read_shape(config.model)
        check_layout(shape, config.parallel)
        interventions, form = check_steering(options, shape)
        check_directory(config.model, shape)
        if options.objective == "mse":
            return check_fit(config, options, interventions, form)
        task, held_out = _tasks(config, options)
        if config.eval_every and held_out is None:
            raise ConfigError(
                f"eval_every={config.eval_every} without held-out rows", "prompts that nobody trains on",
                "add held_out=, or options.held_out of the prompts",
            )  # fmt: skip
        if config.eval_every and (bound := terms_of_training_rows(config)):
            raise ConfigError(
                f"eval_every={config.eval_every} with the reward term {bound[0]!r}, which knows training rows alone",
                "a reward of held-out responses, steered and not", "set eval_every=0, or choose another reward",
            )  # fmt: skip
        limit = min(config.rollout.max_model_len, shape.max_positions)
        lengths = [
            each.check_length(config.rollout.max_new_tokens, limit) for each in (task, held_out) if each is not None
        ]
        return Prompts(task.rows, max(lengths), task.measures)

    @staticmethod
    def alone(config: RlConfig) -> Callable[[RlConfig, World], None] | None:
        """What runs in place of the loop: with the objective "mse" nothing is sampled."""
        options = sae_options(config.task)
        return fit if options.steering and options.objective == "mse" else None

    def make_reference(self) -> Reference:
        algorithm = self.config.algorithm
        if algorithm.reference == "ema":
            return MovingPredictor(self.policy.predictor, algorithm.reference_decay, self.world)
        return FrozenCopy(self.policy.predictor) if self.options.reference == "predictor" else Unsteered(self.policy)

    def requests(self, rows: Sequence[int], step: int) -> list[PromptRequest]:
        # Further rounds of a step draw the prompts of steps beyond the last one, and are steered as this one is.
        return self._steered(self.task.requests(rows, self.config.seed, step), step % self.config.steps)

    def _steered(self, requests: Sequence[PromptRequest], step: int | None) -> list[PromptRequest]:
        chosen = self.policy.strengths([request.prompt_ids for request in requests], step)
        return steered(requests, chosen, self.interventions)

    def place(self, row: int) -> Mapping[str, Any]:
        return self.task.place(row)

    def batch(self, rollouts: Sequence[Rollout], step: int, fields: Mapping[str, Tensor]) -> Batch:
        batch = self.task.batch(rollouts, fields)
        # Nobody but the policy steers: a critic that reads these rows reads them as they are.
        return replace(
            batch, prompt_lengths=[len(rollout.prompt_ids) for rollout in rollouts], only=[()] * len(rollouts),
            training_step=step,
        )  # fmt: skip

    def measure(self, batch: RolloutBatch, step: int) -> Measured:
        return self.task.measure(batch.rollouts)

    def learn(self, batch: RolloutBatch, measured: Measured, step: int) -> dict[str, float]:
        """Nothing learns beside the predictor; what its strengths are now, and how many tokens it steered."""
        counted = steered_tokens(self.interventions, batch.rollouts)
        # The engine stops the step where one token was left out; requests are what it counts.
        failed = batch.injections.expected - batch.injections.injected
        return {
            **self._strength_scalars(list(dict.fromkeys(rollout.prompt_ids for rollout in batch.rollouts)), step),
            "steered_tokens": float(counted),
            "steering_failed": float(failed),
        }

    def _strength_scalars(self, prompts: Sequence[tuple[int, ...]], step: int) -> dict[str, float]:
        chosen = self.policy.strengths(prompts, step)
        each = strength_statistics(chosen, self.names)
        overall = strength_statistics(chosen.reshape(-1, 1), ["all"])["all"]
        scalars = {f"strength_{key}": value for key, value in overall.items()}
        for name, values in each.items():
            scalars |= {f"strength_{key}/{name}": value for key, value in values.items()}
        return scalars

    def evaluate(self, engine: Sampler, step: int) -> dict[str, float]:
        """Rewards of held-out prompts with steering and without, sampled with the same seeds at every evaluation."""
        if self.held_out is None:
            return {}
        rows = evaluation_rows(self.held_out.rows, self.config.eval_rows, self.config.seed)
        plain = self.held_out.requests(rows, self.config.seed, 0)
        reward = held_out_rewards(self.config, self.n_rows, self.world)
        assert reward is not None, "refused by the check"
        comparison = compared(
            self.held_out,
            engine,
            self.interventions,
            self._steered(plain, None),
            step,
            reward,
            self.options.compare_samples,
        )
        if self.world.is_main:
            write_comparison(Path(self.config.out) / "steering", comparison)
        scalars = comparison.numbers()
        for name, values in comparison.strengths.items():
            scalars |= {f"eval_strength_{key}/{name}": value for key, value in values.items()}
        return scalars

    def export(self) -> None:
        """`predictor/`: weights, form and interventions. The model is as it was, and stays where it is."""
        if self.world.is_main:
            training = {
                "steps": self.config.steps, "lr": self.config.optim.lr, "objective": self.options.objective,
                STEPS_PER_EPOCH: self.n_rows / self.config.batch_size,
            }  # fmt: skip
            write_predictor(
                Path(self.config.out) / "predictor", self.policy.predictor, self.interventions, self.directory, training
            )


def _tasks(config: RlConfig, options: SaeOptions) -> tuple[TextTask, TextTask | None]:
    """The text task on the rows to train on, and on those to compare on where there are any.

    Raises:
        ColumnError: no prompts.
    """
    given = Data(config.data, config.held_out or "")
    task = open_task(options.text_task, given, config.model, config.seed)
    if task is None or not task.rows:
        raise ColumnError(f"no prompts in data={config.data!r}", "at least one", "correct data=")
    return task, open_task(options.text_task, replace(given, training=False), config.model, config.seed)
