"""What a request may not ask for. Legend: N vectors, D wide."""

from __future__ import annotations

import numpy as np
import pytest

from nla_megatron.errors import ConfigError, InjectionError, WidthError
from nla_megatron.interventions.checks import Marker, check_brought, check_layers, check_positions, check_vectors
from nla_megatron.interventions.maths import check_vectors as count_wrong
from nla_megatron.interventions.spec import EMBEDDING, Intervention

PROMPT = [5, 10, 99, 11, 99, 12]
MARKER = Marker(99, 10, 11)


def test_a_layer_beyond_the_model_is_named() -> None:
    check_layers([Intervention(3), Intervention(EMBEDDING)], num_layers=4)
    with pytest.raises(ConfigError, match="block 4 of a model with 4 blocks"):
        check_layers([Intervention(1), Intervention(4)], num_layers=4)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, 1e-30, 1e30])
def test_a_vector_without_a_finite_direction_is_named_as_the_tensors_check_names_it(wrong: float) -> None:
    import torch

    vectors_ND = np.ones((3, 4), dtype=np.float32)
    check_vectors(Intervention(1), vectors_ND, 4)
    vectors_ND[1] = wrong
    with pytest.raises(InjectionError, match="1 of 3 vectors cannot be injected; the first, of request b"):
        check_vectors(Intervention(1), vectors_ND, 4, names=["a", "b", "c"])
    assert count_wrong(torch.from_numpy(vectors_ND)) == 1


def test_the_width_is_the_model_s_or_what_the_projection_takes() -> None:
    projected = Intervention(1, "project", vector_width=6)
    check_vectors(projected, np.ones((2, 6), dtype=np.float32), 4)
    for intervention, shape in ((Intervention(1), (2, 6)), (projected, (2, 4)), (Intervention(1), (4,))):
        with pytest.raises(WidthError, match="vectors of shape"):
            check_vectors(intervention, np.ones(shape, dtype=np.float32), 4)
    with pytest.raises(WidthError, match=r"shape \(2, 4\)"):
        check_vectors(Intervention(1), np.ones((2, 4), dtype=np.float32), 4, names=["a"])


def test_the_marker_between_its_neighbours_is_accepted() -> None:
    check_positions(Intervention(1), PROMPT, [2], MARKER)
    check_positions(Intervention(1), PROMPT, [0, 5])
    check_positions(Intervention(1), PROMPT, [4], Marker(99))
    check_positions(Intervention(1, where="all"), PROMPT, [])


@pytest.mark.parametrize(
    ("positions", "marker", "named"),
    [
        ([6], None, "position 6 of request r7, whose prompt has 6 tokens"),
        ([-1], None, "position -1"),
        ([1], MARKER, "token 10 at the marker's position"),
        ([2, 4], MARKER, "token 11 left of the marker (4)"),
        ([2], Marker(99, 10, 12), "token 11 right of the marker (2)"),
        ([0], Marker(5, 4, None), "token None left of the marker"),
        ([5], Marker(12, None, 1), "token None right of the marker"),
        ([], MARKER, "names positions []"),
        ([2, 2], MARKER, "names positions [2, 2]"),
    ],
)
def test_a_position_that_is_not_the_marker_s_is_named(positions: list[int], marker: Marker | None, named: str) -> None:
    with pytest.raises(InjectionError) as error:
        check_positions(Intervention(1), PROMPT, positions, marker, name="r7")
    assert named in error.value.found


def test_positions_for_an_intervention_elsewhere_are_refused() -> None:
    with pytest.raises(InjectionError, match="at 'generated'"):
        check_positions(Intervention(1, where="generated"), PROMPT, [2])


def test_as_many_vectors_as_the_intervention_takes_are_asked_for() -> None:
    three = Intervention(1, vectors=3)
    check_vectors(three, np.ones((2, 3, 4), dtype=np.float32), 4, names=["a", "b"])
    # One that takes a single vector takes the row's own.
    check_vectors(Intervention(1), np.ones((2, 3, 4), dtype=np.float32), 4)
    for shape in ((2, 4), (2, 2, 4), (2, 3, 5), (2, 12)):
        with pytest.raises(WidthError, match=r"vectors of shape[\s\S]*\(requests, 3, 4\)"):
            check_vectors(three, np.ones(shape, dtype=np.float32), 4)
    vectors = np.ones((2, 3, 4), dtype=np.float32)
    vectors[1, 0] = 0
    with pytest.raises(InjectionError, match=r"1 of 6 vectors cannot be injected; the first, of request b, has norm 0"):
        check_vectors(three, vectors, 4, names=["a", "b"])
    # Not asked of vectors that are not taken.
    check_vectors(Intervention(1), vectors, 4)


def test_a_position_for_each_vector_is_asked_for() -> None:
    check_positions(Intervention(1, vectors=2), PROMPT, [2, 4])
    for positions in ([2], [0, 2, 4]):
        with pytest.raises(InjectionError, match=r"request r7 names positions .* for 2 vectors"):
            check_positions(Intervention(1, vectors=2), PROMPT, positions, name="r7")


@pytest.mark.parametrize("positions", [[], [0, 2, 4, 5]])
def test_a_number_of_positions_outside_the_bounds_is_named(positions: list[int]) -> None:
    any_number = Intervention(1, vectors=3, fewest=1)
    for fine in ([2], [2, 4], [0, 2, 4]):
        check_positions(any_number, PROMPT, fine)
    with pytest.raises(InjectionError, match=r"request r7 names positions"):
        check_positions(any_number, PROMPT, positions, name="r7")


@pytest.mark.parametrize(("positions", "brought"), [(2, 3), (3, 2), (4, 4), (0, 0)])
def test_vectors_without_a_position_each_are_named(positions: int, brought: int) -> None:
    any_number = Intervention(1, vectors=3, fewest=1)
    for count in (1, 2, 3):
        check_brought(any_number, count, count, "row 5")
    with pytest.raises(
        InjectionError, match=f"{positions} positions of row 5, which brings {brought} activations"
    ) as e:
        check_brought(any_number, positions, brought, "row 5")
    assert e.value.expected == "a position for each of 1 to 3 activations"
