"""The NLA task: activations to prompts, responses to AR texts, and how well those rebuild the activations.

Legend: N rows or rollouts, B rows of a microbatch, T tokens, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_megatron import geometry
from nla_megatron.config.schema import CurriculumConfig
from nla_megatron.contract import columns
from nla_megatron.contract.prompts import PromptContract, extract_explanation
from nla_megatron.contract.sidecar import (
    DatasetSidecar,
    ModelSidecar,
    PoolSpec,
    check_dataset,
    prompt_contract,
    read_dataset_sidecar,
    read_model_sidecar,
)
from nla_megatron.contract.tables import Table
from nla_megatron.contract.tokenizer import ModelTokenizer, load_tokenizer
from nla_megatron.conversion.heads import is_reconstructor
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.projections import check_projections
from nla_megatron.errors import MissingFile, SidecarError
from nla_megatron.interventions.checks import Marker
from nla_megatron.interventions.spec import Intervention
from nla_megatron.models.batching import Batch, response_mask
from nla_megatron.models.pipeline import Collect
from nla_megatron.rollout.engine import PromptRequest
from nla_megatron.tasks.curriculum import Curriculum
from nla_megatron.tasks.nla_checks import MSE_SCALE, check_blocks, check_markers, check_table, differing, scale_name
from nla_megatron.types import Microbatch, Rollout

RowRunner = Callable[[Batch, Collect], Tensor]
"""Numbers per row of a batch: `TrainModule.rows`, or `models.pipeline.forward_rows` with a model in it."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of an AV's prompt, and where in it the row's activation enters, or each of its activations in order."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class NlaTask:
    """A table with the prompts, tokenizer and interventions that go with it.

    A `training_step` is what a curriculum goes by; without one it is the injection that the sidecar records.
    """

    table: Table
    sidecar: DatasetSidecar
    contract: PromptContract
    tokenizer: ModelTokenizer
    curriculum: Curriculum

    @classmethod
    def open(cls, data: str, stage: str, model: str, curriculum: CurriculumConfig | None = None) -> NlaTask:
        """Open a table for a model, after checking everything the sidecar promises against tokenizer and model.

        Raises:
            MissingFile, ColumnError, WidthError, SidecarError, MarkerError.
            MissingFile, CheckpointError: an AV without the projections that its sidecar names, or with others.
            ConfigError: a curriculum over blocks that the model lacks, or a tokenizer without an end for responses.
        """
        if not Path(data).is_file():
            raise MissingFile(
                f"no {data}", f"the {stage} table that `build` writes", "run `nla-megatron build`, or correct data="
            )
        sidecar, tokenizer = read_dataset_sidecar(data), load_tokenizer(model)
        if stage != "ar_sft":  # an AR reads texts and writes none
            tokenizer.check_ends()
        if sidecar.injection is None:
            raise SidecarError(
                f"no injection in the sidecar of {data}", "injection{method, layer, scale}", "build the table again"
            )
        shape, table = read_shape(model), Table.open(data, stage)
        check_dataset(
            sidecar,
            d_model=shape.hidden_size,
            layer_index=sidecar.extraction.layer_index,
            tokenizer=tokenizer,
        )
        spec = sidecar.injection
        check_table(table, sidecar)
        if table.varies and stage != "ar_sft":
            check_markers(table)
        # An AR has the blocks that it reads and no others.
        depth = None if is_reconstructor(model) else shape.num_layers
        if depth is not None:
            check_blocks(sidecar, spec, data, model, depth)
        vectors, bounds = PoolSpec.positions_of(sidecar.pool), PoolSpec.bounds_of(sidecar.pool)
        fewest = None if bounds is None else bounds[0]
        steps = Curriculum.of(spec, curriculum or CurriculumConfig(), depth, vectors, fewest)
        check_projections(model, steps.interventions, shape.hidden_size)
        return cls(
            table=table,
            sidecar=sidecar,
            contract=prompt_contract(sidecar).fixed(tokenizer),
            tokenizer=tokenizer,
            curriculum=steps,
        )

    def check_model(self, directory: str, role: str) -> ModelSidecar:
        """The sidecar of an AV or AR directory, after checking that it was trained for this very table's contract.

        Raises:
            MissingFile, SidecarError.
        """
        model = read_model_sidecar(directory)
        recorded = prompt_contract(model)
        pairs = {
            "role": (model.role, role),
            "prompt contract": (recorded.with_suffix_of(self.contract), self.contract),
            "extraction.layer_index": (model.extraction.layer_index, self.sidecar.extraction.layer_index),
        }
        pairs["extraction.mse_scale"] = (scale_name(model), MSE_SCALE)
        pairs["pool"] = (model.pool, self.sidecar.pool)
        if role == "av":
            same = recorded.form.same_prompt(self.contract.form)
            pairs["av_prompt"] = (self.contract.form if same else recorded.form, self.contract.form)
            pairs["injection"] = (model.injection, self.sidecar.injection)
        for key, (found, expected) in pairs.items():
            if found != expected:
                told, wanted = differing(found, expected)
                raise SidecarError(
                    f"{key} = {told} in the sidecar of {directory}",
                    f"{wanted}, as in the sidecar of {self.table.path}",
                    "use a model and a table of the same build",
                )  # fmt: skip
        return model

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """What models that read the table's activations are started with: one for each block, a curriculum's last."""
        return self.curriculum.interventions

    @property
    def projection_dropout(self) -> float:
        """Between the layers of the projections, in supervised training."""
        injection = self.sidecar.injection
        return 0.0 if injection is None or injection.projection is None else injection.projection.dropout

    @property
    def marker(self) -> Marker:
        """What must stand at and beside the position of every vector."""
        return Marker(self.contract.marker_id, self.contract.left_id, self.contract.right_id)

    @cached_property
    def _prompts(self) -> dict[int, Prompt]:
        """By how many activations a row keeps."""
        return {}

    def prompt(self, activations: int) -> Prompt:
        """The AV's prompt: the same tokens for every row that keeps as many activations, others in each."""
        if activations not in self._prompts:
            ids = self.contract.av_prompt_ids(self.tokenizer, activations=activations)
            positions = self.contract.marker_positions(ids, activations=activations)
            self._prompts[activations] = Prompt(tuple(ids), positions)
        return self._prompts[activations]

    def prompt_of(self, row: int) -> Prompt:
        """A row's."""
        return self.prompt(int(self.table.activations[row]))

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Of a row with the most activations of the table; where all keep as many, every row's."""
        return self.prompt(self.table.positions).ids

    @property
    def mse_scale(self) -> float | str | None:
        """The scale at which errors and variances are taken."""
        return MSE_SCALE

    @property
    def marker_position(self) -> int:
        """The first of `marker_positions`."""
        return self.marker_positions[0]

    @property
    def marker_positions(self) -> tuple[int, ...]:
        """Where the vector enters `prompt_ids`, or each of a row's vectors in order."""
        return self.prompt(self.table.positions).positions

    def inputs(self, rows: Sequence[int]) -> np.ndarray:
        """What the AV reads of each row: (N, D), or where rows keep several activations (N, K, D) as `Table.inputs`."""
        return self.table.inputs(rows, PoolSpec.positions_of(self.sidecar.pool))

    def requests(
        self, rows: Sequence[int], seed: int, step: int, training_step: int | None = None
    ) -> list[PromptRequest]:
        """One prompt per row; sampling seeds depend on (seed, step, row) alone, on no layout."""
        condition = self.curriculum.at(training_step)
        prompts = [self.prompt_of(row) for row in rows]
        return [
            PromptRequest(
                group, row, prompt.ids, prompt.positions[0], _sampling_seed(seed, step, row), prompt.positions[1:],
                only=condition.only, strengths=condition.strengths,
            )
            for group, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        ]  # fmt: skip

    def response_batch(
        self,
        rows: Sequence[int],
        responses: Sequence[Sequence[int]],
        training_step: int | None = None,
        /,
        **fields: Tensor,
    ) -> Batch:
        """AV sequences (prompt + response) with their activations; `fields` are added to the mask and targets."""
        condition = self.curriculum.at(training_step)
        prompts = [self.prompt_of(row) for row in rows]
        ids = [[*prompt.ids, *response] for prompt, response in zip(prompts, responses, strict=True)]
        prompt_lengths, lengths = [len(prompt.ids) for prompt in prompts], [len(row) for row in ids]
        mask = response_mask(prompt_lengths, lengths, max(lengths))
        return Batch(
            ids=ids,
            fields={"mask": mask, **fields},
            positions=[prompt.positions for prompt in prompts],
            only=None if condition.only is None else [condition.only] * len(ids),
            strengths=None if condition.strengths is None else [condition.strengths] * len(ids),
            prompt_lengths=prompt_lengths,
            training_step=training_step or 0,
            vectors=lambda chosen: self.inputs([rows[index] for index in chosen]),
        )

    def text_batch(self, rows: Sequence[int], explanations: Sequence[str]) -> Batch:
        """AR sequences with their target activations."""
        return self._targets(rows, [self.contract.ar_ids(self.tokenizer, text) for text in explanations])

    def gold_text_batch(self, rows: Sequence[int]) -> Batch:
        """AR sequences of an ar_sft table's own prompts with their target activations."""
        return self._targets(
            rows, [self.contract.ar_prompt_ids(self.tokenizer, self.gold_prompts[row]) for row in rows]
        )

    def _targets(self, rows: Sequence[int], ids: list[list[int]]) -> Batch:
        return Batch(ids=ids, vectors=lambda chosen: self.table.vectors([rows[index] for index in chosen]))

    def gold_response_ids(self, row: int) -> list[int]:
        """The response that supervised training teaches for a row of an av_sft table, end token included."""
        return self.contract.av_response_ids(self.tokenizer, self.gold_responses[row])

    @cached_property
    def gold_responses(self) -> list[str]:
        return self.table.column(columns.RESPONSE)

    @cached_property
    def gold_prompts(self) -> list[str]:
        return self.table.column(columns.PROMPT)

    @cached_property
    def gold_explanations(self) -> list[str]:
        return self.table.column(columns.EXPLANATION)

    def place(self, row: int) -> dict[str, Any]:
        """Where a row's activation was read, for records: the document, the position in it, the token there.

        The token is the last of the row's text, as the tokenizer reads that; none where the table keeps no text.
        """
        text = self.table.value(columns.TEXT, row)
        ids = self.tokenizer.encode(text) if text else []
        return {
            "row": row,
            "doc_id": self.table.value(columns.DOC_ID, row),
            "position": self.table.value(columns.N_RAW_TOKENS, row) - 1,
            "token": self.tokenizer.decode(ids[-1:]) if ids else None,
        }

    def normalised_targets(self, rows: Sequence[int]) -> Tensor:
        """Activations (N, D) fp32 at the scale of the loss."""
        return geometry.normalise(torch.from_numpy(self.table.vectors(rows)), MSE_SCALE)

    def score(self, run: RowRunner, rows: Sequence[int], explanations: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """The AR's squared error per rollout (N,) and which rollouts have no explanation (N,) bool.

        A failed one counts as the orthogonal prediction: its error is 2.
        """
        good = [index for index, text in enumerate(explanations) if text is not None]
        mse_N = torch.full((len(explanations),), 2.0)
        if good:
            batch = self.text_batch([rows[index] for index in good], [str(explanations[index]) for index in good])
            mse_N[good] = run(batch, squared_error)
        failed_N = torch.ones(len(explanations), dtype=torch.bool)
        failed_N[good] = False
        return mse_N, failed_N


def squared_error(predicted_BD: Tensor, part: Microbatch) -> Tensor:
    """Mean squared error per row (B,) at the scale of the loss: 2 (1 - cosine)."""
    assert part.vectors is not None
    return geometry.row_mse(predicted_BD, part.vectors, MSE_SCALE)


def explanations_of(rollouts: Sequence[Rollout]) -> list[str | None]:
    """The explanation of each finished, well-formed response; None for the others."""
    return [extract_explanation(rollout.text) if rollout.finished else None for rollout in rollouts]


def _sampling_seed(seed: int, step: int, row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{row}".encode()).digest()[:4], "big") >> 1
