"""A conversion on paper, from config.json alone: models that no test machine holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nla_megatron.cli import main
from nla_megatron.config.schema import ConvertConfig
from nla_megatron.conversion.estimate import estimate
from nla_megatron.errors import ConfigError, UnsupportedModel

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 8192,
    "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80,
    "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
QWEN_235B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_attention_heads": 64,
    "num_key_value_heads": 4, "num_hidden_layers": 94, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rope_scaling": None, "tie_word_embeddings": False,
    "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 94,
    "torch_dtype": "bfloat16",
}  # fmt: skip
# Parameters as the two models' cards count them.
MODELS = {"70B": (LLAMA_70B, 70_553_706_496, 723), "235B": (QWEN_235B, 235_093_634_560, 36_945)}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int, int]:
    config, parameters, tensors = MODELS[request.param]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, parameters, tensors


def test_bytes_and_tensors_of_an_import_are_those_of_the_model(model: tuple[Path, int, int]) -> None:
    directory, parameters, tensors = model
    told = estimate(ConvertConfig(hf=str(directory), processes=8, disk_rate=2.0))
    assert (told.parameters, told.tensors) == (parameters, tensors)
    assert told.read_bytes == told.written_bytes == 2 * parameters
    assert told.seconds == pytest.approx(4 * parameters / 2e9)
    assert told.bytes_per_worker < 1.2 * told.written_bytes / 8, "eight workers share the files out evenly"


def test_no_worker_needs_more_than_two_of_the_largest_parameter(model: tuple[Path, int, int]) -> None:
    for direction in ("import", "export"):
        told = estimate(ConvertConfig(direction=direction, hf=str(model[0])))
        assert told.largest_tensor_bytes <= told.peak_bytes <= 2 * told.largest_tensor_bytes
        assert told.peak_bytes < 3e9


def test_shards_of_an_export_hold_at_most_the_asked_size(model: tuple[Path, int, int]) -> None:
    directory, parameters, _ = model
    told = [estimate(ConvertConfig(direction="export", hf=str(directory), shard_size=f"{size}GB")) for size in (5, 10)]
    assert 2 * parameters / 5e9 <= told[0].files <= 1.15 * 2 * parameters / 5e9
    assert told[1].files < told[0].files


def test_another_dtype_is_written_at_its_own_size(model: tuple[Path, int, int]) -> None:
    told = estimate(ConvertConfig(hf=str(model[0]), dtype="float32"))
    assert told.written_bytes == 2 * told.read_bytes


def test_an_ar_is_its_blocks_and_its_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    whole, cut = (estimate(ConvertConfig(hf=str(tmp_path), layers=layers)) for layers in (None, 54))
    block = (whole.parameters - 2 * 128256 * 8192 - 8192) // 80
    assert cut.parameters == 54 * block + 128256 * 8192
    assert cut.written_bytes == 2 * cut.parameters + 4 * 8192**2


def test_the_command_prints_it_and_writes_nothing(
    model: tuple[Path, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "import", f"hf={model[0]}", "--dry-run", "--disk-rate=3"]) == 0
    shown = capsys.readouterr().out
    assert f"{model[1] / 1e9:.2f} B parameters" in shown and "peak memory" in shown and "at 3 GB/s" in shown
    assert [path.name for path in model[0].iterdir()] == ["config.json"]


def test_what_cannot_be_converted_has_no_estimate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, "architectures": ["NobodysModel"]}))
    with pytest.raises(UnsupportedModel, match="NobodysModel"):
        estimate(ConvertConfig(hf=str(tmp_path)))
    with pytest.raises(ConfigError, match="no hf="):
        estimate(ConvertConfig())
    with pytest.raises(ConfigError, match="verify"):
        estimate(ConvertConfig(direction="verify", hf=str(tmp_path)))
