"""Put one activation into words, and the words back into an activation, with plain transformers.

    python examples/verbalize.py                       # the demo's models, row 0 of its held-out table
    python examples/verbalize.py --run runs/demo --row 7

No Megatron and no vLLM: this is all it takes to use the two exported directories elsewhere. The sidecar in each of them
says where the activation goes in, how, and what the prompts are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from nla_megatron.contract import columns
from nla_megatron.contract.prompts import PromptContract, extract_explanation
from nla_megatron.contract.sidecar import InjectionSpec, prompt_contract, read_model_sidecar
from nla_megatron.contract.tables import Table
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.conversion.heads import head_of, resolved_spec
from nla_megatron.conversion.hf import read_shape
from nla_megatron.interventions.maths import add, norm_add, replace
from nla_megatron.interventions.projection import Projection
from nla_megatron.models.heads import ReconstructionHead
from nla_megatron.types import Microbatch

FORMULAS = {"norm_add": norm_add, "add": add, "replace": replace}
PROJECTION_FILE = "injection/projection.safetensors"


def write(directory: Path, vectors_KD: Tensor, max_new_tokens: int) -> str:
    """The AV's greedy response to an activation, or to those of several positions."""
    sidecar = read_model_sidecar(directory)
    tokenizer = load_tokenizer(directory)
    contract, spec = prompt_contract(sidecar), sidecar.injection
    assert spec is not None, f"{directory} is no AV of ours: its sidecar does not say how to inject"
    assert min(spec.blocks) >= 0, f"{directory} injects at the embedding, which this example does not"
    contract.check(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    count = len(torch.atleast_2d(vectors_KD))
    prompt = contract.av_prompt_ids(tokenizer, activations=count)
    positions = contract.marker_positions(prompt, activations=count)
    for number, block in enumerate(spec.blocks):
        vectors = projected(directory, spec, number, vectors_KD)
        hook = injecting_hook(spec, vectors, positions)
        model.model.layers[block].register_forward_hook(hook)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, len(prompt) :].tolist(), skip_special=True)


@torch.no_grad()
def projected(directory: Path, spec: InjectionSpec, number: int, vectors_KD: Tensor) -> Tensor:
    """What enters at a block of `spec.blocks`: the vectors themselves, or what the AV's projection makes of them."""
    if spec.projection is None:
        return vectors_KD
    width = vectors_KD.shape[-1]
    projection, tensors = Projection(width, width, spec.projection.layers), load_file(directory / PROJECTION_FILE)
    projection.load_state_dict({name: tensors[f"{number}.{name}"] for name in projection.state_dict()})
    mapped_KD: Tensor = projection(vectors_KD)
    return mapped_KD


def injecting_hook(spec: InjectionSpec, vectors_KD: Tensor, positions: Sequence[int]) -> Any:
    """A forward hook for a block of `spec.blocks`: its output, the residual stream, is changed at every marker, by the
    one vector or by each marker's own."""
    changes = list(zip(positions, vectors_KD.expand(len(positions), -1).split(1), strict=True))

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        stream_BTD = (output[0] if isinstance(output, tuple) else output).clone()
        # Only the first call sees the prompt; the later ones hold one new token each, and the cache remembers the rest.
        if stream_BTD.shape[1] > max(positions):
            scale = 1.0 if spec.scale is None else float(spec.scale)
            method = spec.method if spec.projection is None else spec.projection.then
            for position, vector_1D in changes:
                stream_BTD[:, position] = FORMULAS[method](stream_BTD[:, position], vector_1D, scale)
        return (stream_BTD, *output[1:]) if isinstance(output, tuple) else stream_BTD

    return hook


class Reader:
    """The AR: the first blocks, no final norm, and a head.

    Most have value_head.safetensors with a matrix `weight`: then the answer is `weight @ last_hidden_state[-1]`.
    """

    def __init__(self, directory: Path):
        self.tokenizer = load_tokenizer(directory)
        self.contract: PromptContract = prompt_contract(read_model_sidecar(directory))
        self.contract.check(self.tokenizer)
        self.backbone: Any = AutoModel.from_pretrained(directory).eval()
        # transformers adds a final norm that the directory has no weights for; the AR reads the stream before it.
        self.backbone.norm = torch.nn.Identity()
        shape, spec = read_shape(directory), resolved_spec(directory)
        self.head = ReconstructionHead(shape, spec).eval()
        self.head.load_state_dict(head_of(directory, shape, spec) or {})

    @torch.no_grad()
    def reconstruct(self, explanation: str) -> Tensor:
        """An explanation to a vector (D,). Its direction is what counts; its length means nothing."""
        ids = torch.tensor([self.contract.ar_ids(self.tokenizer, explanation)])
        stream_TBD = self.backbone(ids).last_hidden_state.transpose(0, 1)
        one = torch.ones(1)
        vectors_BD: Tensor = self.head(stream_TBD, Microbatch(ids, one.long() * ids.shape[1], one, one.long()))
        return vectors_BD[0]


def cosine(a_D: Tensor, b_D: Tensor) -> str:
    return f"{torch.nn.functional.cosine_similarity(a_D, b_D, dim=0):+.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a demo's directory")
    parser.add_argument("--av", type=Path, help="an AV's directory (RUN/rl/av)")
    parser.add_argument("--ar", type=Path, help="an AR's directory (RUN/rl/ar)")
    parser.add_argument("--table", type=Path, help="a table of activations (RUN/build/held_out.parquet)")
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=150)
    chosen = parser.parse_args()
    logging.set_verbosity_error()  # transformers would report the final norm that the AR has not
    logging.disable_progress_bar()

    table = Table.open(chosen.table or chosen.run / "build" / "held_out.parquet", "rl")
    vectors_KD = torch.from_numpy(table.inputs([chosen.row])).reshape(-1, table.d_model)
    # Where rows keep different numbers of activations, NaN stands for those that this one has not.
    vectors_KD = vectors_KD[-int(table.activations[chosen.row]) :]
    vector_D = vectors_KD[-1]
    response = write(chosen.av or chosen.run / "rl" / "av", vectors_KD, chosen.max_new_tokens)
    explanation, gold = extract_explanation(response), table.column(columns.EXPLANATION)[chosen.row]
    reader = Reader(chosen.ar or chosen.run / "rl" / "ar")
    # What the activations have in common makes any two of them alike: an explanation has to do better than their mean.
    directions_ND = torch.nn.functional.normalize(torch.from_numpy(table.vectors(range(table.n_rows))))

    print(f"The text the activation was read from:\n  … {table.column(columns.TEXT)[chosen.row][-300:]!r}\n")
    print(f"The AV writes:\n{explanation or f'(no well-formed explanation in {response!r})'}\n")
    print(f"The gold explanation:\n{gold}\n")
    print("Cosine with the activation:")
    if explanation:
        print(f"  rebuilt from the AV's words   {cosine(reader.reconstruct(explanation), vector_D)}")
    print(f"  rebuilt from the gold words   {cosine(reader.reconstruct(gold), vector_D)}")
    print(f"  the mean of the table         {cosine(directions_ND.mean(dim=0), vector_D)}")


if __name__ == "__main__":
    main()
