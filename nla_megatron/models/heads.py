"""How an AR makes one vector of its residual stream: pooling over a text's tokens, then a projection, both in fp32.

Legend: T tokens, B rows, D hidden, W width inside the projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nla_megatron.contract.blocks import ReconstructorSpec
from nla_megatron.models.dropout import dropped
from nla_megatron.types import Microbatch, ModelShape

PREFIX = "value_head."
"""What the names of an AR's own parameters begin with."""


_OFF_THE_KINK = 1e-4
"""Of the size of a vector's numbers. What dropout took away would else stand at a ReLU's kink, in both its places, and
rounding alone, which differs between layouts, would choose its gradient."""


class ReconstructionHead(nn.Module):
    """Pooling and projection of a `ReconstructorSpec`, which starts as the identity on the pooled vector's direction.

    `weight` (D, D) alone is a linear head, and starts as the identity matrix. With more layers each hidden one is a
    linear layer, LayerNorm, ReLU and dropout at width W = 2D: as [x, -x] a vector passes a ReLU whole, so the layers
    start as x -> x / rms(x), within 1e-4, of which the contract's scale sees the direction alone.

    Dropout is a function of (seed, training step, row, layer), so no layout and no resume changes what is dropped.

    Args:
        seed: of the dropout.
    """

    def __init__(self, shape: ModelShape, spec: ReconstructorSpec, seed: int = 0):
        super().__init__()
        self.spec, self.seed = spec, seed
        width, deep = shape.hidden_size, spec.projection_layers > 1
        self.weight = nn.Parameter(_signed(width) if deep else torch.eye(width))
        widths = [width, *[2 * width] * (spec.projection_layers - 1)]
        self.hidden = nn.ModuleList(_Hidden(here, 2 * width) for here in widths[:-1])
        if spec.pooling == "weighted":
            self.position_logits = nn.Parameter(torch.zeros(shape.max_positions))

    def forward(self, stream_TBD: Tensor, batch: Microbatch) -> Tensor:
        """Predictions (B, D) fp32 of right-padded rows; `stream_TBD` is of all tokens."""
        vectors_BW = self.pooled(stream_TBD, batch.lengths)
        if not self.hidden:
            vectors_BW = self._dropped(vectors_BW, batch, 0)
        for number, layer in enumerate(self.hidden):
            vectors_BW = self._dropped(layer(vectors_BW), batch, number)
        return nn.functional.linear(vectors_BW, self.weight)

    def pooled(self, stream_TBD: Tensor, lengths_B: Tensor) -> Tensor:
        """One vector per row (B, D) fp32; padding takes no part."""
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        if self.spec.pooling == "last":
            return stream_TBD[lengths_B - 1, rows_B].float()
        if self.spec.pooling == "cls":
            return stream_TBD[0].float()
        at_T = torch.arange(len(stream_TBD), device=lengths_B.device)
        padding_TB = at_T[:, None] >= lengths_B
        stream_TBD = stream_TBD.float()
        if self.spec.pooling == "max":
            return stream_TBD.masked_fill(padding_TB[..., None], float("-inf")).amax(dim=0)
        if self.spec.pooling == "mean":
            weights_TB = (~padding_TB).float() / lengths_B
        else:
            # Padding may reach beyond the model's last position.
            logits_T = self.position_logits[at_T.clamp(max=len(self.position_logits) - 1)]
            weights_TB = logits_T[:, None].masked_fill(padding_TB, float("-inf")).softmax(dim=0)
        return torch.einsum("tb,tbd->bd", weights_TB, stream_TBD)

    def _dropped(self, vectors_BW: Tensor, batch: Microbatch, layer: int) -> Tensor:
        if not self.training or not self.spec.dropout:
            return vectors_BW
        keys = [(self.seed, batch.training_step, row, layer) for row in batch.rows.tolist()]
        return dropped(vectors_BW, self.spec.dropout, keys)


class _Hidden(nn.Module):
    """Linear, LayerNorm and ReLU; starts as x -> [x, -x] from a plain vector, and from the positive parts of one."""

    def __init__(self, width: int, wider: int):
        super().__init__()
        self.linear = nn.Linear(width, wider)
        self.norm = nn.LayerNorm(wider)
        with torch.no_grad():
            signed = _signed(width // 2) if width == wider else torch.eye(width)
            self.linear.weight.copy_(torch.cat([signed, -signed]))
            self.linear.bias.zero_()
            self.norm.bias.fill_(_OFF_THE_KINK)

    def forward(self, vectors_BW: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(vectors_BW)).relu()
        return out


def _signed(width: int) -> Tensor:
    """(D, 2D): from the positive parts of x and of -x to x."""
    return torch.cat([torch.eye(width), -torch.eye(width)], dim=1)


def head_shapes(shape: ModelShape, spec: ReconstructorSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of a head by name, without `PREFIX`."""
    with torch.device("meta"):
        head = ReconstructionHead(shape, spec)
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
