"""Carrying out a plan: strided local copies, one batched exchange per bucket beside them, and the checks around it.

A bucket's messages are packed, its exchange is begun, local copies are made meanwhile, then what came is unpacked.
All ranks go through their buckets in ascending order, so that no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nla_megatron.errors import NotFinite, PeerLost, ReshardMismatch
from nla_megatron.parallel.collectives import gather_objects
from nla_megatron.parallel.world import World
from nla_megatron.reshard.carriers import Bucket, Claim, Message, Plan, Sampler
from nla_megatron.reshard.copies import PACKED, Copy
from nla_megatron.reshard.plan import by_name
from nla_megatron.reshard.regions import Piece

_SAMPLED_ELEMENTS = 1 << 16


class Targets(Protocol):
    """The sampler's buffers: `tensor` may be asked for until `finish`, which makes a buffer part of the model."""

    def tensor(self, name: str) -> Tensor: ...
    def finish(self, name: str) -> None: ...


def viewed(buffer: Tensor, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A strided view of a contiguous tensor, which may itself lie in a larger storage."""
    assert buffer.is_contiguous()
    return buffer.as_strided(shape, strides, buffer.storage_offset() + offset)


@torch.no_grad()
def carry_out(
    plan: Plan, sources: Mapping[str, Tensor], targets: Targets, device: torch.device, made: Container[str] = ()
) -> int:
    """Do this rank's part; every rank of the plan does so at the same time.

    Args:
        made: sources that are made when they are asked for.

    Raises:
        PeerLost: another rank ended.

    Returns:
        Bytes of packed buffers and of tensors made for the sources (merged adapters) at the fullest moment.
    """
    last = {name: number for number, bucket in enumerate(plan.buckets) for name in _written(bucket)}
    most = 0
    for number, bucket in enumerate(plan.buckets):
        # Packed buffers and what is made for the sources go with the call, before the next bucket's are made.
        most = max(most, bucket.staging + _carry_bucket(bucket, _Held(sources, made), targets, device))
        for name in _written(bucket):
            if last[name] == number:
                targets.finish(name)
    return most


def _carry_bucket(bucket: Bucket, held: _Held, targets: Targets, device: torch.device) -> int:
    """Returns the bytes that were made for the sources."""
    sends = [(message, _packed(message, held, device)) for message in bucket.sends]
    receives = [(message, _empty(message, device)) for message in bucket.receives]
    with peers_there():
        works = _exchange(sends, receives)
    for copy in bucket.local:
        do(copy, held[copy.source], targets.tensor(copy.target))
    with peers_there():
        for work in works:
            work.wait()
    for message, packed in receives:
        for copy in message.copies:
            do(copy, packed, targets.tensor(copy.target))
    return held.made


@contextmanager
def peers_there() -> Iterator[None]:
    """Around what waits for other ranks: one that has ended breaks it, as a plain RuntimeError of the transport's."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            f"a rank that ended in the middle of a load ({str(error).splitlines()[0][:120]})", "all ranks to its end",
            "see the first error, or who ended that rank; then resume",
        ) from error  # fmt: skip


class _Held(dict[str, Tensor]):
    """Sources of one bucket: one that is made when it is asked for is made once, and given back with the bucket."""

    def __init__(self, sources: Mapping[str, Tensor], made: Container[str]):
        super().__init__()
        self.sources, self.are_made, self.made = sources, made, 0

    def __missing__(self, name: str) -> Tensor:
        self[name] = tensor = self.sources[name]
        self.made += tensor.nbytes if name in self.are_made else 0
        return tensor


def _written(bucket: Bucket) -> list[str]:
    copies = [*bucket.local, *(copy for message in bucket.receives for copy in message.copies)]
    return list(dict.fromkeys(copy.target for copy in copies))


def _empty(message: Message, device: torch.device) -> Tensor:
    return torch.empty(message.size, dtype=getattr(torch, message.dtype), device=device)


def _packed(message: Message, held: Mapping[str, Tensor], device: torch.device) -> Tensor:
    packed = _empty(message, device)
    for copy in message.copies:
        assert copy.target == PACKED
        do(copy, held[copy.source], packed)
    return packed


def _exchange(sends: list[tuple[Message, Tensor]], receives: list[tuple[Message, Tensor]]) -> list[dist.Work]:
    operations = [
        dist.P2POp(call, packed, peer, tag=message.tag)
        for call, messages in ((dist.irecv, receives), (dist.isend, sends))
        for message, packed in messages
        for peer in message.peers
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def do(copy: Copy, source: Tensor, target: Tensor) -> None:
    """One copy of a plan; casts on the way where the dtypes differ."""
    viewed(target, copy.target_offset, copy.shape, copy.target_strides).copy_(
        viewed(source, copy.source_offset, copy.shape, copy.source_strides)
    )


@torch.no_grad()
def check_finite(parameters: Mapping[str, Tensor], world: World) -> None:
    """Collective. Raises NotFinite on every rank where a weight of any rank is NaN or infinite."""
    mine = next((name for name, tensor in parameters.items() if not _finite(tensor)), None)
    with peers_there():
        everyone = gather_objects(mine, world)
    for rank, name in enumerate(everyone):
        if name is not None:
            raise NotFinite(
                f"NaN or infinity in {name} on rank {rank}", "finite weights",
                "nothing was handed over; look at the last steps' losses and gradient norms",
            )  # fmt: skip


def _finite(tensor: Tensor) -> bool:
    # The sum costs no memory, and is finite unless a weight is not; large finite ones may overflow it, so look closer.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


class Gate:
    """Checksums of a random sample of regions, as the trainer holds them and as they arrived; alike on all ranks.

    `arrived` is asked when a target is complete, before the sampler repacks it.
    """

    def __init__(self, claims: Sequence[Claim], samplers: Sequence[Sampler], rank: int, count: int, seed: int):
        self.rank, self.sums, self.wrong = rank, dict[tuple[str, str], int](), list[str]()
        self.arriving: dict[str, list[tuple[Piece, str]]] = {}
        self.leaving: list[tuple[Piece, str]] = []
        book = by_name(claims)
        for number, sampler in enumerate(samplers):
            draw = np.random.default_rng([seed, number])
            for index in draw.choice(len(sampler.needs), min(count, len(sampler.needs)), replace=False).tolist():
                need = sampler.needs[index]
                parts = list(need.piece.region.chunks(_SAMPLED_ELEMENTS))
                region = parts[int(draw.integers(len(parts)))]
                for claim in book[region.name]:
                    both = region.intersect(claim.piece.region)
                    if both is None:
                        continue
                    if rank in sampler.ranks:
                        self.arriving.setdefault(need.piece.buffer, []).append((need.piece.within(both), need.dtype))
                    if rank in claim.group.members:
                        self.leaving.append((claim.piece.within(both), need.dtype))

    def left(self, sources: Mapping[str, Tensor]) -> None:
        """Note what this rank holds of the sample."""
        for piece, dtype in self.leaving:
            self._note(piece, dtype, sources[piece.buffer])

    def arrived(self, name: str, tensor: Tensor) -> None:
        for piece, dtype in self.arriving.get(name, ()):
            self._note(piece, dtype, tensor)

    def _note(self, piece: Piece, dtype: str, tensor: Tensor) -> None:
        key, found = (str(piece.region), dtype), _checksum(piece, dtype, tensor)
        if self.sums.setdefault(key, found) != found:
            self.wrong.append(f"{piece.region} on rank {self.rank}")

    def compare(self, world: World) -> None:
        """Collective. Raises ReshardMismatch on every rank where any two disagree."""
        seen: dict[tuple[str, str], tuple[int, int]] = {}
        with peers_there():
            everyone = gather_objects((self.sums, self.wrong), world)
        for rank, (sums, wrong) in enumerate(everyone):
            for key, value in sums.items():
                first, other = seen.setdefault(key, (value, rank))
                wrong = wrong if first == value else [*wrong, f"{key[0]} on rank {rank} and on rank {other}"]
            if wrong:
                raise ReshardMismatch(
                    f"other weights after the load: {wrong[0]}", "the trainer's, bit for bit",
                    "this is a defect of resharding, or of a replica that trains apart: report it",
                )  # fmt: skip


def _checksum(piece: Piece, dtype: str, tensor: Tensor) -> int:
    """Of the bits and of their order."""
    values = viewed(tensor, piece.offset, piece.region.shape, piece.strides).to(getattr(torch, dtype)).flatten()
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16).long()
    return int((bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum())
