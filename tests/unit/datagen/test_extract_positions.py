"""Which positions are sampled depends on (seed, document, window) alone; special and early ones never are."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.config.schema import ExtractConfig
from nla_megatron.contract import columns
from nla_megatron.contract.tokenizer import load_tokenizer
from nla_megatron.datagen.extract import (
    Passage,
    _columns,
    _passages,
    kept_at,
    kept_of,
    layer_of,
    pooled_at,
    sample_positions,
)
from nla_megatron.datagen.sentences import sentence_starts, sentences_of
from nla_megatron.errors import ConfigError, NotFinite
from tests.support.tiny import SHAPE

CONFIG = ExtractConfig(min_position=5, positions_per_doc=4, max_length=40)
DOCUMENTS = [(f"topics:{name}", topics[name][:400]) for name in sorted(topics)[:12]]


@given(
    length=st.integers(0, 60),
    special=st.sets(st.integers(0, 60)),
    min_position=st.integers(0, 30),
    wanted=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_positions_are_ascending_late_enough_not_special_and_as_many_as_there_are(
    length: int, special: set[int], min_position: int, wanted: int, seed: int
) -> None:
    """Token ids are their own positions here, so a special token is a special position."""
    config = ExtractConfig(min_position=min_position, positions_per_doc=wanted, max_length=100, seed=seed)
    positions = sample_positions(config, "doc", 0, range(length), special)
    candidates = set(range(min_position, length)) - special
    assert list(positions) == sorted(set(positions)) and set(positions) <= candidates
    assert len(positions) == min(wanted, len(candidates))


def test_another_seed_document_or_window_draws_anew() -> None:
    ids = range(1000)
    drawn = [
        sample_positions(replace(CONFIG, seed=seed), doc_id, start, ids, set())
        for seed in (0, 1)
        for doc_id in ("a", "b")
        for start in (0, 40)
    ]
    assert len(set(drawn)) == 8
    assert drawn[0] == sample_positions(CONFIG, "a", 0, ids, set())


def test_every_qualifying_position_can_be_drawn() -> None:
    drawn = {at for doc in range(200) for at in sample_positions(CONFIG, str(doc), 0, range(20), set())}
    assert drawn == set(range(5, 20))


def passages(model: Path, documents: list[tuple[str, str]], long_documents: str) -> list[Passage]:
    return list(_passages(replace(CONFIG, model=str(model), long_documents=long_documents), documents))


@pytest.mark.parametrize("long_documents", ["truncate", "window"])
def test_rows_do_not_depend_on_order_or_sharding(model_dir: Path, long_documents: str) -> None:
    whole = passages(model_dir, DOCUMENTS, long_documents)
    shards = [passages(model_dir, DOCUMENTS[start : start + 5], long_documents) for start in range(0, 12, 5)]
    assert [one for shard in shards for one in shard] == whole
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    by_document = sorted(passages(model_dir, shuffled, long_documents), key=lambda one: one.doc_id)
    assert by_document == sorted(whole, key=lambda one: one.doc_id)


def test_long_documents_are_cut_or_go_on_in_windows(model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(model_dir))
    doc_id, text = DOCUMENTS[3]
    ids = tokenizer.encode(text, special=True)
    assert len(ids) > 2 * CONFIG.max_length
    [cut] = passages(model_dir, [DOCUMENTS[3]], "truncate")
    assert list(cut.ids) == ids[:40]
    windows = passages(model_dir, [DOCUMENTS[3]], "window")
    kept = [ids[start : start + 40] for start in range(0, len(ids), 40)]
    assert [list(one.ids) for one in windows] == [window for window in kept if len(window) > CONFIG.min_position]
    assert windows[0].positions == cut.positions and len({one.positions for one in windows}) > 1
    assert {one.doc_id for one in windows} == {doc_id}


def test_special_tokens_of_the_tokenizer_are_never_sampled(model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(model_dir))
    text = f"{tokenizer.fast.eos_token} word " * 200
    found = passages(model_dir, [("doc", text)], "window")
    special = set(tokenizer.fast.all_special_ids)
    assert special & {token for one in found for token in one.ids}
    assert not special & {one.ids[at] for one in found for at in one.positions}


def test_a_document_too_short_to_qualify_gives_no_passage(model_dir: Path) -> None:
    assert passages(model_dir, [("empty", ""), ("short", "word")], "truncate") == []


def test_the_default_layer_is_two_thirds_of_the_depth() -> None:
    assert [layer_of(CONFIG, SHAPE.truncated(depth)) for depth in (3, 4, 28, 36)] == [2, 2, 18, 24]
    assert layer_of(replace(CONFIG, layer=0), SHAPE) == 0


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_outside_the_model_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer={layer}[\s\S]*0 to 3"):
        layer_of(replace(CONFIG, layer=layer), SHAPE)


def test_a_pooled_activation_is_the_mean_of_the_positions_up_to_its_own() -> None:
    stream_TD = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    by_hand = [sum(stream_TD[at] for at in range(last - 3, last + 1)) / 4 for last in (3, 9, 19)]
    torch.testing.assert_close(pooled_at(stream_TD, (3, 9, 19), "mean", 4), torch.stack(by_hand)[:, None])
    assert torch.equal(pooled_at(stream_TD, (3, 9), "last", 1), stream_TD[[3, 9]][:, None])


def test_stacked_activations_are_those_of_the_positions_up_to_its_own_in_order() -> None:
    stream_TD = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = pooled_at(stream_TD, (2, 9, 19), "stack", 3)
    assert found.dtype == torch.float32
    for row, last in zip(found, (2, 9, 19), strict=True):
        assert torch.equal(row, stream_TD[last - 2 : last + 1].float())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pool": "max"}, "pool='max'"),
        ({"pool": "mean", "pool_window": 0}, "pool_window=0"),
        ({"pool_window": 4}, "pool_window=4 with pool=last"),
        ({"pool": "mean", "pool_window": 7, "min_position": 5}, "pool_window=7 with min_position=5"),
        ({"pool": "stack", "pool_window": 7, "min_position": 5}, "pool_window=7 with min_position=5"),
        ({"pool": "stack"}, "pool_window=1 with pool=stack"),
        ({"pool_least": 1}, "pool_least=1 with pool=last and pool_window=1"),
        ({"pool": "mean", "pool_window": 3, "pool_least": 1}, "pool_least=1 with pool=mean and pool_window=3"),
        ({"pool": "stack", "pool_window": 3, "pool_least": 0}, "pool_least=0 with pool=stack and pool_window=3"),
        ({"pool": "stack", "pool_window": 3, "pool_least": 3}, "pool_least=3 with pool=stack and pool_window=3"),
        ({"pool": "stack", "pool_window": 3, "pool_within": "sentence"}, "pool_within=sentence without pool_least"),
        ({"pool_within": "line"}, "pool_within='line'"),
    ],
)
def test_a_window_that_is_not_full_or_not_known_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExtractConfig(**options)
    assert caught.value.found == told


ANY = replace(CONFIG, pool="stack", pool_window=4, pool_least=2, min_position=0)


def test_a_row_keeps_what_its_document_or_sentence_has_up_to_the_window() -> None:
    assert kept_at(ANY, [0] * 7) == [1, 2, 3, 4, 4, 4, 4]
    assert kept_at(ANY, [-1, 0, 0, 0, 1, 1, 2]) == [1, 1, 2, 3, 1, 2, 1]
    assert kept_at(CONFIG, [0] * 7) == []


def test_positions_with_fewer_activations_than_the_least_are_not_sampled() -> None:
    every = replace(ANY, positions_per_doc=99)
    kept = kept_at(every, [0, 0, 0, 1, 1, 2])
    assert sample_positions(every, "doc", 0, range(6), set(), kept) == (1, 2, 4)
    assert sample_positions(every, "doc", 0, range(1), set(), kept_at(every, [0])) == ()


def test_activations_of_as_many_positions_as_are_kept_end_with_the_position_s_own() -> None:
    stream_TD = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = kept_of(stream_TD, Passage("doc", tuple(range(20)), (0, 9, 19), (1, 3, 2)), ANY)
    by_hand = [stream_TD[0:1], stream_TD[7:10], stream_TD[18:20]]
    for kept_KD, wanted_KD in zip(found, by_hand, strict=True):
        assert kept_KD.dtype == "float32" and torch.equal(torch.from_numpy(kept_KD), wanted_KD.float())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("It is 3.5. Is it? Yes", ["It is 3.5. ", "Is it? ", "Yes"]),
        ('He said "No!" and left.\n', ['He said "No!" ', "and left.\n"]),
        ("A title\n\nwraps\nhere (so.) Then", ["A title\n\n", "wraps\nhere (so.) ", "Then"]),
        ("一句。两句！三", ["一句。", "两句！", "三"]),
        ("", [""]),
    ],
)
def test_sentences_end_with_their_punctuation_and_the_space_behind_it(text: str, parts: list[str]) -> None:
    starts = sentence_starts(text)
    assert [text[first:stop] for first, stop in zip(starts, [*starts[1:], len(text)], strict=True)] == parts


def test_a_token_is_in_the_sentence_of_its_last_character() -> None:
    """The space before a word is often part of the word's token; a token that was added has no characters."""
    assert sentences_of("Ab. Cd", [(0, 0), (0, 2), (2, 3), (3, 6)]) == [-1, 0, 0, 1]


@pytest.mark.parametrize("long_documents", ["truncate", "window"])
def test_no_row_keeps_a_position_of_another_sentence(model_dir: Path, long_documents: str) -> None:
    config = replace(ANY, model=str(model_dir), pool_window=12, pool_least=1, pool_within="sentence",
                     long_documents=long_documents, positions_per_doc=30)  # fmt: skip
    tokenizer, seen = load_tokenizer(str(model_dir)), set()
    for passage in _passages(config, DOCUMENTS):
        for at, kept in zip(passage.positions, passage.kept, strict=True):
            text = tokenizer.decode(passage.ids[at + 1 - kept : at + 1])
            assert len(sentence_starts(text.strip())) == 1, text
            first, stop = (len(tokenizer.decode(passage.ids[:end])) for end in (at + 1 - kept, at + 2 - kept))
            begins = any(first <= start < stop for start in sentence_starts(tokenizer.decode(passage.ids)))
            assert begins or kept in (config.pool_window, at + 1), text
            seen.add(kept)
    assert len(seen) > 8


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_activation_that_is_not_finite_is_named_with_its_document_and_token(value: float, model_dir: Path) -> None:
    passages_of_two = [Passage("a", (3, 4, 5), (1,)), Passage("b", (3, 4, 5), (0, 2))]
    kept = [np.zeros((1, 8), dtype=np.float32) for _ in range(3)]
    tokenizer = load_tokenizer(str(model_dir))
    assert len(_columns(passages_of_two, kept, 2, tokenizer)[columns.TEXT]) == 3
    kept[2][0, 5] = value
    with pytest.raises(NotFinite, match="block 2's activation at token 2 of document 'b'"):
        _columns(passages_of_two, kept, 2, tokenizer)
