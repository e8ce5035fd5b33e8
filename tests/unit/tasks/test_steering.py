"""Both sides of a comparison: what requests carry, and that responses stay in pairs over any number of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nla_megatron.config.schema import TaskConfig
from nla_megatron.interventions.spec import Intervention
from nla_megatron.rollout.requests import PromptRequest, Vectors
from nla_megatron.tasks.steering import compared, steered, steered_tokens
from nla_megatron.tasks.text import Data, TextTask, open_task
from nla_megatron.types import InjectionCount, Measured, Rollout, RolloutBatch
from tests.support.tiny import tiny_tokenizer

PLACES = (
    Intervention(3, "features", "generated", sae="s", features=(4, 9)),
    Intervention(1, "global", "all", sae="s"),
)
PROMPTS = 600


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TextTask:
    folder = tmp_path_factory.mktemp("task")
    tiny_tokenizer(folder / "model")
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "Row {number}"}}\n' for number in range(PROMPTS)))
    found = open_task(
        TaskConfig("lexical"), Data(held_out=str(folder / "rows.jsonl"), training=False), str(folder / "model"), 0
    )
    assert found is not None
    return found


class Written:
    """A sampler whose responses tell the row, the sample and the request's last strength; it steers what is asked."""

    def __init__(self) -> None:
        self.changed = 0

    def generate(
        self, requests: Sequence[PromptRequest], vectors: Vectors, samples: int, training_step: int = 0
    ) -> RolloutBatch:
        rollouts = []
        for each in requests:
            strength = 0 if each.strengths is None else int((each.strengths[1] or (0,))[0])
            for sample in range(samples):
                ids = (each.row, sample, strength, *(5,) * sample)
                rollouts.append(
                    Rollout(each.group, sample, each.row, each.prompt_ids, ids, (0.0,) * len(ids), "a b a", True)
                )
        self.changed = steered_tokens(PLACES, rollouts) if requests[0].only is None else 0
        return RolloutBatch(tuple(rollouts), InjectionCount(len(rollouts), len(rollouts)))

    def changed_tokens(self) -> int:
        return self.changed


def told(measured: Measured, step: int) -> torch.Tensor:
    """A reward that says which response it is of."""
    ids = [rollout.response_ids for rollout in measured.rollouts]
    return torch.tensor([1000.0 * row + 100 * sample + strength for row, sample, strength, *_ in ids])


def test_requests_carry_each_interventions_own_strengths(task: TextTask) -> None:
    requests = steered(task.requests([3, 8], 0, 0), torch.tensor([[0.5, -1.0, 2.0], [1.0, 2.0, 3.0]]), PLACES)
    assert [each.strengths for each in requests] == [((0.5, -1.0), (2.0,)), ((1.0, 2.0), (3.0,))]
    assert [each.row for each in requests] == [3, 8]


def test_responses_stay_in_pairs_over_more_prompts_than_are_asked_at_once(task: TextTask) -> None:
    rows = list(range(PROMPTS))[::-1]
    strengths = torch.tensor([[0.0, 0.0, float(1 + row % 7)] for row in rows])
    advanced: list[int] = []
    found = compared(
        task, Written(), PLACES, steered(task.requests(rows, 0, 0), strengths, PLACES), 4, told, 2, advanced.append
    )
    assert found.rows == tuple(row for row in rows for _ in range(2)) and found.samples == (0, 1) * PROMPTS
    assert found.failed == 0 < found.applied
    assert found.step == 5 and sum(advanced) == 2 * PROMPTS and len(advanced) > 2
    assert found.steered.rewards == tuple(
        1000.0 * row + 100 * sample + 1 + row % 7 for row in rows for sample in range(2)
    )
    assert found.plain.rewards == tuple(1000.0 * row + 100 * sample for row in rows for sample in range(2))
    assert found.prompts[:3] == ("Row 599", "Row 599", "Row 598")
    assert (found.figure, found.steered.values[0]) == ("richness", pytest.approx(2 / 3))


def test_every_steered_token_is_counted_on_the_steered_side_alone(task: TextTask) -> None:
    requests = steered(task.requests([3, 8], 0, 0), torch.ones(2, 3), PLACES)
    found = compared(task, Written(), PLACES, requests, 0, None, 1)
    prompts = sum(len(each.prompt_ids) for each in requests)
    # Of three tokens two are inputs: both interventions change them, and the second one the prompts too.
    assert (found.applied, found.failed) == (2 * 2 * 2 + prompts, 0) and found.steered.rewards is None
    lazy: Any = Written()
    lazy.changed_tokens = lambda: 5
    assert compared(task, lazy, PLACES, requests, 0, None, 1).failed == 2 * 2 * 2 + prompts - 5
