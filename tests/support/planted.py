"""A class of tokens that a planted feature raises, and the reward that counts it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nla_megatron.types import Measured

RAISES, LOWERS, IDLE = 3, 5, 8
CLASS = range(300, 360)


def share_of_class(measured: Measured) -> torch.Tensor:
    """The share of each response's tokens that are of the class, (N,)."""
    responses = [rollout.response_ids for rollout in measured.rollouts]
    return torch.tensor([sum(token in CLASS for token in ids) / len(ids) for ids in responses])


def plant(directory: Path, sae: Path) -> None:
    """A direction that the class's tokens have in common in the output layer, and an SAE of the last block in which one
    feature has that direction, another its opposite, and the others any.
    """
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(1)
    weights = load_file(directory / "model.safetensors")
    head = weights["model.embed_tokens.weight"]
    towards = torch.randn(head.shape[1], generator=generator)
    towards = towards / towards.norm()
    head[list(CLASS)] += 0.4 * towards
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    decoder = torch.randn(16, head.shape[1], generator=generator) / head.shape[1] ** 0.5
    decoder[RAISES], decoder[LOWERS] = towards, -towards
    sae.mkdir()
    config = {"architecture": "standard", "d_in": head.shape[1], "d_sae": 16, "apply_b_dec_to_input": False}
    (sae / "cfg.json").write_text(json.dumps(config))
    encoder = torch.randn(head.shape[1], 16, generator=generator) * 0.02
    tensors = {"W_enc": encoder, "b_enc": torch.zeros(16), "W_dec": decoder, "b_dec": torch.zeros(head.shape[1])}
    save_file(tensors, sae / "sae_weights.safetensors")


def silence(sae: Path, out: Path, feature: int) -> None:
    """The same SAE with a feature that nothing in a stream makes active."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(sae / "sae_weights.safetensors")
    tensors["b_enc"][feature] = -1e6
    out.mkdir()
    (out / "cfg.json").write_text((sae / "cfg.json").read_text())
    save_file(tensors, out / "sae_weights.safetensors")


def write_prompts(path: Path) -> None:
    words = ("river", "stone", "bread", "cloud", "winter", "paper", "music", "garden")
    lines = [{"prompt": f"The {one} and the {other}"} for one in words for other in words if one != other]
    path.write_text("\n".join(map(json.dumps, lines)))
