"""`plan reshard` against bytes counted by hand from a model's published numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nla_megatron.conversion.families import FAMILIES
from nla_megatron.errors import ConfigError, LayoutError
from nla_megatron.launch.commands import configured, execute
from nla_megatron.reshard.summary import check
from nla_megatron.types import ModelShape
from tests.support.tiny import SHAPE

QWEN3_8B = replace(
    SHAPE, num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_heads=32, num_kv_heads=8, head_dim=128,
    vocab_size=151_936, tied_embeddings=False, rope_theta=1e6,
)  # fmt: skip


def directory(path: Path, shape: ModelShape) -> str:
    (path / "config.json").write_text(json.dumps(FAMILIES[shape.family].config_from_shape(shape)))
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    assert execute("plan", ["reshard", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:22].strip(): line[22:].strip() for line in lines if line[22:23] == " "}


def test_the_plan_of_8b_is_what_is_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = directory(tmp_path, QWEN3_8B)
    found = told(capsys, f"hf={hf}", "parallel.tp=4", "parallel.pp=2", "parallel.dp=1", "rollout_tp=2")
    attention, feed_forward, vocabulary = (2 * 4096 + 2 * 1024) * 4096, 3 * 12288 * 4096, 2 * 151_936 * 4096
    matrices, norms = 36 * (attention + feed_forward) + vocabulary, 36 * (2 * 4096 + 2 * 128) + 4096
    # Eight ranks need half of every matrix, and all norms. Each holds a quarter of its stage's matrices, which belongs
    # to its half on two of four ranks, and its stage's norms.
    needed, local = 2 * (8 * matrices // 2 + 8 * norms), 2 * (2 * matrices // 4 + 4 * norms)
    assert found["ranks"] == "8, of which 8 were planned"
    assert found["needed by the sampler"] == f"{needed / 1e9:.3f} GB over all ranks"
    assert found["copied locally"] == f"{local / 1e9:.3f} GB"
    assert found["to be sent, at least"] == f"{(needed - local) / 1e9:.3f} GB"
    assert found["sent / lower bound"] == "1.0000 on the planned ranks"
    assert found["ordinary path"] == "0 tensors"
    assert float(found["staging"].split()[2]) <= 256 * 1.048576


def test_equal_tensor_parallelism_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = directory(tmp_path, SHAPE)
    found = told(capsys, f"hf={hf}", "parallel.tp=2", "parallel.dp=2", "rollout_tp=2")
    assert found["to be sent, at least"] == "0.000 GB"
    assert found["sent by one rank"] == "at most 0.000 GB in 0 messages"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("", ConfigError, "no hf="),
        ("hf={hf} rollout_tp=0", ConfigError, "rollout_tp=0"),
        ("hf={hf} expert_parallel=true", LayoutError, "a model without experts"),
        ("hf={hf} parallel.tp=2 parallel.dp=2 rollout_tp=3", LayoutError, "4 ranks at rollout_tp=3"),
        ("hf={hf} parallel.dp=3 rollout_tp=3", LayoutError, "4 attention heads at rollout_tp=3"),
        ("hf={hf} parallel.dp=8 rollout_tp=8", LayoutError, "4 attention heads at rollout_tp=8"),
        ("hf={hf} parallel.tp=4", LayoutError, "2 key/value heads at parallel.tp=4"),
        ("hf={hf} parallel.pp=5", LayoutError, "4 blocks at parallel.pp=5"),
        ("hf={hf} parallel.pp=2 parallel.stages=[1,2]", LayoutError, r"parallel.stages=\[1, 2\] for 4 blocks"),
        ("hf={hf} parallel.dp=2 parallel.ep=2", LayoutError, "a model without experts"),
    ],
)
def test_what_cannot_be_planned_is_named_before_anything_is_traced(
    tmp_path: Path, options: str, error: type, message: str
) -> None:
    arguments = options.format(hf=directory(tmp_path, SHAPE)).split()
    with pytest.raises(error, match=message):
        check(configured("plan", ["reshard", *arguments]), 1)
