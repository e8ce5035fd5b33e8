"""What the strengths of a steered model should be, where somebody knows; and what they are called.

Legend: N rows, S strengths of all interventions side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nla_megatron.config.options import bind
from nla_megatron.errors import ColumnError
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.strength import PredictorConfig
from nla_megatron.tasks.rows import question_of, read_rows
from nla_megatron.tasks.sae import OPTIONS, SaeOptions
from nla_megatron.tasks.text import PromptStyle

if TYPE_CHECKING:
    from torch import Tensor

    from nla_megatron.contract.tokenizer import AnyTokenizer

TARGETS = "target_strengths"


@dataclass(frozen=True)
class TargetRows:
    """Prompts (token ids) with the strengths (N, S) that they should have."""

    prompts: tuple[tuple[int, ...], ...]
    targets_NS: Tensor


def read_targets(
    path: str, options: SaeOptions, tokenizer: AnyTokenizer, count: int, config: PredictorConfig,
    key: str = "data",
) -> TargetRows:  # fmt: skip
    """The rows of a file with `target_strengths`.

    Args:
        count: S.
        config: whose range the targets must be in.
        key: of the configuration, for messages.

    Raises:
        MissingFile, ColumnError: no file, no such columns, no rows, or a row whose strengths are not S numbers that the
            predictor can reach.
    """
    import torch

    style = bind(PromptStyle, options.text_task.options.get("prompt", {}), f"{OPTIONS}.prompts.options.prompt")
    rows = read_rows(path, [options.prompt_column, TARGETS], key)
    if not rows:
        raise ColumnError(f"no rows in {path}", "prompts with target_strengths", f"correct {key}=")
    low, high = sorted((config.least * config.scale, config.most * config.scale))
    prompts, targets = [], []
    for row in rows:
        given = row[TARGETS]
        values = list(given) if isinstance(given, list | tuple) else [given]
        numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
        if len(numbers) != count or len(values) != count or not all(math.isfinite(each) for each in numbers):
            raise ColumnError(
                f"{TARGETS}={given!r} in {row.where}", f"{count} finite numbers, one per strength",
                f"write one for each feature of {OPTIONS}.interventions, in their order",
            )  # fmt: skip
        if not all(low < each < high for each in numbers):
            raise ColumnError(
                f"{TARGETS}={given!r} in {row.where}", f"strengths between {low:g} and {high:g}",
                "widen strength_min and strength_max, or raise strength_scale",
            )  # fmt: skip
        question = question_of(row, options.prompt_column)
        prompts.append(style.ids(tokenizer, question.text, question.before))
        targets.append([float(each) for each in numbers])
    return TargetRows(tuple(prompts), torch.tensor(targets))


def names_of(interventions: Sequence[Intervention]) -> list[str]:
    """Each of the S strengths, for logs and reports.

    Example:
        >>> names_of([Intervention(3, "clamp", sae="s", features=(17,)), Intervention("embedding", "global", sae="s")])
        ['block3_feature17', 'embedding_global']
    """
    names = []
    for each in interventions:
        place = each.place.replace(" ", "")
        names += [f"{place}_feature{feature}" for feature in each.features] or [f"{place}_{each.mode}"]
    repeated = len(set(names)) < len(names)
    # Two interventions may set the same feature at one place.
    return [f"{number}_{name}" for number, name in enumerate(names)] if repeated else names
