"""SAE files of sae_lens's versions, read or refused. Legend: D hidden, M features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nla_megatron.errors import CheckpointError, ConfigError, MissingFile, NlaError, UnsupportedModel
from nla_megatron.interventions.sae_files import SaeFormat, layer_of, load_sae
from tests.unit.interventions.slow import SlowSae, Tensors, each, make_tensors

D, M = 5, 9
NEW = {"d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu", "reshape_activations": "none"}
OLD = {"d_in": D, "d_sae": M, "hook_point": "blocks.3.hook_resid_post", "prepend_bos": True, "context_size": 128}


def write(path: Path, config: dict, tensors: Tensors) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config))
    save_file({name: values.contiguous() for name, values in tensors.items()}, path / "sae_weights.safetensors")
    return path


def check_like(path: Path, slow: SlowSae, **options: object) -> None:
    sae, stream_TD = load_sae(path, **options), torch.randn(6, D, generator=torch.Generator().manual_seed(2)) * 2
    features_TM = sae.encode(stream_TD)
    torch.testing.assert_close(features_TM.double(), each(slow.encode, stream_TD), rtol=1e-4, atol=1e-4)
    wanted = each(lambda x: slow.decode(slow.encode(x), x), stream_TD)
    torch.testing.assert_close(sae.decode(features_TM, stream_TD).double(), wanted, rtol=1e-4, atol=1e-4)
    assert bool((features_TM > 0).any())


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "standard", "apply_b_dec_to_input": False, "normalize_activations": "none"},
        {"architecture": "jumprelu", "apply_b_dec_to_input": False, "normalize_activations": "constant_norm_rescale"},
        {"architecture": "topk", "k": 3, "normalize_activations": "layer_norm"},
        {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True},
        {"architecture": "gated", "apply_b_dec_to_input": True},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_each_architecture_and_option_is_the_slow_loop(tmp_path: Path, config: dict) -> None:
    tensors = make_tensors(config["architecture"], D, M, 1)
    path = write(tmp_path / "sae", {**NEW, **config, "metadata": {"hook_name": "blocks.7.hook_resid_post"}}, tensors)
    check_like(path, SlowSae(tensors, **config))
    check_like(path / "sae_weights.safetensors", SlowSae(tensors, **config))
    assert load_sae(path).layer == 7


def test_older_files_are_read_by_their_own_keys(tmp_path: Path) -> None:
    tensors = make_tensors("standard", D, M, 2)
    topk = {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "normalize_activations": None}
    path = write(tmp_path / "topk", topk, tensors)
    check_like(path, SlowSae(tensors, architecture="topk", k=2))
    assert load_sae(path).layer == 3
    # A scaling factor of ones was once written for every SAE.
    ones = {**tensors, "scaling_factor": torch.ones(M)}
    check_like(write(tmp_path / "ones", {**OLD, "normalize_activations": False}, ones), SlowSae(tensors))
    scaled = {**tensors, "finetuning_scaling_factor": torch.rand(M) + 0.5}
    path = write(tmp_path / "scaled", {**OLD, "finetuning_scaling_factor": True}, scaled)
    check_like(path, SlowSae(scaled))
    jump = make_tensors("jumprelu", D, M, 2)
    logs = {**jump, "log_threshold": jump.pop("threshold").log()}
    path = write(
        tmp_path / "jump", {**OLD, "architecture": "jumprelu"}, {k: v for k, v in logs.items() if k != "threshold"}
    )
    check_like(path, SlowSae({**jump, "threshold": logs["log_threshold"].exp()}, architecture="jumprelu"))


@pytest.mark.parametrize("key", ["expected_average_only_in", True])
def test_an_input_factor_is_folded_in_and_asked_for(tmp_path: Path, key: object) -> None:
    tensors = make_tensors("standard", D, M, 3)
    path = write(tmp_path / "sae", {**NEW, "architecture": "standard", "normalize_activations": key}, tensors)
    check_like(path, SlowSae(tensors, input_factor=0.4), input_factor=0.4)
    with pytest.raises(ConfigError, match="input_factor=None"):
        load_sae(path)
    with pytest.raises(ConfigError, match="'none' in .* with input_factor=2.0"):
        load_sae(write(tmp_path / "none", {**NEW, "architecture": "standard"}, tensors), input_factor=2.0)


def test_a_bare_file_needs_what_it_does_not_say_and_half_precision_is_widened(tmp_path: Path) -> None:
    tensors = {name: values.bfloat16() for name, values in make_tensors("gated", D, M, 4).items()}
    path = tmp_path / "gated.safetensors"
    save_file(tensors, path)
    check_like(path, SlowSae(tensors, architecture="gated", apply_b_dec_to_input=False), bare=SaeFormat("gated", False))
    assert load_sae(path, SaeFormat("gated", False)).encoder_DM.dtype == torch.float32
    with pytest.raises(ConfigError, match="without an SaeFormat"):
        load_sae(path)
    with pytest.raises(ConfigError, match="with an SaeFormat"):
        load_sae(tmp_path, SaeFormat("gated", False))


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.0.hook_resid_post", 0),
        ("blocks.12.hook_resid_pre", 11),
        ("blocks.0.hook_resid_pre", "embedding"),
        ("hook_embed", "embedding"),
        ("model.layers.17", 17),
        ("model.language_model.layers.3", 3),
    ],
)
def test_places_in_the_residual_stream_are_layers(hook: str, layer: int | str) -> None:
    assert layer_of(hook, "cfg.json") == layer


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "batchtopk"}, "architecture='batchtopk'"),
        ({"architecture": "transcoder"}, "architecture='transcoder'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn='tanh-relu'"),
        ({"architecture": "gated", "activation_fn": "topk"}, "activation_fn='topk'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations='batch_norm'"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True"),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_out"}}, "blocks.3.hook_mlp_out"),
        ({"hook_name": "blocks.3.attn.hook_z"}, "blocks.3.attn.hook_z"),
    ],
)
def test_what_would_not_be_honoured_is_refused_by_name(tmp_path: Path, change: dict, named: str) -> None:
    path = write(tmp_path / "sae", {**NEW, **change}, make_tensors("standard", D, M, 5))
    with pytest.raises(UnsupportedModel) as error:
        load_sae(path)
    assert named in error.value.found and "cfg.json" in error.value.found


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        ({}, {"W_dec": None}, "W_dec of shape None"),
        ({}, {"W_enc": None}, "W_enc of shape None"),
        ({}, {"W_dec": torch.zeros(D, M)}, "W_dec of shape (5, 9)"),
        ({"d_in": 8}, {}, "W_enc of shape (5, 9)"),
        ({}, {"b_enc": torch.full((M,), float("nan"))}, "NaN or inf in b_enc"),
        ({"architecture": "jumprelu"}, {}, "threshold of shape None"),
        ({"architecture": "gated"}, {}, "b_gate of shape None"),
        ({}, {"threshold": torch.zeros(M)}, "threshold in"),
        ({}, {"scaling_factor": torch.full((M,), 2.0)}, "finetuning_scaling_factor in"),
        ({"finetuning_scaling_factor": True}, {}, "finetuning_scaling_factor of shape None"),
        ({"architecture": "topk"}, {}, "k=None"),
        ({"architecture": "topk", "k": M + 1}, {}, "k=10"),
    ],
)
def test_weights_that_are_not_what_the_config_says_are_named(
    tmp_path: Path, config: dict, tensors: dict, named: str
) -> None:
    merged = {**make_tensors("standard", D, M, 6), **tensors}
    path = write(tmp_path / "sae", {**NEW, **config}, {name: v for name, v in merged.items() if v is not None})
    with pytest.raises(CheckpointError) as error:
        load_sae(path)
    assert named in error.value.found


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    def message(path: Path, bare: SaeFormat | None = None) -> tuple[type[NlaError], str]:
        with pytest.raises(NlaError) as error:
            load_sae(path, bare)
        return error.type, error.value.found

    assert message(tmp_path / "none")[0] is MissingFile
    path = write(tmp_path / "sae", NEW, make_tensors("standard", D, M, 7))
    (path / "sae_weights.safetensors").write_bytes(b"no tensors")
    assert message(path)[0] is CheckpointError
    (path / "sae_weights.safetensors").unlink()
    assert message(path) == (MissingFile, f"no '{path / 'sae_weights.safetensors'}'")
    (path / "cfg.json").write_text("[1]")
    assert message(path) == (CheckpointError, f"a list in '{path / 'cfg.json'}'")
    (path / "cfg.json").write_text("{")
    assert message(path)[0] is CheckpointError
    (path / "cfg.json").unlink()
    assert message(path) == (MissingFile, f"no '{path / 'cfg.json'}'")
