"""Dropout that depends on its keys alone."""

from __future__ import annotations

import torch

from nla_megatron.models.dropout import ProjectionDropout, dropped
from nla_megatron.types import Injection


def test_a_share_is_dropped_and_the_rest_scaled_whatever_rows_stand_beside() -> None:
    values_NW, keys = torch.full((3, 4000), 2.0), [(1, 0), (1, 1), (2, 0)]
    out_NW = dropped(values_NW, 0.2, keys)
    assert set(out_NW.unique().tolist()) == {0.0, 2.5}
    assert all(abs(float((row == 0).float().mean()) - 0.2) < 0.03 for row in out_NW)
    assert torch.equal(dropped(values_NW[:2], 0.2, [keys[2], keys[0]]), out_NW[[2, 0]])
    assert len({tuple(row.tolist()) for row in out_NW}) == 3


def test_each_vector_of_a_row_in_each_layer_of_each_step_has_a_draw_of_its_own() -> None:
    def draws(rows: tuple[int, ...], number: int, step: int, layer: int, seed: int = 0) -> torch.Tensor:
        injection = Injection(None, lengths=(4,) * len(rows), training_step=step, rows=rows)
        drop = ProjectionDropout(0.5, seed).of(number, 2, injection)
        assert drop is not None
        return drop(torch.ones(2 * len(rows), 64), layer)

    whole = draws((3, 5), 0, 7, 1)
    assert torch.equal(draws((5,), 0, 7, 1), whole[2:]), "the row's own, whatever microbatch it is in"
    others = [draws((5,), *changed) for changed in ((1, 7, 1), (0, 8, 1), (0, 7, 2), (0, 7, 1, 1))]
    assert len({tuple(row.tolist()) for each in (whole, *others) for row in each}) == 12
    assert ProjectionDropout(0.0, 0).of(0, 1, Injection(None, lengths=(4,))) is None
