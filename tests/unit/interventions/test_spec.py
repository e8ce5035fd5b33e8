"""Interventions as data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nla_megatron.errors import ConfigError
from nla_megatron.interventions.schedules import Schedule
from nla_megatron.interventions.spec import EMBEDDING, Intervention

SAE = {"sae": "saes/layer_12", "features": (7, 3)}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mode": "rotate"}, "mode='rotate'"),
        ({"where": "marker"}, "where='marker'"),
        ({"layer": -1}, "layer=-1"),
        ({"layer": "lm_head"}, "layer='lm_head'"),
        ({"layer": True}, "layer=True"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": 0.0}, "strength=0"),
        ({"mode": "replace", "strength": -1.0}, "strength=-1.0 of replace"),
        ({"mode": "project", "then": "replace", "strength": 0.0}, "strength=0.0 of replace"),
        ({"mode": "project", "then": "project"}, "then='project'"),
        ({"vectors": 0}, "vectors=0 of norm_add at 'positions'"),
        ({"vectors": 3, "fewest": 0}, "fewest=0 of vectors=3"),
        ({"vectors": 3, "fewest": 3}, "fewest=3 of vectors=3"),
        ({"fewest": 1}, "fewest=1 of vectors=1"),
        ({"vectors": 2, "where": "prompt"}, "vectors=2 of norm_add at 'prompt'"),
        ({"vectors": 2, "mode": "global", "sae": "x"}, "vectors=2 of global"),
        ({"mode": "project", "projection_layers": 0}, "projection_layers=0"),
        ({"mode": "project", "vector_width": 0}, "vector_width=0"),
        ({"mode": "add", "vector_width": 64}, "vector_width=64"),
        ({"mode": "features", "features": (1,)}, "sae=None"),
        ({"mode": "add", "sae": "x"}, "sae='x'"),
        ({"mode": "clamp", "sae": "x"}, "0 features"),
        ({"mode": "global", **SAE}, "2 features"),
        ({"mode": "features", "sae": "x", "features": (3, 3)}, "features=[3, 3]"),
        ({"mode": "features", "sae": "x", "features": (-3,)}, "features=[-3]"),
        ({"mode": "features", **SAE, "max_acts": (1.0,)}, "1 max_acts for 2 features"),
        ({"mode": "features", **SAE, "max_acts": (1.0, 0.0)}, "max_acts=[1.0, 0.0]"),
    ],
)
def test_an_intervention_that_cannot_be_meant_is_refused(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match="expected") as error:
        Intervention(**{"layer": 1, **wrong})
    assert named in error.value.found


@pytest.mark.parametrize(
    ("intervention", "formula", "vectors", "strengths", "place"),
    [
        (Intervention(1), "norm_add", True, 1, "block 1"),
        (Intervention(EMBEDDING, "replace", strength=150.0), "replace", True, 1, "embedding"),
        (Intervention(0, "project", then="add", vector_width=64), "add", True, 1, "block 0"),
        (Intervention(12, "features", "all", **SAE), "features", False, 2, "block 12"),
        (Intervention(12, "clamp", "generated", strength=0.0, **SAE), "clamp", False, 2, "block 12"),
        (Intervention(12, "global", "prompt", sae="x"), "global", False, 1, "block 12"),
    ],
)
def test_an_intervention_knows_what_it_needs_and_survives_json(
    intervention: Intervention, formula: str, vectors: bool, strengths: int, place: str
) -> None:
    assert (intervention.formula, intervention.takes_vectors) == (formula, vectors)
    assert (intervention.num_strengths, intervention.place) == (strengths, place)
    assert Intervention.from_dict(json.loads(json.dumps(intervention.to_dict()))) == intervention


def test_a_request_s_strengths_are_multiplied_by_strength_and_the_training_schedule() -> None:
    half = Schedule("linear", "training", 1.0, 0.0, 4)
    features = Intervention(2, "features", strength=3.0, schedule=half, **SAE)
    assert features.strengths(None, training_step=2) == (1.5, 1.5)
    assert features.strengths([2.0], training_step=2) == (3.0, 3.0)
    assert features.strengths([2.0, -4.0], training_step=3) == (1.5, -3.0)
    assert features.strengths([2.0, -4.0], training_step=99) == (0.0, 0.0)
    assert features.decode_factors() == (1.0,)
    assert Intervention.from_dict(json.loads(json.dumps(features.to_dict()))) == features


def test_a_schedule_over_decode_steps_is_a_table_and_not_in_the_slot_s_strength() -> None:
    falling = Intervention(2, where="generated", strength=3.0, schedule=Schedule("linear", "decode", 1.0, 0.0, 2))
    assert falling.strengths([2.0], training_step=1) == (6.0,)
    assert falling.decode_factors() == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("given", [[1.0, 2.0, 3.0], [], [float("inf")]])
def test_other_strengths_than_asked_for_are_refused(given: list[float]) -> None:
    with pytest.raises(ConfigError, match="2 finite numbers"):
        Intervention(2, "clamp", **SAE).strengths(given)


def test_the_spec_needs_no_torch() -> None:
    code = (
        "import sys\nfrom nla_megatron.interventions import spec, placement, checks\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_rows_may_bring_from_the_fewest_vectors_to_all() -> None:
    any_number = Intervention(1, vectors=4, fewest=2)
    assert [count for count in range(7) if any_number.takes(count)] == [2, 3, 4] and any_number.counts == "2 to 4"
    assert [count for count in range(7) if Intervention(1, vectors=3).takes(count)] == [3]
    assert Intervention.from_dict(json.loads(json.dumps(any_number.to_dict()))) == any_number
