"""Who holds, who needs, and one rank's part of a plan. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from nla_megatron.reshard.copies import Copy
from nla_megatron.reshard.regions import Piece

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, eq=False)
class Group:
    """Ranks that hold the same pieces, ascending; `number` is the same on every rank that computes it.

    There is one object for a group: it is compared by identity.
    """

    number: int
    ranks: tuple[int, ...]

    @cached_property
    def members(self) -> frozenset[int]:
        return frozenset(self.ranks)


class Claim(NamedTuple):
    """Every rank of the group holds the piece; `dtype` is the buffer's where it is not that of the others."""

    piece: Piece
    group: Group
    dtype: str | None = None


class Need(NamedTuple):
    """A region, where it has to go, and in which dtype."""

    piece: Piece
    dtype: str


@dataclass(frozen=True)
class Sampler:
    """Ranks, ascending, that all need the same; needs are in the order of loading."""

    ranks: tuple[int, ...]
    needs: tuple[Need, ...]


@dataclass(frozen=True)
class Message:
    """`size` elements packed by (or unpacked with) `copies`; `peers` all get the same, or the one sender."""

    peers: tuple[int, ...]
    tag: int
    dtype: str
    size: int
    copies: tuple[Copy, ...]

    @property
    def bytes(self) -> int:
        return self.size * ITEMSIZE[self.dtype]


@dataclass
class Bucket:
    """What is under way at once: the exchange, and local copies meanwhile."""

    local: list[Copy] = field(default_factory=list)
    sends: list[Message] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)

    @property
    def staging(self) -> int:
        return sum(message.bytes for message in (*self.sends, *self.receives))


@dataclass(frozen=True)
class Plan:
    """One rank's part. Bytes are those on the wire: of the narrower of the two dtypes."""

    rank: int
    buckets: tuple[Bucket, ...]
    bytes_needed: int
    bytes_local: int

    @property
    def bytes_bound(self) -> int:
        """What this rank must be sent: needed and not held."""
        return self.bytes_needed - self.bytes_local

    @property
    def bytes_sent(self) -> int:
        return sum(message.bytes * len(message.peers) for bucket in self.buckets for message in bucket.sends)

    @property
    def bytes_received(self) -> int:
        return sum(message.bytes for bucket in self.buckets for message in bucket.receives)

    @property
    def messages(self) -> int:
        return sum(len(message.peers) for bucket in self.buckets for message in bucket.sends)

    @property
    def staging(self) -> int:
        """Bytes of packed buffers at the fullest moment."""
        return max((bucket.staging for bucket in self.buckets), default=0)
