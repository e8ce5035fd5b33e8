"""Tasks of a plain language model: the policy learns alone, and what is measured is text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from nla_megatron.config.schema import RlConfig
from nla_megatron.contract.files import write_json_lines
from nla_megatron.contract.journal import read_rows
from nla_megatron.conversion.description import check_directory
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_from_hf
from nla_megatron.errors import ConfigError
from nla_megatron.interventions.checks import Marker
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch
from nla_megatron.models.verbalizer import build_verbalizer
from nla_megatron.parallel.world import World
from nla_megatron.rollout.requests import PromptRequest, Vectors
from nla_megatron.tasks.text import Data, TextTask, evaluation_rows, no_vectors, open_task
from nla_megatron.training.checkpoint import Stateful
from nla_megatron.training.export import export
from nla_megatron.training.lora import adapt
from nla_megatron.training.module import TrainModule
from nla_megatron.training.reference import Reference, copied
from nla_megatron.training.sampler import Sampler
from nla_megatron.training.sides import register
from nla_megatron.training.sides.base import Policy, Prompts
from nla_megatron.training.sides.held_out import held_out_rewards
from nla_megatron.types import Measured, Rollout, RolloutBatch

EXAMPLES = 8
"""Held-out prompts whose responses are kept at every evaluation."""
_EVAL_STEP = 0


@register("math")
@register("lexical")
class PlainSide:
    """A text task and a language model; see `sides.base.Side`.

    `evaluate` writes `evaluations/step_*.jsonl`, responses to the same few held-out prompts each time, and
    `before_after.jsonl`, the first and the last of them side by side.
    """

    interventions: tuple[Intervention, ...] = ()
    marker: Marker | None = None

    own_keys: ClassVar[tuple[str, ...]] = ("model", "lora")

    def __init__(self, config: RlConfig, world: World):
        self.config, self.world, self.directory = config, world, config.model
        self.task, self.held_out = _open(config)
        self.tokenizer = self.task.tokenizer
        self.n_rows = self.task.rows
        self.vectors: Vectors = no_vectors
        self.shape = read_shape(config.model)
        self.model: Any = build_verbalizer(self.shape, world, config.dtype, config.lora.quantize)
        load_from_hf(self.model, config.model, self.shape, world, with_head=True)
        adapt(self.model, config.lora, world, config.seed)
        self.policy: Policy = TrainModule(
            self.model, world, config.optim, config.steps, config.micro_batch_size, config.dtype
        )
        self.learners: Mapping[str, Stateful] = {"policy": self.policy}

    @staticmethod
    def directory_of(config: RlConfig) -> str:
        return config.model

    @staticmethod
    def check(config: RlConfig, world_size: int) -> Prompts:
        """Everything that can be known before the first step.

        Raises:
            ConfigError, MissingFile, ColumnError, LayoutError, UnsupportedModel.
        """
        if not config.model:
            raise ConfigError(
                f"no model for the task {config.task.name}", "a Hugging Face directory", "add model=DIRECTORY"
            )
        task, held_out = _open(config)
        if config.eval_every and held_out is None:
            raise ConfigError(
                f"eval_every={config.eval_every} without held-out rows", "rows that nobody trains on",
                "add held_out=, or task.options.held_out",
            )  # fmt: skip
        shape = read_shape(config.model)
        limit = min(config.rollout.max_model_len, shape.max_positions)
        longest = task.check_length(config.rollout.max_new_tokens, limit)
        if held_out is not None:
            held_out.check_length(config.rollout.max_new_tokens, limit)
        check_directory(config.model, shape)
        return Prompts(task.rows, longest, task.measures)

    @staticmethod
    def alone(config: RlConfig) -> Callable[[RlConfig, World], None] | None:
        return None

    def make_reference(self) -> Reference:
        return copied(self.model, self.config.algorithm)

    def requests(self, rows: Sequence[int], step: int) -> list[PromptRequest]:
        # Further draws of one step are counted on beyond the run's end, where no curriculum should be.
        return self.task.requests(rows, self.config.seed, step, at=step % self.config.steps)

    def place(self, row: int) -> Mapping[str, Any]:
        return self.task.place(row)

    def batch(self, rollouts: Sequence[Rollout], step: int, fields: Mapping[str, Tensor]) -> Batch:
        return self.task.batch(rollouts, fields)

    def measure(self, batch: RolloutBatch, step: int) -> Measured:
        return self.task.measure(batch.rollouts)

    def learn(self, batch: RolloutBatch, measured: Measured, step: int) -> dict[str, float]:
        """Nothing learns beside the policy."""
        return {}

    def evaluate(self, engine: Sampler, step: int) -> dict[str, float]:
        """The task's figures, and the reward, of one response to each of `eval_rows` held-out rows.

        Responses are sampled as in training, at its temperature, with the same seeds at every evaluation, so that two
        evaluations differ by the policy alone.
        """
        if self.held_out is None:
            return {}
        rows = evaluation_rows(self.held_out.rows, self.config.eval_rows, self.config.seed)
        requests = self.held_out.requests(rows, self.config.seed, _EVAL_STEP)
        measured = self.held_out.measure(engine.generate(requests, no_vectors, 1, training_step=step).rollouts)
        figures, reward = self.held_out.figures(measured), held_out_rewards(self.config, self.n_rows, self.world)
        rewards = None if reward is None else reward(measured, step)
        if rewards is not None:
            figures["reward"] = float(rewards.mean())
        if self.world.is_main:
            examples = [self.held_out.example(measured, index) for index in range(min(EXAMPLES, len(rows)))]
            if rewards is not None:
                examples = [{**one, "reward": value} for one, value in zip(examples, rewards.tolist(), strict=False)]
            keep_examples(Path(self.config.out), step + 1, examples)
        return {f"eval_{name}": float(value) for name, value in figures.items() if isinstance(value, int | float)}

    def export(self) -> None:
        export(self.model, self.config.model, Path(self.config.out) / "hf", self.world)


def _open(config: RlConfig) -> tuple[TextTask, TextTask | None]:
    """The task on the rows to train on, and on those to evaluate on where there are any."""
    given = Data(config.data, config.held_out or "")
    task = open_task(config.task, given, config.model, config.seed)
    assert task is not None, "only held-out rows may be absent"
    return task, open_task(config.task, replace(given, training=False), config.model, config.seed)


def keep_examples(out: Path, done: int, examples: Sequence[Mapping[str, Any]]) -> None:
    """Write the examples of an evaluation after `done` steps, and those of the first and the last one side by side."""
    folder = out / "evaluations"
    write_json_lines(folder / f"step_{done:08d}.jsonl", [{"step": done, **example} for example in examples])
    files = sorted(folder.glob("step_*.jsonl"))
    before, after = (read_rows(file, ("prompt",)) for file in (files[0], files[-1]))
    pairs = [
        {
            **{key: first[key] for key in ("row",) if key in first},
            "prompt": first["prompt"],
            "before": first,
            "after": last,
        }
        for first, last in zip(before, after, strict=False)
        if first["prompt"] == last["prompt"]
    ]
    write_json_lines(out / "before_after.jsonl", pairs)
