"""Formulas at the tokens that slots mark. Legend: T tokens, D hidden, S slots, F strengths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from nla_megatron.interventions.maths import (
    FORMULAS,
    Slots,
    apply,
    apply_indexed,
    apply_whole,
    apply_whole_indexed,
    tokens_per_slot,
    touched_rows,
)

NAN, INF = float("nan"), float("inf")
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

cases = given(
    t=st.integers(0, 9),
    d=st.integers(1, 24),
    s=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    share=st.floats(0, 1),
    with_factor=st.booleans(),
)


def draw(t: int, d: int, s: int, seed: int, share: float, with_factor: bool) -> tuple[Tensor, Slots]:
    """A stream, and slots of which about `share` are taken."""
    generator = torch.Generator().manual_seed(seed)
    stream_TD = torch.randn(t, d, generator=generator) * 3
    slot_T = torch.randint(0, s, (t,), generator=generator, dtype=torch.int32)
    slot_T[torch.rand(t, generator=generator) > share] = -1
    sizes_S = torch.rand(s, generator=generator) * 4 + 0.1
    factor_T = torch.rand(t, generator=generator) + 0.5 if with_factor else None
    table_SD = (torch.randn(s, d, generator=generator) + 0.01) * sizes_S[:, None]
    return stream_TD, Slots(slot_T, table_SD, sizes_S.flip(0)[:, None], factor_T)


def slowly(mode: str, stream_TD: Tensor, slots: Slots) -> list[list[float]]:
    """The stream afterwards, token by token and number by number."""
    out = []
    for index, x in enumerate(stream_TD.double().tolist()):
        slot = int(slots.slot_T[index])
        if slot >= 0:
            v = slots.table_SD[slot].double().tolist()
            strength = float(slots.strength_SF[slot, 0])
            if slots.factor_T is not None:
                strength *= float(slots.factor_T[index])
            x_norm, v_norm = (math.sqrt(sum(value**2 for value in values)) for values in (x, v))
            if mode == "norm_add":
                x = [a + strength * x_norm * b / v_norm for a, b in zip(x, v, strict=True)]
            elif mode == "replace":
                x = [strength * b / v_norm for b in v]
            else:
                x = [a + strength * b for a, b in zip(x, v, strict=True)]
        out.append(x)
    return out


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", list(FORMULAS))
def test_all_four_forms_are_the_slow_loop(
    mode: str, dtype: torch.dtype, t: int, d: int, s: int, seed: int, share: float, with_factor: bool
) -> None:
    stream_TD, slots = draw(t, d, s, seed, share, with_factor)
    stream_TD = stream_TD.to(dtype)
    expected = torch.tensor(slowly(mode, stream_TD, slots), dtype=torch.float64).reshape(t, d)
    change = expected - stream_TD.double()
    eps = torch.finfo(dtype).eps
    whole_room = eps * expected.abs() + 4e-6 * (1 + expected.abs().amax() if t else 1)
    change_room = eps * change.abs() + 4e-6 * (1 + expected.abs().amax() if t else 1)
    for form, wanted, room in (
        (apply, change, change_room),
        (apply_indexed, change, change_room),
        (apply_whole, expected, whole_room),
        (apply_whole_indexed, expected, whole_room),
    ):
        got = form(FORMULAS[mode], stream_TD, slots)
        assert got.dtype == dtype and got.shape == stream_TD.shape
        assert bool(((got.double() - wanted).abs() <= room).all()), form.__name__


@pytest.mark.parametrize(
    ("mode", "by_hand"),
    [
        ("norm_add", [[3.0, -6.0], [1.0, 2.0]]),
        ("add", [[3.0, -16.0], [1.0, 2.0]]),
        ("replace", [[0.0, -2.0], [1.0, 2.0]]),
    ],
)
def test_each_mode_by_hand(mode: str, by_hand: list[list[float]]) -> None:
    """|x| = 5, v = (0, -10), strength 4 and factor 0.5."""
    table_SD, strength_SF = torch.tensor([[9.0, 9.0], [0.0, -10.0]]), torch.tensor([[7.0], [4.0]])
    slots = Slots(torch.tensor([1, -1]), table_SD, strength_SF, torch.tensor([0.5, 3.0]))
    got = apply_whole(FORMULAS[mode], torch.tensor([[3.0, 4.0], [1.0, 2.0]]), slots)
    torch.testing.assert_close(got, torch.tensor(by_hand))
    assert set(FORMULAS) == {"norm_add", "add", "replace"}


@pytest.mark.parametrize("form", [apply, apply_indexed])
def test_norms_of_a_bf16_stream_are_fp32(form) -> None:  # noqa: ANN001
    """|x| = 257 exactly, which bf16 rounds to 256: then the second component would be 205, not 206."""
    stream_TD = torch.tensor([[256.0, 16.0, 16.0, 1.0]], dtype=torch.bfloat16)
    slots = Slots(torch.tensor([0]), torch.tensor([[0.6, 0.8, 0.0, 0.0]]), torch.ones(1, 1))
    assert form(FORMULAS["norm_add"], stream_TD, slots)[0].tolist() == [154.0, 206.0, 0.0, 0.0]


@cases
@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("mode", list(FORMULAS))
def test_untouched_tokens_stay_bit_for_bit(
    mode: str, dtype: torch.dtype, t: int, d: int, s: int, seed: int, share: float, with_factor: bool
) -> None:
    """Negative zeros and infinities too; and NaN, where nothing is added. An unused slot may hold anything."""
    stream_TD, slots = draw(t, d, s, seed, share, with_factor)
    untouched_T = slots.slot_T < 0
    odd = torch.tensor([-0.0, INF, -INF, 0.0])
    stream_TD[untouched_T, 0] = odd[torch.arange(int(untouched_T.sum())) % 4]
    stream_TD = stream_TD.to(dtype)
    unused_S = tokens_per_slot(slots.slot_T, s) == 0
    slots.table_SD[unused_S], slots.strength_SF[unused_S] = NAN, INF
    before = stream_TD.view(BITS[dtype])
    for form in (apply, apply_indexed):
        after = stream_TD + form(FORMULAS[mode], stream_TD, slots)
        assert torch.equal(after.view(BITS[dtype])[untouched_T], before[untouched_T])
    stream_TD[untouched_T] = NAN
    for form in (apply_whole, apply_whole_indexed):
        after = form(FORMULAS[mode], stream_TD, slots)
        assert torch.equal(after.view(BITS[dtype])[untouched_T], stream_TD.view(BITS[dtype])[untouched_T])
        assert bool(torch.isfinite(after[~untouched_T]).all())


@pytest.mark.parametrize("masked,indexed", [(apply, apply_indexed), (apply_whole, apply_whole_indexed)])
@pytest.mark.parametrize("mode", list(FORMULAS))
def test_gradients_are_the_indexed_forms_whatever_untouched_tokens_hold(mode: str, masked, indexed) -> None:  # noqa: ANN001
    """To the stream, the vectors (a projection learns from them) and the strengths (a predictor does)."""
    gradients = []
    for form in (masked, indexed):
        stream_TD, slots = draw(6, 8, 3, seed=3, share=1.0, with_factor=True)
        slots.slot_T[[1, 4]] = -1
        slots.slot_T[[0, 2, 3, 5]] = torch.tensor([1, 2, 1, 2], dtype=torch.int32)
        stream_TD[1], slots.table_SD[0] = NAN, 0.0
        leaves = [stream_TD.requires_grad_(), slots.table_SD.requires_grad_(), slots.strength_SF.requires_grad_()]
        weights_TD = torch.arange(48.0).reshape(6, 8) / 10 + 1
        out = form(FORMULAS[mode], stream_TD, slots)
        loss = (torch.where(slots.slot_T[:, None] >= 0, out, 0.0) * weights_TD).sum() + out[4].sum()
        gradients.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for got, wanted in zip(*gradients, strict=True):
        assert bool(torch.isfinite(got).all())
        torch.testing.assert_close(got, wanted)
    assert bool(gradients[0][2][1:].abs().min() > 0) and bool((gradients[0][2][0] == 0).all())


@pytest.mark.parametrize("mode", list(FORMULAS))
def test_the_masked_forms_can_be_captured_and_the_indexed_ones_cannot(mode: str) -> None:
    """Fake tensors have no values: whatever asks for one, to branch on it or to size its result, raises."""
    with FakeTensorMode() as fake:
        stream_TD, slots = torch.zeros(5, 8), Slots(
            torch.zeros(5, dtype=torch.int32), torch.zeros(2, 8), torch.zeros(2, 1), torch.zeros(5)
        )  # fmt: skip
        assert fake.shape_env is None
        for form in (apply, apply_whole):
            assert form(FORMULAS[mode], stream_TD, slots).shape == (5, 8)
        assert tokens_per_slot(slots.slot_T, 2).shape == (2,)
        for form in (apply_indexed, apply_whole_indexed):
            with pytest.raises(DynamicOutputShapeException):
                form(FORMULAS[mode], stream_TD, slots)


@cases
def test_the_account_of_tokens_per_slot_is_a_count(
    t: int, d: int, s: int, seed: int, share: float, with_factor: bool
) -> None:
    _, slots = draw(t, d, s, seed, share, with_factor)
    taken = slots.slot_T.tolist()
    assert tokens_per_slot(slots.slot_T, s).tolist() == [taken.count(slot) for slot in range(s)]
    assert touched_rows(slots.slot_T).tolist() == [index for index, slot in enumerate(taken) if slot >= 0]


def test_known_rows_give_what_looking_gives() -> None:
    stream_TD, slots = draw(7, 4, 3, seed=5, share=0.5, with_factor=True)
    rows_N = touched_rows(slots.slot_T)
    assert 0 < len(rows_N) < 7
    for form in (apply_indexed, apply_whole_indexed):
        got = form(FORMULAS["add"], stream_TD, slots, rows_N)
        assert torch.equal(got, form(FORMULAS["add"], stream_TD, slots))
        assert not torch.equal(got, form(FORMULAS["add"], stream_TD, slots, rows_N[:-1]))
