"""The trainer's regions against the conversion rules reading the same tensors: every element where the rules put it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nla_megatron.conversion.families import rules_of
from nla_megatron.errors import LayoutError
from nla_megatron.reshard.megatron_side import TrainLayout, claims_of, tensors_of
from nla_megatron.reshard.plan import check_claims
from nla_megatron.reshard.regions import missing, whole
from tests.support.families import MIXTURES, MODELS, family_shape

LAYOUTS = {
    "tp1": TrainLayout(),
    "tp2 dp2": TrainLayout(tp=2, dp=2, etp=2),
    "tp4": TrainLayout(tp=4, etp=4),
    "tp2 pp2 uneven": TrainLayout(tp=2, pp=2, etp=2, stages=(1, 4)),
    "pp2 vpp2": TrainLayout(pp=2, vpp=2, dp=2, stages=(1, 2, 1, 1)),
    "pp3, later ranks": TrainLayout(pp=3, first=5),
}
EXPERT_LAYOUTS = {
    "ep2": TrainLayout(dp=4, ep=2),
    "tp2 ep2 etp1": TrainLayout(tp=2, dp=2, ep=2, etp=1),
    "ep2 etp2": TrainLayout(dp=4, ep=2, etp=2),
    "pp2 tp4 ep2 etp2": TrainLayout(pp=2, tp=4, ep=2, etp=2),
}
CASES = [(name, layout) for name in MODELS for layout in {**LAYOUTS, **(EXPERT_LAYOUTS if name in MIXTURES else {})}]


def coordinates(rank: int, layout: TrainLayout) -> dict[str, int]:
    """A rank's place, as megatron-core deals them out."""
    place = rank - layout.first
    stage, within = divmod(place, layout.tp * layout.dp)
    return {"pp": stage, "tp": within % layout.tp, "etp": within % layout.etp, "ep": within // layout.etp % layout.ep}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_pieces_lie_where_the_rules_put_them_and_cover_every_tensor(name: str, layout: str) -> None:
    shape, grid = family_shape(name), {**LAYOUTS, **EXPERT_LAYOUTS}[layout]
    generator = torch.Generator().manual_seed(1)
    full = {one: torch.rand(size, generator=generator) for one, size in tensors_of(shape).items()}
    rules = {rule.megatron: rule for rule in rules_of(shape, True)}
    claims = claims_of(shape, grid)

    def read(name: str, axis: int, start: int, stop: int) -> Tensor:
        return full[name].narrow(axis, start, stop - start)

    known: dict[tuple[str, int, int], Tensor] = {}
    for claim in claims:
        rule, region = rules[claim.piece.buffer], claim.piece.region
        for rank in claim.group.ranks:
            place = coordinates(rank, grid)
            at, size = (place["tp"], grid.tp) if rule.expert is None else (place["etp"], grid.etp)
            if (rule.megatron, at, size) not in known:
                known[rule.megatron, at, size] = rule.read(read, at, size).clone(memory_format=torch.contiguous_format)
            parameter = known[rule.megatron, at, size]
            found = parameter.as_strided(region.shape, claim.piece.strides, claim.piece.offset)
            expected = full[region.name]
            for axis, one in enumerate(region.axes):
                expected = expected.narrow(axis, one.start, len(one))
            assert torch.equal(found, expected), f"{region} on rank {rank}"
            if rule.expert is not None:
                assert shape.experts is not None
                assert place["ep"] == rule.expert // (shape.experts.count // grid.ep)
    check_claims(claims)
    for one, size in tensors_of(shape).items():
        assert missing(whole(one, size), [c.piece.region for c in claims if c.piece.region.name == one]) == []


def test_every_rank_that_holds_a_tensor_is_named_and_no_other() -> None:
    shape = replace(family_shape("qwen3-moe"), tied_embeddings=True)
    claims = claims_of(shape, TrainLayout(tp=1, pp=2, dp=2, ep=2))
    ranks = {claim.piece.region.name: claim.group.ranks for claim in claims}
    assert ranks["model.embed_tokens.weight"] == (0, 1, 2, 3)  # tied: on both ends
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == (0, 1)
    assert ranks["model.layers.4.mlp.gate.weight"] == (2, 3)
    assert ranks["model.layers.0.mlp.experts.1.down_proj.weight"] == (0,)
    assert ranks["model.layers.0.mlp.experts.2.down_proj.weight"] == (1,)
    assert ranks["model.norm.weight"] == (2, 3)
    assert "lm_head.weight" not in ranks


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LayoutError, match="experts"):
        claims_of(family_shape("qwen3-moe"), TrainLayout(dp=3, ep=3))


def test_a_rank_whose_rows_are_all_padding_holds_nothing_of_the_vocabulary() -> None:
    shape = replace(family_shape("qwen3"), vocab_size=65)  # 128 rows in Megatron, 32 on each rank
    claims = [one for one in claims_of(shape, TrainLayout(tp=4)) if "embed_tokens" in one.piece.region.name]
    assert [(one.group.ranks, one.piece.region.axes[0]) for one in claims] == [
        ((0,), range(32)), ((1,), range(32, 64)), ((2,), range(64, 65)),
    ]  # fmt: skip


def test_a_matrix_is_one_piece_and_only_what_lies_group_by_group_is_several() -> None:
    shape = family_shape("qwen3")  # four groups, two on each rank
    found = Counter((one.piece.region.name, one.group.ranks) for one in claims_of(shape, TrainLayout(tp=2)))
    block = "model.layers.0."
    assert [found[f"{block}self_attn.{one}_proj.weight", (0,)] for one in "qkvo"] == [2, 2, 2, 1]
    assert [found[f"{block}mlp.{one}_proj.weight", (1,)] for one in ("gate", "up", "down")] == [1, 1, 1]
    assert found["model.norm.weight", (0, 1)] == 1
