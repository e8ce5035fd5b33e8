"""From who holds which region and who needs which to copies and messages. Pure: every rank compiles only its own part.

Legend: a *group* is the ranks that hold the same pieces (data-parallel replicas, replicated tensors), a *sampler* the
ranks that need the same regions (one tensor-parallel rank of every replica). J ranks of a sampler that do not hold a
region themselves are served by the H ranks of its group: each sends as near as can be to J/H shares, and what goes to
several ranks is packed once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from nla_megatron.errors import OverlappingClaims, UnheldRegion
from nla_megatron.reshard.carriers import ITEMSIZE, Bucket, Claim, Group, Message, Plan, Sampler
from nla_megatron.reshard.copies import PACKED, copy_between, fused
from nla_megatron.reshard.regions import Piece, contiguous, missing, overlap


class _Match(NamedTuple):
    need: Piece
    held: Piece


def by_name(claims: Iterable[Claim]) -> dict[str, list[Claim]]:
    book: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        book[claim.piece.region.name].append(claim)
    return book


def check_claims(claims: Iterable[Claim]) -> None:
    """Raises OverlappingClaims where two groups (or one twice) hold the same elements under different claims."""
    for several in by_name(claims).values():
        twice = overlap([claim.piece.region for claim in several]) if len(several) > 1 else None
        if twice is not None:
            raise OverlappingClaims(
                f"{twice[0]} and {twice[1]}", "shards without common elements",
                "correct the family's conversion rules",
            )  # fmt: skip


def compile_plan(claims: Sequence[Claim], samplers: Sequence[Sampler], rank: int, dtype: str, staging: int) -> Plan:
    """What `rank` copies, sends and receives.

    Args:
        claims: of all ranks; disjoint, see `check_claims`.
        dtype: of the buffers that hold, where a claim does not say.
        staging: bound on the bytes of packed buffers at any moment.

    Raises:
        UnheldRegion: this rank needs what nobody holds.
    """
    everything, routes = by_name(claims), _Routes(rank)
    widest = _widest(claims, dtype)
    mine = by_name(claim for claim in claims if rank in claim.group.members)
    most = max(1, staging // (len(samplers) + 1))
    buckets: dict[int, Bucket] = defaultdict(Bucket)
    needed = local = 0
    for sampler in samplers:
        place = sampler.ranks.index(rank) if rank in sampler.ranks else None
        book = mine if place is None else everything
        for key, matches in _matches(sampler, book, dtype, most, place is not None, widest):
            group, bucket = key.group, buckets[key.number]
            width = sum(match.need.region.size for match in matches) * ITEMSIZE[key.dtype]
            route = routes.of(sampler, group)
            needed += width if place is not None else 0
            if place is not None and rank in group.members:
                local += width
                bucket.local += fused(copy_between(match.held, match.need) for match in matches)
            for peer, shares, share in route.receives:
                part = _share(matches, shares, (share + key.number) % shares)
                if part:
                    bucket.receives.append(_message((peer,), key, part, packs=False))
            for (shares, share), peers in route.sends.items():
                part = _share(matches, shares, (share + key.number) % shares)
                if part:
                    bucket.sends.append(_message(peers, key, part, packs=True))
    return Plan(rank, tuple(buckets[number] for number in sorted(buckets)), needed, local)


def _widest(claims: Iterable[Claim], dtype: str) -> int:
    return max(ITEMSIZE[one] for one in {dtype, *(claim.dtype or dtype for claim in claims)})


class _Key(NamedTuple):
    """What can travel in one message: bucket, who holds it, dtype on the wire."""

    number: int
    group: Group
    dtype: str


def _matches(
    sampler: Sampler, book: Mapping[str, Sequence[Claim]], dtype: str, most: int, complete: bool, widest: int
) -> Iterator[tuple[_Key, list[_Match]]]:
    """The sampler's needs where claims of `book` meet them; alike on every rank for the claims that both know."""
    found: dict[_Key, list[_Match]] = defaultdict(list)
    number = filled = 0
    for need in sampler.needs:
        claims = book.get(need.piece.region.name, ())
        # As wide as any claim: not every rank knows those that meet this need, and all must cut alike.
        size = min(ITEMSIZE[need.dtype], widest)
        for region in need.piece.region.chunks(max(1, most // size)):
            width, covered = region.size * size, 0
            if filled and filled + width > most:
                number, filled = number + 1, 0
            filled += width
            for claim in claims:
                both = region.intersect(claim.piece.region)
                if both is not None:
                    covered += both.size
                    match = _Match(need.piece.within(both), claim.piece.within(both))
                    wire = min(need.dtype, claim.dtype or dtype, key=ITEMSIZE.__getitem__)
                    found[_Key(number, claim.group, wire)].append(match)
            if complete and covered != region.size:
                [*_, lost] = missing(region, [claim.piece.region for claim in claims])
                raise UnheldRegion(
                    f"{lost} is held by no rank", "all of the sampler's tensors on the trainer",
                    "check that both sides are the same model",
                )  # fmt: skip
    yield from found.items()


class _Route(NamedTuple):
    """Of one sampler's regions in one group: (peer, shares, share) of what comes; peers by share of what goes."""

    receives: list[tuple[int, int, int]]
    sends: dict[tuple[int, int], tuple[int, ...]]


class _Routes:
    """The routes of one rank; all buckets of a sampler and a group take the same."""

    def __init__(self, rank: int):
        self.rank = rank
        self.known: dict[tuple[int, int], _Route] = {}

    def of(self, sampler: Sampler, group: Group) -> _Route:
        key = id(sampler), group.number
        if key not in self.known:
            self.known[key] = self._route(sampler.ranks, group)
        return self.known[key]

    def _route(self, ranks: tuple[int, ...], group: Group) -> _Route:
        remote = [one for one in ranks if one not in group.members]
        receives: list[tuple[int, int, int]] = []
        sends: dict[tuple[int, int], tuple[int, ...]] = {}
        many, holders = len(remote), len(group.ranks)
        for place, receiver in enumerate(remote):
            first = place * holders // many
            shares = max(1, (place + 1) * holders // many - first)
            for share, sender in enumerate(group.ranks[first : first + shares]):
                if receiver == self.rank:
                    receives.append((sender, shares, share))
                if sender == self.rank:
                    sends[shares, share] = (*sends.get((shares, share), ()), receiver)
        return _Route(receives, sends)


def _share(matches: list[_Match], shares: int, share: int) -> list[_Match]:
    """The `share`-th of `shares` runs of nearly equal size."""
    if shares == 1:
        return matches
    total, before, part = sum(match.need.region.size for match in matches), 0, []
    for match in matches:
        if before * shares // total == share:
            part.append(match)
        before += match.need.region.size
    return part


def _message(peers: tuple[int, ...], key: _Key, matches: list[_Match], *, packs: bool) -> Message:
    copies, at = [], 0
    for match in matches:
        packed = Piece(match.need.region, PACKED, at, contiguous(match.need.region.shape))
        copies.append(copy_between(match.held, packed) if packs else copy_between(packed, match.need))
        at += match.need.region.size
    tag = len(ITEMSIZE) * key.group.number + list(ITEMSIZE).index(key.dtype)
    return Message(peers, tag, key.dtype, at, tuple(fused(copies)))


def world_bytes(claims: Sequence[Claim], samplers: Sequence[Sampler], dtype: str) -> tuple[int, int]:
    """(needed, held where it is needed) over all ranks; the difference is the lower bound on what is sent."""
    book, needed, held = by_name(claims), 0, 0
    for sampler in samplers:
        ranks = frozenset(sampler.ranks)
        for key, matches in _matches(sampler, book, dtype, 1 << 62, True, _widest(claims, dtype)):
            width = sum(match.need.region.size for match in matches) * ITEMSIZE[key.dtype]
            needed += width * len(ranks)
            held += width * len(ranks & key.group.members)
    return needed, held
