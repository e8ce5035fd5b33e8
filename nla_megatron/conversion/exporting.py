"""A distributed checkpoint to a Hugging Face directory: every worker writes whole shards, one tensor at a time.

Names, shapes and dtypes of all tensors are known from the configuration, so each shard's header and offsets are
written first, and a shard needs nothing of another.
"""

from __future__ import annotations

import shutil
from itertools import groupby
from pathlib import Path

import torch

from nla_megatron.conversion.description import HEAD, SIDECAR
from nla_megatron.conversion.formats.weights import check_finite
from nla_megatron.conversion.hf import VALUE_HEAD, check_vocabulary, copy_companions, write_index, write_value_head
from nla_megatron.conversion.manifest import Record, write_manifest
from nla_megatron.conversion.projections import carry_projections
from nla_megatron.conversion.safetensors_file import Shard, ShardFile, TensorSpec, cast, checksum, plan_shards
from nla_megatron.conversion.source import MegatronSide
from nla_megatron.conversion.work import Work
from nla_megatron.disk import room_on
from nla_megatron.parallel.collectives import barrier, broadcast_object
from nla_megatron.parallel.world import World


class Export:
    """An export, checked: `run` is all that is left; making one is collective. Raises as `MegatronSide` does."""

    def __init__(
        self, checkpoint: str | Path, companions: str | Path | None, out: str | Path, world: World, *,
        dtype: torch.dtype | None = None, shard_bytes: int, durable: bool = True,
    ):  # fmt: skip
        # The first rank builds the plan, the others are told.
        mine = MegatronSide(checkpoint, companions, world) if world.is_main else None
        plan = broadcast_object(mine.plan if mine else None, world)
        self.side = mine or MegatronSide(checkpoint, companions, world, plan)
        self.own_companions, model = companions is None, self.side.model
        self.rule_of = {part.hf: rule for rule in model.rules for part in rule.parts}
        self.dtypes = {rule.megatron: dtype or self.side.dtype_of(rule) for rule in model.rules}
        self.shards = plan_shards(model.specs(self.dtypes), shard_bytes)
        check_vocabulary(self.side.companions, model.shape.vocab_size)
        files = sorted(self.side.reader.directory.glob("*.distcp"))
        self.work = Work(
            out,
            {
                "direction": "export", "source": str(self.side.reader.directory.resolve()),
                "companions": str(self.side.companions.resolve()),
                "dtype": None if dtype is None else str(dtype).removeprefix("torch."), "shard_bytes": shard_bytes,
                "shards": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            },
            durable,
        )  # fmt: skip
        self.finished = self.work.check()
        if not self.finished:
            self.work.check_room(sum(shard.nbytes for shard in self.shards))

    def run(self, world: World) -> None:
        """Write the shards that are not written yet; collective."""
        names = [shard.file for shard in self.shards]
        todo: list[str] | None = None
        if world.is_main:
            self.work.begin()
            todo = self.work.unfinished(names)
        todo = broadcast_object(todo, world)
        self.work.join()
        with room_on(self.work.partial):
            for name in todo[world.rank :: world.size]:
                records = self._write(self.shards[names.index(name)])
                self.work.finish(name, {"records": [vars(record) for record in records]})
            self.work.flush()
        barrier(world)
        if world.is_main:
            with room_on(self.work.partial):
                self._complete(names)
        barrier(world)

    def _write(self, shard: Shard) -> list[Record]:
        records: list[Record] = []
        file = ShardFile(self.work.partial, shard)
        try:
            for rule, group in groupby(shard.specs, key=lambda spec: self.rule_of[spec.name]):
                specs = list(group)
                names = {spec.name for spec in specs}
                tensors = self.side.parts(rule, [part for part in rule.parts if part.hf in names])
                self.work.flush_behind(shard.file, sum(spec.nbytes for spec in specs))
                for spec in specs:
                    tensor = tensors.pop(spec.name)
                    check_finite(tensor, spec.name, self.side.reader.directory)
                    told = file.write(spec.name, cast(tensor, spec))
                    records.append(Record.of(spec, told, shard.file))
        finally:
            file.close()
        assert not file.missing()
        return records

    def _complete(self, names: list[str]) -> None:
        partial, side = self.work.partial, self.side
        write_index(partial, self.shards)
        records = [Record(**one) for entry in self.work.entries(names) for one in entry["records"]]
        if side.model.is_ar:
            head = side.value_head()
            write_value_head(partial, head)
            spec = TensorSpec(HEAD, head.dtype, tuple(head.shape))
            records.append(Record.of(spec, checksum(head), VALUE_HEAD))
        dtype = next(iter(self.dtypes.values()))
        copy_companions(side.companions, partial, dict(side.model.config), dtype)
        # The sidecar of a base model does not describe what was trained from it.
        if self.own_companions and (side.companions / SIDECAR).is_file():
            shutil.copyfile(side.companions / SIDECAR, partial / SIDECAR)
            carry_projections(side.companions, partial)
        write_manifest(partial, side.reader.directory, self.work.plan, records)
        self.work.publish()
