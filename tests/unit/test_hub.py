"""Names of the hub become paths in its cache before anything reads them, or are refused by name.

In processes of their own, because the client reads its switches when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.config.compose import compose
from nla_megatron.config.hub_keys import HUB_KEYS
from nla_megatron.config.run_directory import same_value
from nla_megatron.config.schema import SCHEMAS
from nla_megatron.hub import name_of, repository_of
from tests.support.hub import COMMIT, cached, served

ASK = """
import json, sys
from nla_megatron.errors import NlaError
from nla_megatron.hub import dataset_path, model_directory
for kind, value in json.loads(sys.argv[1]):
    try:
        found = (model_directory if kind == "model" else dataset_path)(value, kind)
    except NlaError as error:
        found = [type(error).__name__, error.found, error.expected, error.remedy]
    print(json.dumps(found))
"""
JSONL = b'{"doc_id": "a", "text": "One."}\n'
CARD = b"""---
configs:
- config_name: small
  data_files:
  - split: train
    path: sample/10/*
---
Prose.
"""
DATA = {
    "main/train-00000-of-00002.jsonl": JSONL, "main/train-00001-of-00002.jsonl": JSONL.replace(b'"a"', b'"b"'),
    "main/test.jsonl": JSONL, "other/train.jsonl": JSONL, "sample/10/000.jsonl": JSONL, "README.md": CARD,
    "rl.parquet": b"PAR1", "rl.parquet.nla_meta.yaml": b"kind: nla_dataset",
}  # fmt: skip
MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"the same weights again"}


def answers(asked: Sequence[tuple[str, str]], home: Path, **environment: str) -> list[Any]:
    """What a process with this cache makes of names, one by one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(asked)], env={**clean, "HF_HOME": str(home), **environment},
        capture_output=True, text=True, timeout=100, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_cache_is_read_without_a_network(tmp_path: Path) -> None:
    model = cached(tmp_path, "Qwen/Qwen3-8B", MODEL)
    data = cached(tmp_path, "some/data", DATA, "datasets")
    cached(tmp_path, "torn/data", {"train-00000-of-00002.jsonl": JSONL}, "datasets")
    cached(tmp_path, "bare/data", {name: JSONL for name in ("main/train.jsonl", "other/train.jsonl")}, "datasets")
    two = CARD.replace(b"---\nProse", b"- config_name: large\n  data_files: all.jsonl\n---\nProse")
    cached(tmp_path, "two/data", {"README.md": two, "sample/10/0.jsonl": JSONL, "all.jsonl": JSONL}, "datasets")
    (tmp_path / "own" / "model").mkdir(parents=True)
    cached(tmp_path, "own/model", MODEL)
    found = answers(
        [("model", "Qwen/Qwen3-8B"), ("model", f"Qwen/Qwen3-8B@{COMMIT}"), ("model", "own/model"), ("model", "no/such"),
         ("data", "some/data:main:train"), ("data", "some/data:test"), ("data", "some/data:small:train"),
         ("data", "some/data:rl"), ("data", "bare/data"), ("data", "two/data"),
         ("data", "some/data"), ("data", "some/data:main:nowhere"), ("data", "torn/data"),
         ("data", "a/b.parquet"), ("model", "/a/b/c"), ("model", "plain")],
        tmp_path, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert found[:3] == [str(model), str(model), "own/model"], "a directory of that name here is meant"
    assert found[3][0] == "MissingFile" and "HF_HUB_OFFLINE" in found[3][1] and "hf download no/such" in found[3][3]
    assert found[4] == str(data / "main" / "train-0000*-of-00002.jsonl")
    assert found[5:8] == [str(data / name) for name in ("main/test.jsonl", "sample/10/000.jsonl", "rl.parquet")]
    assert found[8][0] == "ConfigError" and "main, other" in found[8][1] and "CONFIG:train" in found[8][3]
    assert found[9][0] == "ConfigError" and "small, large" in found[9][1]
    assert found[10] == found[6], "the only configuration of the card"
    assert found[11][0] == found[12][0] == "MissingFile", "neither a split that is not there nor half of one"
    assert found[13:] == ["a/b.parquet", "/a/b/c", "plain"]


def test_a_hub_is_asked_for_what_the_cache_lacks_and_its_refusals_are_told_apart(tmp_path: Path) -> None:
    hub = {"models/some/model": MODEL, "models/closed/model": MODEL, "datasets/some/data": DATA}
    with served(hub, gated=("models/closed/model",)) as address:
        found = answers(
            [("model", "some/model"), ("data", "some/data:main:train"), ("data", "some/data:rl"),
             ("model", "closed/model"), ("model", "no/such"), ("model", "some/unknown"), ("model", "some/model@v9"),
             ("data", "no/such"), ("data", "some/data:main:nowhere")],
            tmp_path, HF_ENDPOINT=address,
        )  # fmt: skip
    model = Path(found[0])
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"], "no second copy"
    assert model.name == COMMIT and (model / "model.safetensors").read_bytes() == b"weights"
    assert found[1].endswith(f"{COMMIT}/main/train-0000*-of-00002.jsonl")
    assert Path(f"{found[2]}.nla_meta.yaml").is_file(), "a table comes with its sidecar"
    gated, missing, private, revision, data, split = found[3:]
    assert all(one[0] == "MissingFile" for one in found[3:])
    assert "gated" in gated[1] and "accept its terms" in gated[3] and "closed/model" in gated[3]
    assert all("is not there, or private" in one[1] and "HF_TOKEN" in one[3] for one in (missing, private, data))
    assert "no revision 'v9'" in revision[1]
    assert "split 'nowhere'" in split[1] and "main/test.jsonl" in split[2]


def test_a_hub_that_cannot_be_reached_is_named_and_a_cache_serves_without_it(tmp_path: Path) -> None:
    model = cached(tmp_path, "some/model", MODEL)
    found = answers(
        [("model", "some/model"), ("model", "no/such"), ("data", "no/such")], tmp_path, HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert found[0] == str(model)
    for one in found[1:]:
        assert one[0] == "MissingFile" and "no/such cannot be fetched" in one[1] and "hf download no/such" in one[3]


@pytest.mark.parametrize("page", [b"<html>Log in to this network</html>", b'{"status": "ok"}', b"[1]", b""])
def test_what_answers_in_place_of_a_hub_is_named(page: bytes, tmp_path: Path) -> None:
    with served({}, instead=page) as address:
        found = answers([("model", "some/model"), ("data", "some/data")], tmp_path, HF_ENDPOINT=address)
    for one in found:
        assert one[0] == "MissingFile" and "cannot be fetched" in one[1] and "HF_HUB_OFFLINE" in one[3]


def test_a_place_in_the_cache_is_the_same_commit_wherever_the_cache_is(tmp_path: Path) -> None:
    one, other = (cached(tmp_path / home, "a/b", MODEL) for home in ("one", "other"))
    newer = cached(tmp_path / "one", "a/b", MODEL, commit="f" * 40)
    assert name_of(one) == f"a/b@{COMMIT}" and repository_of(one) == "a/b" and repository_of("a/b/c") == "a/b/c"
    assert same_value(str(one), str(other)) and not same_value(str(one), str(newer))
    assert same_value(str(one / "x.parquet"), str(other / "x.parquet"))
    assert not same_value(str(one / "x.parquet"), str(other / "y.parquet"))


@pytest.mark.parametrize("command", sorted(HUB_KEYS))
def test_every_key_that_may_hold_a_name_is_a_key(command: str) -> None:
    assert set(HUB_KEYS[command]) <= set(SCHEMAS[command].__dataclass_fields__)
    for key in HUB_KEYS[command]:
        composed = compose(command, [f"{key}=owner/name@v1:config:split", *_required(command, key)])
        assert getattr(composed, key) == "owner/name@v1:config:split", "no quotes are needed"


def _required(command: str, key: str) -> list[str]:
    from omegaconf import MISSING

    fields = SCHEMAS[command].__dataclass_fields__.values()
    names = {one.name for one in fields if one.default == MISSING} - {key}
    given = {name: "both" if name == "role" else "x" for name in names} | ({"ar_data": "x"} if command == "sft" else {})
    return [f"{name}={value}" for name, value in given.items() if name != key]
