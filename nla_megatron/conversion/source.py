"""The two sides of a conversion, checked before the first weight is read, as the same Hugging Face tensors."""

from __future__ import annotations

from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nla_megatron.conversion.checkpoint_plan import CheckpointPlan, checkpoint_plan
from nla_megatron.conversion.description import HEAD, checked_weights, described, located
from nla_megatron.conversion.formats.weights import check_finite
from nla_megatron.conversion.hf import HEAD_FILE, VALUE_HEAD, check_tied
from nla_megatron.conversion.rules import Part, Rule
from nla_megatron.conversion.safetensors_file import TensorSpec, mapped, read_header
from nla_megatron.conversion.torch_dist_reader import TorchDistReader
from nla_megatron.errors import CheckpointError, UnsupportedModel
from nla_megatron.parallel.world import World


class HuggingFaceSide:
    """The weights of a Hugging Face directory, checked against its config.json.

    Args:
        layers: take an AR's backbone of that many blocks from a whole model.

    Raises:
        MissingFile, CheckpointError, UnsupportedModel: see `checked_weights`.
    """

    def __init__(self, directory: str | Path, layers: int | None = None):
        self.directory = Path(directory)
        self.head_file = self.directory / VALUE_HEAD
        if (self.directory / HEAD_FILE).is_file():
            raise UnsupportedModel(
                f"{HEAD_FILE} in {self.directory}", f"an AR with {VALUE_HEAD}, which other trainers read as well",
                "train and evaluate this AR from its own directory; conversion knows the plain head alone",
            )  # fmt: skip
        has_head = self.head_file.is_file()
        self.model = described(self.directory, layers, is_ar=has_head or layers is not None)
        self.reader = checked_weights(self.directory, self.model.shape, with_head=not self.model.is_ar)
        if self.model.shape.tied_embeddings and not self.model.is_ar:
            check_tied(self.reader)
        if has_head:
            self._check_head()

    def _check_head(self) -> None:
        width = self.model.shape.hidden_size
        found = {name: placed.spec.shape for name, placed in read_header(self.head_file).items()}
        if found != {"weight": (width, width)}:
            raise CheckpointError(
                f"{found} in {self.head_file}", f"'weight' of shape {(width, width)}", "export it again"
            )

    def dtype_of(self, rule: Rule) -> torch.dtype:
        """Raises CheckpointError where the parts of one parameter differ in dtype."""
        dtypes = {self.reader.spec(part.hf).dtype for part in rule.parts}
        if len(dtypes) > 1:
            names = ", ".join(part.hf for part in rule.parts)
            raise CheckpointError(
                f"{names} of dtypes {', '.join(sorted(map(str, dtypes)))}", "one dtype", "choose one with dtype="
            )
        return dtypes.pop()

    def specs(self) -> dict[str, TensorSpec]:
        specs = {part.hf: self.reader.spec(part.hf) for rule in self.model.rules for part in rule.parts}
        if self.model.is_ar:
            width = self.model.shape.hidden_size
            specs[HEAD] = TensorSpec(HEAD, torch.float32, (width, width))
        return specs

    def read(self, name: str) -> Tensor:
        return self.value_head() if name == HEAD else self.reader.whole(name)

    def value_head(self) -> Tensor:
        """An AR's own head; the identity for one that is cut out of a whole model."""
        if not self.head_file.is_file():
            return torch.eye(self.model.shape.hidden_size)
        placed = read_header(self.head_file)["weight"]
        head = mapped(self.head_file, placed.start, placed.spec).float()
        check_finite(head, HEAD, self.head_file)
        return head


class MegatronSide:
    """The weights of a distributed checkpoint as Hugging Face tensors.

    Args:
        directory: with `weights` in it, or the checkpoint itself.
        companions: where config.json and the tokenizer are, if not beside the weights.
        plan: of another rank's side of the same checkpoint.

    Raises:
        MissingFile, CheckpointError, UnsupportedModel: see `TorchDistReader`.
    """

    def __init__(
        self, directory: str | Path, companions: str | Path | None, world: World, plan: CheckpointPlan | None = None
    ):
        weights, self.companions = located(Path(directory), Path(companions) if companions else None)
        self.reader = TorchDistReader(weights)
        is_ar = self.reader.is_ar
        self.model = described(self.companions, self.reader.num_layers() if is_ar else None, is_ar)
        padded = {rule.megatron: rule.rows for rule in self.model.rules if rule.rows is not None}
        self.plan = self.reader.matching_plan(
            lambda naming: plan or checkpoint_plan(self.model.shape, world, is_ar=is_ar, naming=naming), padded
        )

    def dtype_of(self, rule: Rule) -> torch.dtype:
        return self.reader.dtype(self.plan.parameters[rule.megatron][0])

    def specs(self) -> dict[str, TensorSpec]:
        dtypes = {rule.megatron: self.dtype_of(rule) for rule in self.model.rules}
        specs = {spec.name: spec for spec in self.model.specs(dtypes)}
        if self.model.is_ar:
            width = self.model.shape.hidden_size
            specs[HEAD] = TensorSpec(HEAD, torch.float32, (width, width))
        return specs

    @cached_property
    def _rule_of(self) -> dict[str, Rule]:
        return {part.hf: rule for rule in self.model.rules for part in rule.parts}

    def read(self, name: str) -> Tensor:
        if name == HEAD:
            return self.value_head()
        rule = self._rule_of[name]
        [part] = [part for part in rule.parts if part.hf == name]
        return self.parts(rule, [part])[name].reshape(rule.hf_shape(part))

    def value_head(self) -> Tensor:
        width = self.model.shape.hidden_size
        return self.reader.run(self.plan.parameters[HEAD], 0, width * width).view(width, width).float()

    def parts(self, rule: Rule, wanted: list[Part]) -> dict[str, Tensor]:
        """Some of the Hugging Face tensors of one parameter, element for element in their order.

        Where they are interleaved they are views of the parameter, with more axes than the tensor; else only what they
        need is read.
        """
        chunks = self.plan.parameters[rule.megatron]
        found, at = {}, 0
        if rule.slot_axis not in (None, 0):
            view = self.reader.run(chunks, 0, sum(chunk.numel for chunk in chunks)).view(rule.view)
            for part in rule.parts:
                if part in wanted:
                    found[part.hf] = view.narrow(rule.slot_axis, at, part.slots)
                at += part.slots
            return found
        for part in rule.parts:
            shape = rule.hf_shape(part)
            if part in wanted:
                found[part.hf] = self.reader.run(chunks, at, at + prod(shape)).view(shape)
            at += prod(shape)
        return found
