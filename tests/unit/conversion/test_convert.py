"""The command from end to end on tiny models: what it makes, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_megatron.cli import main
from nla_megatron.conversion.hf import INDEX, SafetensorsReader, write_value_head
from tests.support.ranks import command, start
from tests.support.tiny import tiny_model

SMALL = "shard_size=40KB"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tensors, several of one size, take many files."""
    return tiny_model(tmp_path_factory.mktemp("hf"), tied_embeddings=False, num_layers=12)


@pytest.fixture(scope="module")
def mcore(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mcore") / "mcore"
    done = command("convert", "import", f"hf={hf}", f"out={out}", SMALL)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def convert(*arguments: object) -> str:
    """A conversion that succeeds; returns what it printed."""
    done = command("convert", *map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout + done.stderr


def refused(kind: str, *arguments: object) -> str:
    """A conversion that is refused with one message of the usual form; returns it."""
    done = command("convert", *map(str, arguments))
    assert done.returncode == 2, done.stdout + done.stderr[-4000:]
    message = done.stderr[done.stderr.index(f"{kind}: ") :]
    assert message.count("expected: ") == 1 and message.count("to do: ") == 1
    return message


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(directory.rglob("*"))}


def same_tensors(one: Path, other: Path) -> bool:
    readers = [SafetensorsReader(path) for path in (one, other)]
    return readers[0].names() == readers[1].names() and all(
        torch.equal(*(reader.whole(name) for reader in readers)) for name in readers[0].names()
    )


def test_a_round_trip_by_several_processes_is_exact_and_its_manifests_agree(
    hf: Path, mcore: Path, tmp_path: Path
) -> None:
    before = contents(mcore)
    convert("export", f"checkpoint={mcore}", f"out={tmp_path / 'back'}", SMALL, "processes=2")
    assert same_tensors(hf, tmp_path / "back") and contents(mcore) == before
    manifests = [json.loads((path / "conversion.json").read_text()) for path in (mcore, tmp_path / "back")]
    sums = [{name: one["checksum"] for name, one in told["tensors"].items()} for told in manifests]
    assert sums[0] == sums[1] and sums[0].keys() == SafetensorsReader(hf).names()
    for told, directory in zip(manifests, (mcore, tmp_path / "back"), strict=True):
        assert all((directory / one["file"]).is_file() for one in told["tensors"].values())
        assert told["versions"]["torch"] == torch.__version__
    assert manifests[0]["source"]["directory"] == str(hf.resolve())
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert not list(tmp_path.glob("*.partial")) and not list((tmp_path / "back").glob("journal"))


def test_the_dtype_asked_for_is_the_dtype_written(hf: Path, mcore: Path, tmp_path: Path) -> None:
    convert("export", f"checkpoint={mcore}", f"out={tmp_path / 'half'}", "dtype=bfloat16")
    found = load_file(tmp_path / "half" / "model.safetensors")
    source = SafetensorsReader(hf)
    assert all(torch.equal(tensor, source.whole(name).bfloat16()) for name, tensor in found.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_value_that_a_dtype_cannot_hold_is_refused(hf: Path, tmp_path: Path) -> None:
    """In fp16 it would become infinite."""
    large = tmp_path / "large"
    shutil.copytree(hf, large)
    edited_tensors(large, lambda have: have[NORM].__setitem__(3, 1e5))
    for source, direction in ((f"hf={large}", "import"), (f"checkpoint={tmp_path / 'exact'}", "export")):
        if direction == "export":
            convert("import", f"hf={large}", f"out={tmp_path / 'exact'}")
        out = tmp_path / f"{direction}ed"
        assert f"100000 in {NORM}" in refused("CheckpointError", direction, source, f"out={out}", "dtype=float16")
        assert not out.exists()


def test_an_ar_is_cut_out_of_a_whole_model_and_keeps_its_head(hf: Path, tmp_path: Path) -> None:
    convert("import", f"hf={hf}", f"out={tmp_path / 'ar'}", "layers=3")
    convert("export", f"checkpoint={tmp_path / 'ar'}", f"out={tmp_path / 'cut'}")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 3
    found = load_file(tmp_path / "cut" / "model.safetensors")
    assert max(int(name.split(".")[2]) for name in found if ".layers." in name) == 2
    assert "model.norm.weight" not in found and "lm_head.weight" not in found
    source = SafetensorsReader(hf)
    assert all(torch.equal(tensor, source.whole(name)) for name, tensor in found.items())
    assert torch.equal(load_file(tmp_path / "cut" / "value_head.safetensors")["weight"], torch.eye(64))
    trained = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    write_value_head(tmp_path / "cut", trained)
    shutil.copyfile(tmp_path / "cut" / "config.json", tmp_path / "cut" / "nla_meta.yaml")
    convert("import", f"hf={tmp_path / 'cut'}", f"out={tmp_path / 'again'}")
    convert("export", f"checkpoint={tmp_path / 'again'}", f"out={tmp_path / 'back'}")
    assert torch.equal(load_file(tmp_path / "back" / "value_head.safetensors")["weight"], trained)
    assert (tmp_path / "back" / "nla_meta.yaml").is_file(), "an NLA model's sidecar goes along"
    assert same_tensors(tmp_path / "cut", tmp_path / "back")
    told = convert("verify", f"hf={tmp_path / 'back'}", f"checkpoint={tmp_path / 'again'}")
    assert "the AR's vector" in told and told.count("the same") == 2


def killed_under_way(out: Path, entries: int, *arguments: object) -> dict[str, int]:
    """Kill a conversion with SIGKILL when some files are finished; returns these with the time of their last change."""
    child = start("convert", *map(str, arguments))
    journal, deadline = Path(f"{out}.partial") / "journal", time.monotonic() + 120
    while len(list(journal.glob("*.json"))) <= entries and time.monotonic() < deadline:
        time.sleep(0.001)
    assert child.process.pid is not None
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.join()
    assert not out.exists(), "killed too late for this test, or finished too early"
    done = [json.loads(path.read_text()) for path in journal.glob("*.json") if path.name != "plan.json"]
    files = {record["file"] for entry in done for record in entry["records"]}
    return {file: (Path(f"{out}.partial") / file).stat().st_mtime_ns for file in files}


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_killed_conversion_goes_on_with_another_number_of_workers(
    hf: Path, mcore: Path, tmp_path: Path, direction: str
) -> None:
    """What was finished is not written again, and the result is that of an undisturbed one."""
    out = tmp_path / "out"
    arguments = (direction, f"hf={hf}" if direction == "import" else f"checkpoint={mcore}", f"out={out}", SMALL)
    finished = killed_under_way(out, 3, *arguments)
    assert finished
    convert(*arguments, "processes=2")
    assert {file: (out / file).stat().st_mtime_ns for file in finished} == finished
    assert len(list(out.rglob("*.safetensors" if direction == "export" else "*.distcp"))) > len(finished)
    if direction == "import":
        convert("export", f"checkpoint={out}", f"out={tmp_path / 'back'}")
        assert same_tensors(hf, tmp_path / "back")
    else:
        assert same_tensors(hf, out)
    before = contents(out)
    assert "finished already" in convert(*arguments)
    assert contents(out) == before


def test_another_conversion_does_not_continue_a_killed_one(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_under_way(out, 2, "import", f"hf={hf}", f"out={out}", SMALL)
    message = refused("RunDirectoryError", "import", f"hf={hf}", f"out={out}", SMALL, "dtype=bfloat16")
    assert 'dtype="bfloat16"' in message and f"remove {out}.partial" in message


def test_a_directory_of_something_else_is_left_alone(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    refused("RunDirectoryError", "import", f"hf={hf}", f"out={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def _limited(arguments: Sequence[str]) -> int:
    """The command where no file may grow beyond 60 kB, as on a full disk: the kernel refuses the write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    return main(arguments)


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_full_disk_is_named_and_the_conversion_goes_on_with_more_room(
    hf: Path, mcore: Path, tmp_path: Path, direction: str
) -> None:
    out, source = tmp_path / "out", hf if direction == "import" else mcore
    key = "hf" if direction == "import" else "checkpoint"
    arguments = ("convert", direction, f"{key}={source}", f"out={out}", SMALL)
    before = contents(source)
    done = start(*arguments, entry=_limited).wait(120)
    assert done.returncode == 2 and "DiskFull: File too large" in done.stderr, done.stderr[-3000:]
    assert not out.exists() and contents(source) == before
    convert(*arguments[1:])
    assert out.is_dir() and contents(source) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_disk_without_room_is_refused_before_anything_is_written(
    hf: Path, mcore: Path, small_disk: Path, direction: str
) -> None:
    source = f"hf={hf}" if direction == "import" else f"checkpoint={mcore}"
    assert "kB free" in refused("DiskFull", direction, source, f"out={small_disk / 'out'}")
    assert list(small_disk.iterdir()) == []


def edited_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edited_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def cut_short(path: Path, by: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def without_a_chunk(checkpoint: Path) -> None:
    path = checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.layers.self_attention.linear_proj.weight"].chunks.pop()
    path.write_bytes(pickle.dumps(metadata))


def indexed(directory: Path, index: str) -> None:
    """The weights in a file that counts only where the index names it."""
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    (directory / INDEX).write_text(index)


NORM = "model.norm.weight"
BAD_HF: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a truncated file": (lambda at: cut_short(at / "model.safetensors"), "CheckpointError", "cut short"),
    "an index of a missing shard": (
        lambda at: indexed(at, json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})),
        "MissingFile", "model-00001-of-00002.safetensors",
    ),
    "an index that names the wrong file": (
        lambda at: indexed(at, json.dumps({"weight_map": {"x": "one.safetensors"}})),
        "CheckpointError", "'x' in one.safetensors",
    ),
    "a tensor too many": (
        lambda at: edited_tensors(at, lambda have: have.update(extra=torch.zeros(1))), "CheckpointError", "'extra'",
    ),
    "a tensor too few": (lambda at: edited_tensors(at, lambda have: have.pop(NORM)), "CheckpointError", NORM),
    "a wrong shape": (
        lambda at: edited_tensors(at, lambda have: have.update({NORM: torch.zeros(65)})), "CheckpointError", "(65,)",
    ),
    "a wrong dtype": (
        lambda at: edited_tensors(at, lambda have: have.update({NORM: torch.zeros(64, dtype=torch.int8)})),
        "CheckpointError", "torch.int8",
    ),
    "dtypes that differ between blocks": (
        lambda at: edited_tensors(
            at, lambda have: have.update({(n := "model.layers.2.mlp.down_proj.weight"): have[n].bfloat16()})
        ),
        "CheckpointError", "dtype=",
    ),
    "a vocabulary smaller than the tokenizer": (
        lambda at: (
            edited_config(at, vocab_size=500),
            edited_tensors(at, lambda have: have.update({
                name: have[name][:500].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")
            })),
        ),
        "CheckpointError", "vocabulary of 500",
    ),
    "another family": (
        lambda at: edited_config(at, architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        "CheckpointError", "no place for",
    ),
    "a damaged config": (lambda at: cut_short(at / "config.json", 20), "CheckpointError", "config.json is no JSON"),
    "a damaged index": (lambda at: indexed(at, '{"weight_map": {'), "CheckpointError", f"{INDEX} is no JSON"),
    "an index without a map": (lambda at: indexed(at, "{}"), "CheckpointError", "without a weight_map"),
    "a damaged tokenizer": (lambda at: cut_short(at / "tokenizer.json"), "CheckpointError", "json is no JSON"),
    "a damaged head": (lambda at: (at / "value_head.safetensors").touch(), "CheckpointError", "value_head"),
    "tied embeddings that differ": (
        lambda at: edited_config(at, tie_word_embeddings=True), "CheckpointError", "other than model.embed_tokens",
    ),
    "two kinds of rotary scaling": (
        lambda at: edited_config(at, rope_scaling={"type": "dynamic", "factor": 2.0}), "UnsupportedModel", "dynamic",
    ),
    "an unknown family": (
        lambda at: edited_config(at, architectures=["NobodysModel"]), "UnsupportedModel", "NobodysModel",
    ),
    "fewer blocks than its weights": (
        lambda at: edited_config(at, num_hidden_layers=11, layer_types=None), "CheckpointError", "layers.11",
    ),
}  # fmt: skip


def test_an_import_of_a_weight_that_is_not_finite_makes_no_checkpoint(hf: Path, tmp_path: Path) -> None:
    """The weights are read while they are written: then it is known."""
    shutil.copytree(hf, tmp_path / "bad")
    edited_tensors(tmp_path / "bad", lambda have: have[NORM][3].fill_(float("inf")))
    assert NORM in refused("CheckpointError", "import", f"hf={tmp_path / 'bad'}", f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mistake", BAD_HF)
def test_an_import_of_a_bad_directory_is_refused_before_it_begins(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    spoil, kind, named = BAD_HF[mistake]
    bad = tmp_path / "bad"
    shutil.copytree(hf, bad)
    spoil(bad)
    before = contents(bad)
    assert main(["convert", "import", f"hf={bad}", f"out={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{kind}: ") and named in message and "to do: " in message
    assert [path.name for path in tmp_path.iterdir()] == ["bad"] and contents(bad) == before


BAD_CHECKPOINT: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a missing file": (lambda at: (at / "weights" / "__2_0.distcp").unlink(), "MissingFile", "__2_0.distcp"),
    "a truncated file": (lambda at: cut_short(at / "weights" / "__2_0.distcp"), "CheckpointError", "__2_0.distcp"),
    "a chunk too few": (without_a_chunk, "CheckpointError", "elements of decoder.layers.self_attention.linear_proj"),
    "damaged settings": (lambda at: cut_short(at / "weights" / "metadata.json", 5), "CheckpointError", "metadata.json"),
    "truncated metadata": (lambda at: cut_short(at / "weights" / ".metadata"), "CheckpointError", ".metadata"),
    "no checkpoint": (lambda at: shutil.rmtree(at / "weights"), "MissingFile", "no checkpoint in"),
    "no config": (lambda at: (at / "config.json").unlink(), "MissingFile", "hf="),
    "another family": (
        lambda at: edited_config(at, architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        "CheckpointError", "tensors",
    ),
    "another depth": (lambda at: edited_config(at, num_hidden_layers=11, layer_types=None), "CheckpointError", "shape"),
    "another width": (lambda at: edited_config(at, intermediate_size=128), "CheckpointError", "shape"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_CHECKPOINT)
def test_an_export_of_a_bad_checkpoint_is_refused_before_it_begins(mcore: Path, tmp_path: Path, mistake: str) -> None:
    spoil, kind, named = BAD_CHECKPOINT[mistake]
    bad = tmp_path / "bad"
    shutil.copytree(mcore, bad)
    spoil(bad)
    before = contents(bad)
    assert named in refused(kind, "export", f"checkpoint={bad}", f"out={tmp_path / 'out'}")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"] and contents(bad) == before


@pytest.mark.parametrize("kind", ["checkpoint", "hf"])
def test_verify_finds_what_is_the_same(hf: Path, mcore: Path, kind: str) -> None:
    told = convert("verify", f"hf={hf}", f"checkpoint={mcore if kind == 'checkpoint' else hf}", "parallel=tp2")
    count = len(SafetensorsReader(hf).names())
    assert f"{count} of {count} tensors are the same" in told
    assert "logits of" in told and "against transformers" in told and "they differ" not in told


def test_verify_names_each_tensor_that_differs(hf: Path, mcore: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    name = "model.layers.4.mlp.up_proj.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] += 0.25
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()

    edited_tensors(other, edit)
    done = command("convert", "verify", f"hf={other}", f"checkpoint={mcore}")
    assert done.returncode == 1 and "ConversionMismatch: " in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("model.")]
    assert len(lines) == 1 and lines[0].startswith(name) and "0.25 apart" in lines[0], done.stdout
    assert "they differ" in done.stdout
    count = len(SafetensorsReader(hf).names())
    assert f"{count - 1} of {count} tensors are the same, 1 of them rounded to another dtype" in done.stdout


def test_verify_names_each_value_of_the_configuration_that_differs(hf: Path, mcore: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    edited_config(other, rope_theta=77.0, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    done = command("convert", "verify", f"hf={other}", f"checkpoint={mcore}", "logits=false")
    assert done.returncode == 1 and "0 tensors, 1 values of config.json" in done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("config.json: ")]
    assert line.split() == ["config.json:", "rope_theta", "77.0", "10000.0", "another", "value"]


def test_verify_without_logits_needs_no_tokenizer(hf: Path, mcore: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(hf, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer" in refused("MissingFile", "verify", f"hf={bare}", f"checkpoint={mcore}")
    assert "logits of" not in convert("verify", f"hf={bare}", f"checkpoint={mcore}", "logits=false")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["import", "out=x"], "no hf="),
        (["import", "hf=x"], "no out="),
        (["export", "out=x"], "no checkpoint="),
        (["verify", "hf=x"], "no checkpoint="),
        (["export", "checkpoint=x", "out=x", "layers=3"], "layers=3 for export"),
        (["sideways", "hf=x"], "direction='sideways'"),
        (["import", "hf=x", "out=x", "shard_size=large"], "shard_size='large'"),
        (["import", "hf=x", "out=x", "--no-such-flag"], "no_such_flag"),
    ],
)
def test_a_command_that_lacks_or_contradicts_something_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main(["convert", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_options(hf: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    """A bare word is the direction, and a flag is a key that is true."""
    assert main(["convert", "import", f"hf={hf}", "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert main(["convert", "direction=import", f"hf={hf}", "dry_run=true"]) == 0
    assert capsys.readouterr().out == words != ""
