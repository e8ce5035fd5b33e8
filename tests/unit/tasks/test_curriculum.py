"""Which blocks and strengths a training step injects with, and that everything else injects as the table records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import CurriculumConfig
from nla_megatron.contract.sidecar import InjectionSpec, ProjectionSpec, read_dataset_sidecar, write_dataset_sidecar
from nla_megatron.errors import ConfigError
from nla_megatron.interventions.spec import Intervention
from nla_megatron.tasks.curriculum import Condition, Curriculum
from nla_megatron.tasks.nla import NlaTask
from tests.support.tiny import tiny_table

INJECTION = InjectionSpec("norm_add", 1, 2.0)


def factors(curriculum: Curriculum, steps: range) -> list[float]:
    found = [curriculum.at(step).strengths for step in steps]
    return [1.0 if each is None or each[0] is None else each[0][0] for each in found]


def test_without_one_every_step_injects_as_recorded() -> None:
    curriculum = Curriculum.of(INJECTION, CurriculumConfig())
    assert curriculum.interventions == (Intervention(1, "norm_add", strength=2.0),)
    assert curriculum.at(0) == curriculum.at(None) == Condition()


def test_strength_leads_from_the_start_to_the_recorded_one_and_stays() -> None:
    linear = Curriculum.of(INJECTION, CurriculumConfig("linear", 3.0, steps=4))
    assert factors(linear, range(7)) == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0]
    cosine = Curriculum.of(INJECTION, CurriculumConfig("cosine", 0.0, steps=4))
    assert factors(cosine, range(6)) == pytest.approx([(1 - math.cos(math.pi * min(n, 4) / 4)) / 2 for n in range(6)])
    assert linear.at(None) == linear.at(4) == Condition()


def test_blocks_come_in_turn_for_equal_parts_and_then_the_recorded_ones() -> None:
    curriculum = Curriculum.of(replace(INJECTION, layers=(1, 0)), CurriculumConfig(layers=[3, 1, -1], steps=6))
    assert [each.layer for each in curriculum.interventions] == [1, 0, 3, "embedding"]
    assert [curriculum.at(step).only for step in range(8)] == [(2,), (2,), (0,), (0,), (3,), (3,), (0, 1), (0, 1)]
    assert curriculum.at(None) == Condition(only=(0, 1))


def test_strength_and_blocks_may_change_together() -> None:
    curriculum = Curriculum.of(INJECTION, CurriculumConfig("linear", 2.0, [3], steps=2))
    assert curriculum.at(1) == Condition(only=(1,), strengths=((1.5,), (1.5,)))
    assert curriculum.at(2) == Condition(only=(0,))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "square", "start": 2.0, "steps": 3}, "curriculum.kind='square'"),
        ({"kind": "linear", "start": 1.0, "steps": 3}, "curriculum.start=1.0"),
        ({"kind": "constant", "start": 2.0, "steps": 3}, "curriculum.start=2.0"),
        ({"kind": "linear", "start": -1.0, "steps": 3}, "curriculum.start=-1.0"),
        ({"kind": "linear", "start": 2.0}, "curriculum.steps=0"),
        ({"steps": 3}, "curriculum.steps=3"),
        ({"layers": [1, 2, 3], "steps": 2}, "curriculum.steps=2"),
        ({"layers": [-2], "steps": 2}, "curriculum.layers=-2"),
    ],
)
def test_a_curriculum_that_cannot_be_meant_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CurriculumConfig(**options)
    assert told in caught.value.found


def test_blocks_that_the_model_lacks_and_a_norm_of_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"curriculum.layers=\[4\]"):
        Curriculum.of(INJECTION, CurriculumConfig(layers=[4], steps=2), num_layers=4)
    with pytest.raises(ConfigError, match="curriculum.start=0"):
        Curriculum.of(InjectionSpec("replace", 1, 2.0), CurriculumConfig("linear", 0.0, steps=2))


def test_a_projection_follows_a_strength_and_no_blocks() -> None:
    injection = InjectionSpec("project", 1, 2.0, None, ProjectionSpec("replace", 2))
    curriculum = Curriculum.of(injection, CurriculumConfig("linear", 3.0, steps=2))
    assert curriculum.interventions == (Intervention(1, "project", strength=2.0, then="replace", projection_layers=2),)
    assert curriculum.at(1) == Condition(None, ((2.0,),))
    with pytest.raises(ConfigError, match=r"curriculum.layers=\[2\]"):
        Curriculum.of(injection, CurriculumConfig(layers=[2], steps=2))
    with pytest.raises(ConfigError, match="curriculum.start=0"):
        Curriculum.of(injection, CurriculumConfig("linear", 0.0, steps=2))


@pytest.mark.parametrize("command", ["sft role=av model=m", "rl av=m ar=m"])
def test_training_never_ends_on_another_injection_than_it_records(command: str) -> None:
    name, *required = command.split()
    overrides = [*required, "data=d", "out=o", "curriculum.kind=linear", "curriculum.start=2", "curriculum.steps=5"]
    assert compose(name, [*overrides, "steps=6"]).curriculum.steps == 5
    with pytest.raises(ConfigError, match="curriculum.steps=5 of steps=5"):
        compose(name, [*overrides, "steps=5"])


def test_requests_and_rows_of_a_step_carry_the_same_injection(model_dir: Path, tmp_path: Path) -> None:
    data = tiny_table(tmp_path / "rl.parquet", model_dir, "rl")
    write_dataset_sidecar(data, replace(read_dataset_sidecar(data), injection=replace(INJECTION, layers=(1, 3))))
    task = NlaTask.open(str(data), "rl", str(model_dir), CurriculumConfig("linear", 3.0, [0], steps=4))
    assert [each.layer for each in task.interventions] == [1, 3, 0]
    for step, condition in ((2, Condition((2,), ((2.0,),) * 3)), (4, Condition((0, 1))), (None, Condition((0, 1)))):
        [request] = task.requests([5], 0, 0, step)
        batch = task.response_batch([5], [[7, 8]], step)
        assert (request.only, request.strengths) == (condition.only, condition.strengths)
        assert batch.only == [condition.only]
        assert batch.strengths == (None if condition.strengths is None else [condition.strengths])
