"""The task `math`: a problem, a thinking block, an answer in a box, and whether that is the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nla_megatron.config.options import bind
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.errors import ConfigError
from nla_megatron.tasks.math.answers import equal
from nla_megatron.tasks.math.curriculum import Mixture, Source, Stage
from nla_megatron.tasks.math.problems import make_provider
from nla_megatron.tasks.math.responses import Tags, read_response
from nla_megatron.tasks.text import Data, PromptStyle, TextTask, register, spread
from nla_megatron.types import Measured, Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from nla_megatron.contract.tokenizer import AnyTokenizer

_OPTIONS = "task.options"
DEFAULT_PROMPT: dict[str, Any] = {
    "template": "{prompt}\n\nThink step by step between <think> and </think>, once. Then write only the final answer, "
    "inside \\boxed{}.",
    "plain": "Problem: {prompt}\nThinking goes between <think> and </think>, the final answer inside \\boxed{}.\n",
}


@dataclass(frozen=True)
class MathOptions:
    """Options of the task `math`.

    `provider`: gsm8k, hendrycks_math, table, generated, or a class by import path; it reads `data` unless
    `provider_options` have a path or a hub. `sources`: several providers by name, in its place: each with `provider`,
    `options` and `weight`. `stages`: other weights from a step or an epoch on (`from_step` or `from_epoch`, `weights`);
    `blend`: move between them linearly. `held_out`: provider and options of the rows to evaluate on, where they are no
    file in the key of the command. `answers`: which parse "correct" is read with, lenient or strict.
    """

    provider: str = "gsm8k"
    provider_options: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    blend: bool = False
    held_out: dict[str, Any] = field(default_factory=dict)
    answers: str = "lenient"
    think_open: str = "<think>"
    think_close: str = "</think>"
    prompt: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.answers not in ("lenient", "strict"):
            raise ConfigError(f"answers={self.answers!r}", "lenient or strict", "set answers to one of them")
        if not self.think_open or not self.think_close or self.think_open == self.think_close:
            raise ConfigError(
                f"think_open={self.think_open!r} and think_close={self.think_close!r}", "two different tags",
                "set both",
            )  # fmt: skip
        if self.stages and len(self.sources) < 2:
            raise ConfigError(f"stages with {len(self.sources)} sources", "two sources or more", "add sources, by name")


@register("math")
class MathTask(TextTask):
    """Problems of one provider or of a curriculum of several.

    Measured: `texts` are the boxed answers of responses in the strict format (see `responses`), `references` what they
    are compared with; `values` are `correct`, `format`, `answer_found` (each 0 or 1) and `thinking_tokens`; `counts`
    has `references_unreadable`, how many problems were left out for their reference.
    """

    measures = ("correct", "format", "answer_found", "thinking_tokens")

    def __init__(self, tokenizer: AnyTokenizer, options: MathOptions, problems: Mixture):
        style = bind(PromptStyle, {**DEFAULT_PROMPT, **options.prompt}, f"{_OPTIONS}.prompt")
        super().__init__(tokenizer, style)
        self.options, self.problems = options, problems
        ending = self.tokenizer.decode(self.prompt_ids(0)).rstrip()
        self.tags = Tags(options.think_open, options.think_close, ending.endswith(options.think_open))

    @classmethod
    def open(cls, options: Mapping[str, Any], data: Data, model: str, seed: int) -> MathTask | None:
        bound = bind(MathOptions, options, _OPTIONS)
        if not data.training and not data.held_out and not bound.held_out:
            return None
        problems = _mixture(bound, data.data, seed) if data.training else _held_out(bound, data.held_out)
        task = cls(load_tokenizer(model), bound, problems)
        if any(getattr(source, "conversations", False) for source in problems.sources):
            task.style.ids(task.tokenizer, "", (("user", ""),))  # a model that cannot take them is named before a step
        return task

    @property
    def rows(self) -> int:
        return len(self.problems)

    def text(self, row: int) -> str:
        return self.problems.problem(row).question

    def before(self, row: int) -> Sequence[tuple[str, str]]:
        return self.problems.problem(row).before

    def place(self, row: int) -> Mapping[str, Any]:
        return self.problems.problem(row).place

    def chosen(self, rows: Sequence[int], step: int, at: int) -> list[int]:
        return self.problems.choose(rows, step, at)

    def measure(self, rollouts: Sequence[Rollout]) -> Measured:
        readings = [read_response(self.response_text(each), self.tags, each.finished) for each in rollouts]
        references = [self.problems.problem(each.row).reference or "" for each in rollouts]
        answers = [each.strict if self.options.answers == "strict" else each.lenient for each in readings]
        pairs = zip(answers, references, strict=True)
        values = {
            "correct": [answer is not None and equal(answer, reference) for answer, reference in pairs],
            "format": [each.strict is not None for each in readings],
            "answer_found": [each.lenient is not None for each in readings],
            "thinking_tokens": [self._tokens(each.thinking) for each in readings],
        }
        return Measured(
            rollouts=tuple(rollouts),
            texts=tuple(each.strict for each in readings),
            values={name: torch.tensor(numbers, dtype=torch.float32) for name, numbers in values.items()},
            references=tuple(references),
            counts={"references_unreadable": float(self.problems.unreadable)},
        )

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text)) if text else 0

    def figures(self, measured: Measured) -> dict[str, Any]:
        """`accuracy`, `accuracy_strict` (right and in the format), `format_rate`, `answer_found`, `truncated`, lengths
        in tokens, `pass_at_k` where prompts have several samples, and the accuracy of each level and each source.
        """
        values, rollouts = measured.values, measured.rollouts
        correct = values["correct"]
        samples = min(_samples(measured).values())
        powers = [2**power for power in range(samples.bit_length())]
        levels = [self.problems.problem(each.row).level for each in rollouts]
        sources = [self.problems.names[self.problems.source_of(each.row)] for each in rollouts]
        return {
            "accuracy": float(correct.mean()),
            "accuracy_strict": float((correct * values["format"]).mean()),
            "format_rate": float(values["format"].mean()),
            "answer_found": float(values["answer_found"].mean()),
            "truncated": sum(not each.finished for each in rollouts) / len(rollouts),
            **spread(values["thinking_tokens"].tolist(), "thinking_tokens"),
            **spread([len(each.response_ids) for each in rollouts], "response_tokens"),
            "references_unreadable": self.problems.unreadable,
            **({f"pass_at_{k}": pass_at(measured, k) for k in powers} if samples > 1 else {}),
            **({"accuracy_by_level": _by(levels, correct.tolist())} if any(levels) else {}),
            **({"accuracy_by_source": _by(sources, correct.tolist())} if len(self.problems.names) > 1 else {}),
        }

    def main(self, measured: Measured) -> tuple[str, Tensor]:
        return "accuracy", measured.values["correct"]

    def example(self, measured: Measured, index: int) -> dict[str, Any]:
        rollout = measured.rollouts[index]
        problem = self.problems.problem(rollout.row)
        return {
            "row": rollout.row,
            **problem.place,
            **({"before": [list(turn) for turn in problem.before]} if problem.before else {}),
            "prompt": problem.question,
            "response": self.response_text(rollout),
            "reference": measured.references[index],
            "answer": measured.texts[index],
            "level": problem.level,
            "subject": problem.subject,
            "finished": rollout.finished,
            **{name: float(values[index]) for name, values in measured.values.items()},
        }


def _mixture(options: MathOptions, data: str, seed: int) -> Mixture:
    given = options.sources or {"data": {"provider": options.provider, "options": options.provider_options}}
    sources = {name: bind(Source, _mapping(value, name), f"{_OPTIONS}.sources.{name}") for name, value in given.items()}
    providers = {
        name: make_provider(source.provider, _with_data(source.provider, source.options, data))
        for name, source in sources.items()
    }
    stages = [bind(Stage, _mapping(stage, "stages"), f"{_OPTIONS}.stages") for stage in options.stages]
    weights = {name: source.weight for name, source in sources.items()}
    return Mixture(providers, weights, stages, options.blend, seed)


def _held_out(options: MathOptions, data: str) -> Mixture:
    """Rows to evaluate on: another file of the training rows' provider, or a source of the options' own."""
    where = f"{_OPTIONS}.held_out"
    # Where the training rows are is not where these are.
    own = {key: value for key, value in options.provider_options.items() if key not in ("path", "hub", "limit")}
    source = bind(Source, {"provider": options.provider, "options": own, **options.held_out}, where)
    provider = make_provider(source.provider, {**source.options, "path": data} if data else source.options, where)
    return Mixture({"held_out": provider}, {"held_out": 1.0})


def _with_data(provider: str, options: Mapping[str, Any], data: str) -> dict[str, Any]:
    """A provider's options with `data` as its path, where it reads a file and none is named."""
    own = provider == "generated" or not data or "path" in options or "hub" in options
    return dict(options) if own else {**options, "path": data}


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{_OPTIONS}: {name} is {value!r}", "keys with values", "see docs/configuration.md")
    return dict(value)


def _samples(measured: Measured) -> dict[int, int]:
    counts: dict[int, int] = {}
    for rollout in measured.rollouts:
        counts[rollout.group] = counts.get(rollout.group, 0) + 1
    return counts


def pass_at(measured: Measured, k: int) -> float:
    """The chance that one of k samples of a prompt is right, averaged over prompts: without bias, from n >= k samples
    of which c are right, 1 - C(n-c, k) / C(n, k) (Chen et al., 2021, https://arxiv.org/abs/2107.03374, eq. 1).
    """
    from math import comb

    sizes, right = _samples(measured), dict.fromkeys(_samples(measured), 0)
    for rollout, correct in zip(measured.rollouts, measured.values["correct"].tolist(), strict=True):
        right[rollout.group] += int(correct)
    chances = [1 - comb(n - right[group], k) / comb(n, k) for group, n in sizes.items()]
    return sum(chances) / len(chances)


def _by(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Mean of the values under each name, in the names' order."""
    return {
        name: sum(mine) / len(mine)
        for name in sorted(set(names))
        if (mine := [value for each, value in zip(names, values, strict=True) if each == name])
    }
