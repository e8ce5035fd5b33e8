"""What a model directory holds: keys of config.json, files and tensors that count, against transformers' reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nla_megatron.conversion.families import family_of
from nla_megatron.conversion.formats.config_file import read_config, settled_directory
from nla_megatron.conversion.formats.config_keys import admitting
from nla_megatron.conversion.formats.notes import _SAID
from nla_megatron.conversion.formats.weights import check_finite
from nla_megatron.conversion.hf import INDEX, SafetensorsReader, check_vocabulary, copy_companions, read_shape
from nla_megatron.conversion.source import HuggingFaceSide
from nla_megatron.errors import CheckpointError, MissingFile, NlaError, UnsupportedModel
from tests.support.families import MODELS
from tests.support.tiny import tiny_config, tiny_model
from tests.unit.conversion.test_families import shape_of, their_config, written

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    _SAID.clear()
    yield
    _SAID.clear()


def edited(directory: Path, **values: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_a_null_is_what_transformers_takes_it_for(name: str, tmp_path: Path) -> None:
    """Key by key: its reading's shape; where it refuses the null, the shape without the key, or a refusal."""
    full, compared = written(their_config(name), tmp_path / "full"), 0
    (tmp_path / "null").mkdir()
    for key in (key for key in full if full[key] is not None and key not in ("architectures", "model_type")):
        (tmp_path / "null" / "config.json").write_text(json.dumps({**full, key: None}))
        rest = {one: value for one, value in full.items() if one != key}
        try:
            theirs = written(AutoConfig.from_pretrained(tmp_path / "null"), tmp_path / "theirs")
            compared += 1
        except Exception as error:
            assert "Validation error" in str(error), key
            theirs = rest
        if key == "num_key_value_heads" and full["model_type"] in ("mistral", "mixtral"):
            theirs = {**full, key: full["num_attention_heads"]}  # as its class would, did its type not refuse
        assert shape_or_refusal({**full, key: None}) == shape_or_refusal(theirs), key
    assert compared > 3


def shape_or_refusal(config: dict[str, Any]) -> Any:
    try:
        return shape_of(config)
    except UnsupportedModel as refusal:
        return refusal.found


def test_a_null_that_names_no_token_stays_in_what_is_written(tmp_path: Path) -> None:
    """To Llama an absent bos_token_id is 1."""
    config = {**written(their_config("llama"), tmp_path), "bos_token_id": None, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path, tmp_path / "out", read_config(tmp_path), torch.float32)
    again = AutoConfig.from_pretrained(tmp_path / "out")
    assert again.bos_token_id is None and again.rope_parameters == AutoConfig.from_pretrained(tmp_path).rope_parameters


WITHOUT_EFFECT = {
    "unk_token_id": 3, "image_token_index": 7, "transformers_version": "9.1", "model_version": "2", "created_by": "me",
    "base_model_name_or_path": "x/y", "assistant_confidence_threshold": 0.4, "min_p": 0.1, "dequantized_from": "Q4_K",
    "transformers.js_config": {"dtype": "q4"}, "unsloth_fixed": True, "_anything": 4, "num_return_sequences": 2,
    "license": "apache-2.0", "rope_theta": 10_000.0,
}  # fmt: skip


def test_keys_that_cannot_change_the_computation_are_known_by_rule(tmp_path: Path) -> None:
    config = written(their_config("qwen3"), tmp_path)
    for key, value in WITHOUT_EFFECT.items():
        assert shape_of({**config, key: value}) == shape_of(config), key


def test_a_value_that_transformers_takes_anyway_says_nothing_new(tmp_path: Path) -> None:
    """Mixtral has no `max_window_layers` to transformers, Qwen2 has, and 28 is its default."""
    config = written(their_config("qwen3-moe"), tmp_path)
    assert shape_of({**config, "initializer_range": 0.02}) == shape_of(config)
    with pytest.raises(UnsupportedModel, match="residual_multiplier=0.5"):
        shape_of({**config, "residual_multiplier": 0.5})


def test_an_unknown_key_is_admitted_by_its_name_and_no_other(tmp_path: Path) -> None:
    config = {**written(their_config("llama"), tmp_path), "residual_multiplier": 0.5, "logits_scaling": 8.0}
    with pytest.raises(UnsupportedModel, match="residual_multiplier") as caught:
        shape_of(config)
    assert "allow_unknown_config=[residual_multiplier]" in caught.value.remedy
    with admitting(["residual_multiplier"]), pytest.raises(UnsupportedModel, match="logits_scaling"):
        shape_of(config)
    with admitting(["residual_multiplier", "logits_scaling"]):
        assert shape_of(config) == shape_of(written(their_config("llama"), tmp_path))
    with pytest.raises(UnsupportedModel):
        shape_of(config)


@pytest.mark.parametrize(
    "changes", [{"attention_dropout": 0.1}, {"hidden_act": "relu"}, {"quantization_config": {"quant_method": "awq"}}]
)
def test_what_changes_the_computation_is_refused_though_it_is_admitted(changes: dict[str, Any], tmp_path: Path) -> None:
    config = {**written(their_config("llama"), tmp_path), **changes}
    key = next(iter(changes))
    with admitting([key]), pytest.raises(UnsupportedModel, match=key):
        shape_of(config)


def test_notes_of_a_quantisation_are_believed_by_the_weights(tmp_path: Path, capsys: Any) -> None:
    model = edited(tiny_model(tmp_path), quantization_config={"quant_method": "gguf"}, quant_method="q4")
    assert "quantization_config" not in read_config(model) and read_shape(model).num_layers == 4
    read_config(model)
    assert capsys.readouterr().err.count("read as a model that is not quantised") == 1, "said once"
    assert not hasattr(AutoConfig.from_pretrained(settled_directory(model)), "quantization_config")
    for change in ({WEIGHT: torch.zeros(128, 64, dtype=torch.uint8)}, {f"{WEIGHT}_scale": torch.ones(1)}):
        save_file({**load_file(model / "model.safetensors"), **change}, model / "model.safetensors")
        for allowed in ([], ["quantization_config", "quant_method"]):
            with admitting(allowed), pytest.raises(UnsupportedModel, match="quantization_config"):
                read_shape(model)


def test_a_directory_that_others_read_alike_is_handed_to_them_as_it_is(tmp_path: Path) -> None:
    model = edited(tiny_config(tmp_path / "model"), rope_scaling=None, layer_types=None)
    assert settled_directory(model) == model
    edited(model, use_cache=None)
    other = settled_directory(model)
    assert other != model and AutoConfig.from_pretrained(other).use_cache
    assert (other / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert json.loads((model / "config.json").read_text())["use_cache"] is None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an older version of it in shards."""
    root = tmp_path_factory.mktemp("versions")
    new = tiny_model(root / "new")
    older = AutoModelForCausalLM.from_pretrained(new)
    with torch.no_grad():
        older.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    older.save_pretrained(root / "old", max_shard_size="200KB")
    return new, root / "old"


@pytest.mark.parametrize("shards_too", [False, True])
def test_a_single_file_is_read_though_an_older_index_lies_beside_it(
    models: tuple[Path, Path], shards_too: bool, tmp_path: Path, capsys: Any
) -> None:
    """As transformers reads it, by every reader, vLLM's included."""
    new, old = models
    for source in (new, old):
        for path in source.iterdir():
            if source == new or path.name == INDEX or (shards_too and path.name.startswith("model-")):
                (tmp_path / path.name).write_bytes(path.read_bytes())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[WEIGHT]
    assert torch.equal(SafetensorsReader(tmp_path).whole(WEIGHT), theirs)
    assert torch.equal(by_vllm(tmp_path)[WEIGHT], theirs)
    assert torch.equal(theirs, load_file(new / "model.safetensors")[WEIGHT])
    assert capsys.readouterr().err.count("of another version") == 1


def by_vllm(directory: Path) -> dict[str, torch.Tensor]:
    from vllm.config.load import LoadConfig

    from nla_megatron.rollout.loader import FORMAT, ModelDirectoryLoader

    loader = ModelDirectoryLoader(LoadConfig(load_format=FORMAT, use_tqdm_on_load=False))
    return dict(loader._get_weights_iterator(loader.Source(str(directory), None)))


@pytest.mark.parametrize("said", [True, False])
def test_a_tied_pair_may_be_kept_under_the_output_layers_name(said: bool, tmp_path: Path) -> None:
    """As safetensors saves it: of several names of a tensor it keeps the first. Alike for every reader."""
    model = tiny_model(tmp_path, tied_embeddings=True)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    edited(model, tie_word_embeddings=said)
    names = {"model.embed_tokens.weight"} if said else {"lm_head.weight"}
    assert {"model.embed_tokens.weight", "lm_head.weight"} & SafetensorsReader(model).names() == names
    if said:
        theirs = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
        for found in (SafetensorsReader(model).whole("model.embed_tokens.weight"), *map(by_vllm(model).get, names)):
            assert torch.equal(found, theirs)
        assert HuggingFaceSide(model).model.shape.tied_embeddings


COMPUTED = (
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.rotary_emb_local.inv_freq",
    "model.layers.1.self_attn.masked_bias", "model.layers.1.attn.bias", "model.rotary_emb.original_inv_freq",
    "model.layers.2.self_attn.rotary_emb.cos_cached", "model.embeddings.position_ids",
)  # fmt: skip


def test_tensors_that_a_model_computes_are_no_weights(models: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    weights = load_file(models[0] / "model.safetensors")
    save_file({**weights, **{name: torch.full((2,), float("nan")) for name in COMPUTED}}, tmp_path / "one.safetensors")
    assert SafetensorsReader(tmp_path).names() == set(weights)
    SafetensorsReader(tmp_path)
    assert capsys.readouterr().err.count(f"{len(COMPUTED)} tensors that a model computes") == 1
    (tmp_path / "one.safetensors").rename(tmp_path / "model.safetensors")
    assert by_vllm(tmp_path).keys() == weights.keys()
    index = dict.fromkeys([*weights, *COMPUTED, "model.layers.3.self_attn.rotary_emb.inv_freq"], "w.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "w.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    assert SafetensorsReader(tmp_path).names() == set(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_by_every_reader(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    for rows in ((4, 6), (6, 4)):
        tensor = torch.zeros(rows, dtype=dtype)
        check_finite(tensor, "w", tmp_path)
        tensor[3, 2] = value
        save_file({"w": tensor, "ids": torch.arange(3)}, tmp_path / "model.safetensors")
        reader = SafetensorsReader(tmp_path)
        reads = [partial(reader.whole, "w"), partial(reader.read, "w", 0, 2, 4), partial(reader.read, "w", 1, 1, 3)]
        for read in (*reads, partial(by_vllm, tmp_path)):
            with pytest.raises(CheckpointError, match="NaN or infinity in w of"):
                read()
        assert not reader.read("w", 0, 0, 3).any() and len(reader.whole("ids")) == 3, "what others hold is not read"


def test_weights_near_the_end_of_their_range_are_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        check_finite(torch.tensor([largest, -largest, largest], dtype=dtype), "w", "file")


BROKEN: dict[str, tuple[Callable[[Path], object], type[NlaError], str]] = {
    "a missing shard": (lambda at: (at / SHARD).unlink(), MissingFile, SHARD),
    "a shard that is a link to nothing": (lambda at: relinked(at / SHARD), MissingFile, SHARD),
    "no index, and not all shards": (
        lambda at: ((at / INDEX).unlink(), (at / SHARD).unlink()), MissingFile, "no .*/model-00001-of",
    ),
    "an unnamed link to nothing": (
        lambda at: ((at / INDEX).unlink(), relinked(at / SHARD)), MissingFile, "a link to a file that is not there",
    ),
    "a torn shard": (lambda at: torn(at / SHARD), CheckpointError, "cut short"),
    "an empty shard": (lambda at: (at / SHARD).write_bytes(b""), CheckpointError, "of 0 bytes"),
    "a pointer of git-lfs": (
        lambda at: (at / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        CheckpointError, "a pointer of git-lfs",
    ),
    "an index of nothing": (lambda at: (at / INDEX).write_text('{"weight_map": {}}'), CheckpointError, "weight_map"),
    "an empty index": (lambda at: (at / INDEX).write_text(""), CheckpointError, "is empty"),
}  # fmt: skip


def relinked(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "blobs" / "nowhere")


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_directory_that_was_half_downloaded_is_named(mistake: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    spoil, kind, named = BROKEN[mistake]
    for path in models[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shards = sorted(path.name for path in tmp_path.glob("model-*"))
    assert len(shards) > 1
    (tmp_path / INDEX).write_text((tmp_path / INDEX).read_text().replace(shards[0], SHARD))
    (tmp_path / shards[0]).rename(tmp_path / SHARD)
    spoil(tmp_path)
    with pytest.raises(kind, match=named):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("place", ["", ".cache/huggingface/download"])
def test_what_a_broken_off_download_left_is_in_the_remedy(place: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "model.safetensors.a1b2.incomplete").write_bytes(b"half")
    with pytest.raises(MissingFile) as caught:
        SafetensorsReader(tmp_path)
    assert "finish the download" in caught.value.remedy and "a1b2.incomplete" in caught.value.remedy


FOREIGN = {
    "an empty file": b"", "a list": b"[1]", "a number": b"3", "Latin-1": '{"é": 1}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"), "zeros": bytes(64), "half an object": b'{"a": ',
    "lists in lists": b"[" * 100_000, "a gzip": b"\x1f\x8b\x08\x00abc",
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_a_config_of_foreign_bytes_is_named(what: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(FOREIGN[what])
    with pytest.raises(CheckpointError, match="config.json is "):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "nla_meta.yaml"])
@pytest.mark.parametrize("what", ["dangling", "loop", "directory"])
def test_a_file_that_is_there_by_name_alone_is_named_before_it_is_copied(what: str, name: str, tmp_path: Path) -> None:
    path = tiny_config(tmp_path) / name
    path.unlink(missing_ok=True)
    if what == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere" if what == "dangling" else path.name)
    with pytest.raises(MissingFile, match=name):
        read_shape(tmp_path)


def test_a_mark_before_config_json_is_named_as_transformers_refuses_it(tmp_path: Path) -> None:
    path = tiny_config(tmp_path) / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="byte order mark"):
        read_shape(tmp_path)


def test_links_are_followed(models: tuple[Path, Path], tmp_path: Path) -> None:
    """As in the cache of the hub, where all files of a snapshot are links."""
    for path in models[1].iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert SafetensorsReader(tmp_path).names() == SafetensorsReader(models[1]).names()
    assert read_shape(tmp_path) == read_shape(models[1])


def test_an_architecture_that_is_no_list_of_names_is_refused() -> None:
    for found in ("LlamaForCausalLM", [3], {"a": 1}, [["LlamaForCausalLM"]]):
        with pytest.raises(UnsupportedModel, match="architecture"):
            family_of({"architectures": found})


def test_tokens_that_a_tokenizer_config_adds_are_held_against_the_vocabulary(tmp_path: Path) -> None:
    added = {"added_tokens_decoder": {"5": {"content": "<a>"}, "9": {"content": "<b>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    check_vocabulary(tmp_path, 10)
    with pytest.raises(CheckpointError, match="token id 9 in"):
        check_vocabulary(tmp_path, 9)
