"""A model's judgement of each response by a rubric, through the Anthropic Messages API. Shapes: N rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import MISSING
from torch import Tensor

from nla_megatron.config.schema.checks import ascending
from nla_megatron.errors import ConfigError, RewardError
from nla_megatron.judging import REFERENCE, RUBRIC, TEXT, Judge, JudgeEndpoint, between
from nla_megatron.rewards.terms import Term, register
from nla_megatron.types import Measured, Scores


@dataclass(frozen=True)
class JudgeOptions(JudgeEndpoint):
    """Who judges, by what."""

    rubric: str = MISSING
    """What makes a text good, in words."""
    low: int = 1
    """The worst score."""
    high: int = 10
    """The best score."""
    with_reference: bool = False
    """Whether the judge sees the reference that the task has for each row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rubric.strip():
            raise ConfigError(f"rubric={self.rubric!r}", "what makes a text good", "write a rubric")
        ascending("low", self.low, "high", self.high)


@register("judge")
class Judged(Term):
    """(score - low) / (high - low), from 0 to 1; a malformed response is not shown to the judge and gets 0.

    Equal texts of a step are asked for once. A judgement fails where the API does not answer, or not with one integer
    of the scale between its tags; its rollout gets the mean of those judged in its group (of the step, where there are
    none), so that it has no advantage, and is counted in the part `failed`.

    Raises:
        ConfigError: no key in the environment.
        ProviderError: a refusal that holds for every text, or more failures than `max_failures`.
    """

    once = True
    options: JudgeOptions

    def __init__(self, options: JudgeOptions):
        super().__init__(options)
        what = TEXT + (REFERENCE if options.with_reference else "")
        system = RUBRIC.format(rubric=options.rubric.strip(), what=what, low=options.low, high=options.high)
        self._judge = Judge(options, system, options.low, options.high, "choose another reward term")

    def __call__(self, measured: Measured) -> Scores:
        turns = [None if text is None else self._turn(measured, i) for i, text in enumerate(measured.texts)]
        scores = self._judge.integers(list(dict.fromkeys(turn for turn in turns if turn is not None)))
        known = [None if turn is None else scores.get(turn) for turn in turns]
        failed_N = torch.tensor([turn is not None and score is None for turn, score in zip(turns, known, strict=True)])
        width = self.options.high - self.options.low
        rewards = [0.0 if score is None else (score - self.options.low) / width for score in known]
        judged_N = torch.tensor([score is not None for score in known])
        filled_N = _filled(torch.tensor(rewards), judged_N, failed_N, measured.groups)
        return Scores(filled_N, {"failed": failed_N.float()})

    def _turn(self, measured: Measured, index: int) -> str:
        """What the judge is shown of a rollout."""
        text = between("text", str(measured.texts[index]))
        if not self.options.with_reference:
            return text
        reference = measured.references[index] if index < len(measured.references) else None
        if reference is None:
            raise RewardError(
                f"the reward term {self.name!r} has no reference for rollout {index}", "one from the task",
                "set with_reference to false, or choose a task that has references",
            )  # fmt: skip
        return f"{text}\n{between('reference', reference)}"


def _filled(rewards_N: Tensor, judged_N: Tensor, failed_N: Tensor, groups_N: Tensor) -> Tensor:
    """Failed ones with the mean of the judged ones of their group, of the step where their group has none."""
    filled_N = rewards_N.clone()
    for index in failed_N.nonzero().flatten().tolist():
        own = judged_N & (groups_N == groups_N[index])
        filled_N[index] = rewards_N[own if bool(own.any()) else judged_N].mean()
    return filled_N
