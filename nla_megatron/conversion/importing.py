"""A Hugging Face directory to a `torch_dist` checkpoint: every worker writes whole files, one parameter at a time.

out/weights/…                 the distributed checkpoint, readable on any layout
out/config.json, tokenizer…   what goes with the weights in a Hugging Face directory
out/conversion.json           the manifest
"""

from __future__ import annotations

import re
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from nla_megatron.conversion.checkpoint_plan import CheckpointPlan, checkpoint_plan
from nla_megatron.conversion.description import HEAD, SIDECAR, WEIGHTS, checkpoint_files
from nla_megatron.conversion.hf import check_vocabulary, copy_companions
from nla_megatron.conversion.manifest import Record, write_manifest
from nla_megatron.conversion.projections import carry_projections
from nla_megatron.conversion.rules import Rule
from nla_megatron.conversion.safetensors_file import TensorSpec, cast, hasher
from nla_megatron.conversion.source import HuggingFaceSide
from nla_megatron.conversion.torch_dist import CheckpointFile, Run, Written, file_name, write_checkpoint_metadata
from nla_megatron.conversion.work import Work
from nla_megatron.disk import room_on
from nla_megatron.errors import CheckpointError
from nla_megatron.parallel.collectives import barrier, broadcast_object
from nla_megatron.parallel.world import World


class Import:
    """An import, checked: `run` is all that is left. Raises as `HuggingFaceSide` and `Work.check` do."""

    def __init__(
        self, source: str | Path, out: str | Path, *,
        dtype: torch.dtype | None = None, layers: int | None = None, shard_bytes: int, durable: bool = True,
    ):  # fmt: skip
        self.side, self.dtype, self.layers = HuggingFaceSide(source, layers), dtype, layers
        self.dtypes = {rule.megatron: dtype or self.side.dtype_of(rule) for rule in self.side.model.rules}
        check_stacked(self.dtypes)
        check_vocabulary(self.side.directory, self.side.model.shape.vocab_size)
        self.files = checkpoint_files(self.side.model, self.dtypes, shard_bytes)
        shards = [*self.side.reader.files, *filter(Path.is_file, (self.side.head_file,))]
        self.work = Work(
            out,
            {
                "direction": "import", "source": str(self.side.directory.resolve()), "layers": layers,
                "dtype": None if dtype is None else str(dtype).removeprefix("torch."), "shard_bytes": shard_bytes,
                "shards": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards],
            },
            durable,
        )  # fmt: skip
        self.finished = self.work.check()
        if not self.finished:
            self.work.check_room(sum(spec.nbytes for spec in self.side.model.specs(self.dtypes)))

    def run(self, world: World) -> None:
        """Write what is not written yet; collective."""
        names = [f"{WEIGHTS}/{file_name(number)}" for number in range(len(self.files))]
        mine = None
        if world.is_main:
            plan = checkpoint_plan(self.side.model.shape, world, is_ar=self.side.model.is_ar)
            self._check_plan(plan)
            self.work.begin()
            (self.work.partial / WEIGHTS).mkdir(exist_ok=True)
            mine = plan, self.work.unfinished(names)
        plan, todo = broadcast_object(mine, world)
        self.work.join()
        with room_on(self.work.partial):
            for name in todo[world.rank :: world.size]:
                number = names.index(name)
                entry = self._write(number, self.files[number], plan)
                self.work.finish(name, entry)
            self.work.flush()
        barrier(world)
        if world.is_main:
            with room_on(self.work.partial):
                self._complete(names, plan)
        barrier(world)

    def _check_plan(self, plan: CheckpointPlan) -> None:
        ours = {name for file in self.files for name in file}
        assert ours == set(plan.parameters), f"the table and the model differ in {sorted(ours ^ set(plan.parameters))}"

    def _write(self, number: int, names: list[str], plan: CheckpointPlan) -> dict[str, Any]:
        rules = {rule.megatron: rule for rule in self.side.model.rules}
        records: list[Record] = []
        file = CheckpointFile(self.work.partial / WEIGHTS, file_name(number))
        try:
            for key, data in plan.objects.items() if number == 0 else ():
                file.write_object(key, data)
            for name in names:
                runs, parts = self._runs(rules.get(name))
                dtype = parts[0][0].dtype
                for chunk in sorted(plan.parameters[name], key=lambda one: one.start):
                    file.write_chunk(chunk, dtype, taken(runs, chunk.numel))
                records += [Record.of(spec, digest.hexdigest(), f"{WEIGHTS}/{file.file}") for spec, digest in parts]
        finally:
            file.close()
        return {"written": [vars(one) for one in file.entries], "records": [vars(one) for one in records]}

    def _runs(self, rule: Rule | None) -> tuple[deque[Run], list[tuple[TensorSpec, Any]]]:
        """A parameter as runs of its Hugging Face tensors, which are maps of the source, and what will sum each."""
        if rule is None:
            tensors = {HEAD: self.side.value_head()}
            views = [tensors[HEAD]]
        else:
            dtype = self.dtypes[rule.megatron]
            tensors = {
                part.hf: cast(self.side.reader.whole(part.hf), TensorSpec(part.hf, dtype, rule.hf_shape(part)))
                for part in rule.parts
            }
            views = [tensor if rule.rows is not None else tensor.view(rule.part_view(part))
                     for part, tensor in zip(rule.parts, tensors.values(), strict=True)]  # fmt: skip
        digests = [hasher() for _ in views]
        stacked = () if rule is None or not rule.slot_axis else rule.view[: rule.slot_axis]
        runs = deque(
            Run(view[index].reshape(-1), digest)
            for index in product(*map(range, stacked))
            for view, digest in zip(views, digests, strict=True)
        )
        if rule is not None and rule.rows is not None:
            padding = (rule.view[0] - rule.rows) * prod(rule.view[1:])
            runs.append(Run(torch.zeros(padding, dtype=views[0].dtype)))
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        return runs, list(zip(specs, digests, strict=True))

    def _complete(self, names: list[str], plan: CheckpointPlan) -> None:
        partial, entries = self.work.partial, self.work.entries(names)
        written = [
            Written(**{**one, **{key: one[key] and tuple(one[key]) for key in ("offsets", "sizes")}})
            for entry in entries
            for one in entry["written"]
        ]
        write_checkpoint_metadata(partial / WEIGHTS, written, plan.keys())
        dtype = next(iter(self.dtypes.values()))
        copy_companions(self.side.directory, partial, dict(self.side.model.config), dtype)
        # The sidecar of a whole model does not describe the AR that is cut out of it.
        if self.layers is None and (self.side.directory / SIDECAR).is_file():
            shutil.copyfile(self.side.directory / SIDECAR, partial / SIDECAR)
            carry_projections(self.side.directory, partial)
        records = [Record(**one) for entry in entries for one in entry["records"]]
        write_manifest(partial, self.side.directory, self.work.plan, records)
        self.work.publish()


def check_stacked(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raises CheckpointError where a parameter differs in dtype between blocks or experts, which lie in one tensor."""
    seen: dict[str, torch.dtype] = {}
    for name, dtype in dtypes.items():
        kind = re.sub(r"\.\d+\.", ".", name)
        if seen.setdefault(kind, dtype) != dtype:
            raise CheckpointError(
                f"{name} of dtype {dtype}, and {seen[kind]} in another block",
                "one dtype for a parameter of all blocks", "choose one with dtype=",
            )  # fmt: skip


def taken(runs: deque[Run], numel: int) -> Iterator[Run]:
    """The next elements of `runs`, which they leave; a run is cut where they end inside it."""
    while numel:
        run = runs.popleft()
        if run.elements.numel() > numel:
            runs.appendleft(Run(run.elements[numel:], run.digest))
            run = Run(run.elements[:numel], run.digest)
        numel -= run.elements.numel()
        yield run
