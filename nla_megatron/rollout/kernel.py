"""The vector modes as one Triton kernel: a program per token, which ends at once where the token has no slot.

Nothing depends on how many tokens are marked, so a CUDA graph that was captured without a mark serves them all.
Legend: T tokens, D hidden, S slots.
"""

# Triton reads the annotations of a kernel, so they are not made strings here.
import triton
import triton.language as tl
from torch import Tensor

from nla_megatron.interventions.maths import Slots

_MODES = {"norm_add": 0, "replace": 1, "add": 2}
_BLOCK = 1024


@triton.jit
def _stream(hidden, residual, inside, HAS_RESIDUAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The whole stream in fp32, rounded to its own dtype as the trainer's is."""
    x = tl.load(hidden, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    return x.to(hidden.dtype.element_ty).to(tl.float32)


@triton.jit
def _change(  # type: ignore[no-untyped-def]
    hidden, residual, slot_T, table_SD, strength_S, factor_T, applied_S, hidden_stride, residual_stride, width,
    MODE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_T + token)
    if slot < 0:
        return
    column = tl.arange(0, BLOCK)
    row, rest, vector = hidden + token * hidden_stride, residual + token * residual_stride, table_SD + slot * width
    stream_sum = tl.zeros((BLOCK,), tl.float32)
    vector_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        v = tl.load(vector + start + column, mask=inside, other=0.0)
        vector_sum += v * v
        if MODE == 0:
            x = _stream(row + start + column, rest + start + column, inside, HAS_RESIDUAL)
            stream_sum += x * x
    scale = tl.load(strength_S + slot) * tl.load(factor_T + token)
    if MODE != 2:
        scale = scale / tl.sqrt(tl.sum(vector_sum))
    if MODE == 0:
        scale = scale * tl.sqrt(tl.sum(stream_sum))
    for start in range(0, width, BLOCK):
        inside = start + column < width
        whole = scale * tl.load(vector + start + column, mask=inside, other=0.0)
        if MODE != 1:
            whole += _stream(row + start + column, rest + start + column, inside, HAS_RESIDUAL)
        # Rounded like the trainer's stream, before the residual's share is taken off.
        whole = whole.to(hidden.dtype.element_ty).to(tl.float32)
        if HAS_RESIDUAL:
            whole -= tl.load(rest + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(row + start + column, whole.to(hidden.dtype.element_ty), mask=inside)
    tl.atomic_add(applied_S + slot, 1)


def launch(mode: str, hidden_TD: Tensor, residual_TD: Tensor | None, slots: Slots, applied_S: Tensor) -> None:
    """Change `hidden` (T, D) in place; the tables of `slots` are contiguous and fp32, `residual` may be None."""
    rest = hidden_TD if residual_TD is None else residual_TD
    assert hidden_TD.stride(1) == 1 and rest.stride(1) == 1, "rows of the stream are contiguous"
    _change[(len(hidden_TD),)](
        hidden_TD, rest, slots.slot_T, slots.table_SD, slots.strength_SF, slots.factor_T, applied_S,
        hidden_TD.stride(0), rest.stride(0), hidden_TD.shape[1],
        MODE=_MODES[mode], HAS_RESIDUAL=residual_TD is not None, BLOCK=_BLOCK,
    )  # fmt: skip
