"""`project`: a learned map of the vectors before they meet the stream. Legend: N vectors, E wide before, D after."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from nla_megatron.contract.files import atomic_path
from nla_megatron.errors import CheckpointError, ConfigError, MissingFile, WidthError


class Projection(nn.Module):
    """v' = Wv + b, or (Linear, LayerNorm, ReLU, Dropout) `layers` - 1 times and then Linear. Parameters are fp32.

    One square layer starts as the identity. Other matrices start orthogonal, drawn from `seed` and from nothing else,
    so that every rank and every resumed run makes the same ones. Inner layers are D wide.

    Args:
        width_in, width_out: E and D.
        layers: how many linear maps there are.
        dropout: between layers, in `train()` mode only. A sampler sees none, so neither may a trainer whose log-probs
            are compared with the sampler's.
        seed: of the start.

    Raises:
        ConfigError: no layers, no width, or a dropout outside [0, 1).
    """

    def __init__(self, width_in: int, width_out: int, layers: int = 1, dropout: float = 0.0, seed: int = 0):
        super().__init__()
        if min(width_in, width_out, layers) < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                f"a projection from {width_in} to {width_out} with {layers} layers and dropout {dropout}",
                "positive widths and layers, a dropout in [0, 1)", "correct the intervention",
            )  # fmt: skip
        self.width_in, self.width_out = width_in, width_out
        widths = [width_in] + [width_out] * layers
        # Empty, not torch's own start: that one would advance the global generator.
        linears = [
            nn.utils.skip_init(nn.Linear, before, after, dtype=torch.float32)
            for before, after in zip(widths, widths[1:], strict=False)
        ]
        self.linears = nn.ModuleList(linears)
        self.norms = nn.ModuleList(nn.LayerNorm(width_out, dtype=torch.float32) for _ in range(layers - 1))
        self.dropout = nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(seed)
        for linear in linears:
            if layers == 1 and width_in == width_out:
                nn.init.eye_(linear.weight)
            else:
                nn.init.orthogonal_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, vectors_NE: Tensor) -> Tensor:
        """(N, E) of any dtype -> (N, D) fp32."""
        values = vectors_NE.float()
        for linear, norm in zip(self.linears, self.norms, strict=False):
            values = self.dropout(norm(linear(values)).relu())
        return self.linears[-1](values)

    def save(self, path: Path | str) -> None:
        """Write the parameters as one safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        state = {name: values.detach().cpu().contiguous() for name, values in self.state_dict().items()}
        with atomic_path(path) as temporary:
            save_file(state, temporary)

    @classmethod
    def load(cls, path: Path | str, width_in: int, width_out: int) -> Projection:
        """The projection that `save` wrote; its layers are counted in the file.

        Raises:
            MissingFile: there is no such file.
            WidthError: it maps between other widths.
            CheckpointError: it is no safetensors file, or holds other parameters.
        """
        state = _read(Path(path))
        layers = sum(name.startswith("linears.") and name.endswith(".weight") for name in state)
        if not layers:
            raise CheckpointError(
                f"{sorted(state)[:3]} in '{path}'", "the parameters of a projection", "export it again"
            )
        first, last = state.get("linears.0.weight"), state.get(f"linears.{layers - 1}.weight")
        found = (first.shape[-1] if first is not None else None, last.shape[0] if last is not None else None)
        if found != (width_in, width_out):
            raise WidthError(
                f"a projection from {found[0]} to {found[1]} in '{path}'", f"from {width_in} to {width_out}",
                "use the projection that was trained with this model",
            )  # fmt: skip
        projection = cls(width_in, width_out, layers)
        shapes = {name: values.shape for name, values in projection.state_dict().items()}
        if shapes != {name: values.shape for name, values in state.items()}:
            wrong = sorted(
                name
                for name in shapes.keys() | state.keys()
                if name not in state or shapes.get(name) != state[name].shape
            )
            raise CheckpointError(
                f"{wrong} in '{path}'", f"parameters {sorted(shapes)} of like shapes", "export it again"
            )
        projection.load_state_dict(state)
        return projection


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise MissingFile(f"no '{path}'", "the safetensors file of a projection", "check the path")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"'{path}': {error}", "a safetensors file", "export it again") from error
