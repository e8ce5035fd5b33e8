"""Interventions in Megatron equal a hooked transformers model, with every way of cutting and of recomputing it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.interventions_worker import PROJECTED, RUNS
from tests.support.ranks import torchrun

NAMES = ("norm_add", "replace", "add", "project", "features", "clamp", "global", "training", "embedding", "all")
NAMES += ("several vectors", "one to three")
RECOMPUTED = "tp2 pp2 recomputed"
CUT = ("tp2 pp2 vpp2 recomputed", "tp2 pp2 sequence parallel recomputed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return torchrun("interventions_worker", 4, str(tmp_path_factory.mktemp("adapter")))


@pytest.mark.parametrize(("layout", "name"), RUNS)
def test_logprobs_and_every_gradient_equal_a_hooked_transformers_model(found: Any, layout: str, name: str) -> None:
    numbers = found[layout][name]
    assert numbers["logprob"] <= 1e-4
    assert numbers["gradient"] <= 1e-4, numbers["where"]
    # 5 blocks of 11 weights, the embedding and the last norm, and what `project` learns.
    assert numbers["compared"] == 57 + 2 * (name in ("project", "all")) and numbers["unexpected"] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_intervention_changes_every_row(found: Any, name: str) -> None:
    assert found["effects"][name] > 1e-3


def test_other_vectors_would_be_seen(found: Any) -> None:
    assert found["wrong vectors"]["logprob"] > 1e-2 and found["wrong vectors"]["gradient"] > 1e-2
    # Both of a row's vectors, or all of them, each at another's marker.
    for swapped in ("swapped vectors", "swapped others"):
        assert found[swapped]["logprob"] > 1e-2 and found[swapped]["gradient"] > 1e-2


def test_blocks_are_recomputed_while_other_microbatches_are_under_way(found: Any) -> None:
    """A microbatch whose data stayed on a module would be recomputed with that of the next one."""
    assert all(found[layout]["in_flight"] >= 2 for layout in (RECOMPUTED, *CUT))


@pytest.mark.parametrize("layout", [RECOMPUTED, *CUT])
def test_av_and_ar_learn_alike_on_every_layout(found: Any, layout: str) -> None:
    single = found["tp2 pp2"]
    for losses in ("losses", "ar_losses"):
        assert found[layout][losses] == pytest.approx(single[losses], rel=2e-5)
        assert single[losses][-1] < single[losses][0]
    for norms in ("norms", "ar_norms"):
        assert found[layout][norms] == pytest.approx(single[norms], rel=1e-4)


@pytest.mark.parametrize("layout", PROJECTED)
def test_projections_learn_alike_on_every_layout_and_come_back_from_a_checkpoint_of_another(
    found: Any, layout: str
) -> None:
    """With dropout. The checkpoint is that of the layout in which no rank shares a model with another."""
    alone, here = found["projecting alone"], found[f"projecting {layout}"]
    for part, theirs in {"start": "start", "first": "first", "last": "last", "resumed": "last"}.items():
        mine, wanted = here[part], alone[theirs]
        assert mine["losses"] == pytest.approx(wanted["losses"], rel=2e-5)
        assert mine["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
        assert mine["same"], "every rank has the whole of it"
        for name, values in wanted["projections"].items():
            apart = sum(abs(a - b) > 1e-4 for a, b in zip(mine["projections"][name], values, strict=True))
            # Adam's first steps have the gradient's sign alone, and rounding may turn it where it is next to nothing.
            assert apart <= 1e-3 * len(values), (part, name)
    for name, start in alone["start"]["projections"].items():
        assert max(abs(a - b) for a, b in zip(alone["last"]["projections"][name], start, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("layer", "ConfigError: an intervention (add) at block 5 of a model with 5 blocks"),
        ("sae", "narrow' is 32 wide"),
        ("width", "WidthError: vectors of width 7"),
        ("nan", "ColumnError: 1 activations that are zero or not finite"),
        ("outside", "InjectionError: positions [10] in row 1, whose prompt has 10 tokens"),
        ("prompt", "InjectionError: a prompt of 16 tokens in row 1, which has 15"),
        ("no_prompts", "InjectionError: a batch without prompt lengths for add at 'generated' of block 0"),
        ("no_positions", "InjectionError: a batch without positions for norm_add at 'positions' of block 4"),
        ("no_vectors", "InjectionError: a batch without vectors for norm_add at 'positions' of block 4"),
        ("single_vectors", "WidthError: vectors of shape (1, 64) for norm_add at 'positions' of block 4"),
        ("fewer_positions", "InjectionError: 1 positions of a row for norm_add at 'positions' of block 4"),
        ("more_brought", "InjectionError: 2 positions of row 2 of a batch, which brings 3 activations"),
        ("more_positions", "ColumnError: 1 activations that are zero or not finite"),
        ("no_position", "InjectionError: 0 positions of row 0 of a batch, which brings 1 activations"),
        ("fine", "no error"),
        ("fine_pairs", "no error"),
        ("fine_others", "no error"),
    ],
)
def test_wrong_input_is_named_on_every_rank(found: Any, fault: str, said: str) -> None:
    """A block of the last stage: the first stage, which does not run it, stops too."""
    assert [said in rank[fault] for rank in found["faults"]] == [True] * 4, found["faults"][0][fault]
