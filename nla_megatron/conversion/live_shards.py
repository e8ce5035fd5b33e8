"""A live model's tensors to shards: all ranks see every tensor, and each shard is written by another rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from nla_megatron.conversion.hf import SHARD_BYTES, write_index
from nla_megatron.conversion.safetensors_file import ShardFile, TensorSpec, plan_shards
from nla_megatron.disk import flush_to_disk, room_on
from nla_megatron.parallel.collectives import barrier
from nla_megatron.parallel.world import World


def write_live_shards(
    directory: Path, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, Tensor]], world: World,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write `tensors`, which come alike on every rank and in the order of `specs`; collective.

    A rank writes in the background while the next shards' tensors are gathered: it holds at most one shard, and with
    one rank one tensor. Raises DiskFull.
    """
    shards, stream = plan_shards(specs, shard_bytes), iter(tensors)
    pending: list[Future[str]] = []
    with room_on(directory), ThreadPoolExecutor(1) as writer:
        for number, shard in enumerate(shards):
            if number % world.size != world.rank:
                for _ in shard.specs:
                    next(stream)
                continue
            _wait(pending)
            file = ShardFile(directory, shard)
            for _ in shard.specs:
                name, tensor = next(stream)
                pending.append(writer.submit(file.write, name, tensor.cpu()))
                if world.size == 1:
                    _wait(pending)
            # Behind its tensors in the writer's queue.
            pending.append(writer.submit(_closed, file))
        # Where tensors are gathered, the last step is one of all ranks.
        assert next(stream, None) is None, "more tensors than were planned"
        _wait(pending)
    barrier(world)
    if world.is_main:
        write_index(directory, shards)


def _wait(pending: list[Future[str]]) -> None:
    for written in pending:
        written.result()
    pending.clear()


def _closed(file: ShardFile) -> str:
    file.close()
    flush_to_disk(file.path)
    assert not file.missing()
    return file.shard.file
