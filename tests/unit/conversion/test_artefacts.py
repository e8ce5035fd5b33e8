"""Checkpoints of the two public trainers, written by hand as those write them, in every naming: read, or told apart.

Legend: D hidden.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nla_megatron.cli import main
from nla_megatron.contract.blocks import InjectionSpec, ReconstructorSpec
from nla_megatron.contract.sidecar import prompt_contract, read_model_sidecar
from nla_megatron.conversion.artefacts import Told, adopt
from nla_megatron.conversion.heads import head_of
from nla_megatron.conversion.hf import read_shape
from nla_megatron.conversion.live import load_reconstructor
from nla_megatron.errors import (
    CheckpointError,
    ConfigError,
    MarkerError,
    MissingFile,
    NlaError,
    SidecarError,
    UnsupportedModel,
)
from nla_megatron.models.batching import Batch, microbatches
from nla_megatron.models.pipeline import forward_each
from nla_megatron.parallel.world import World
from nla_megatron.tasks.nla import NlaTask
from tests.support.tiny import LAYER, SHAPE, tiny_contract, tiny_table

D = SHAPE.hidden_size
KITFT, EASYNLA = Told("kitft"), Told("easynla")
REPLACE, NORM_ADD = InjectionSpec("replace", -1, 150.0), InjectionSpec("norm_add", 1, 1.0)


def tokens_and_templates(base: Path) -> tuple[dict[str, Any], str, str]:
    """The `tokens` block, and the templates as format strings."""
    contract = tiny_contract(base)
    tokens = {
        "injection_char": contract.marker,
        "injection_token_id": contract.marker_id,
        "injection_left_neighbor_id": contract.left_id,
        "injection_right_neighbor_id": contract.right_id,
        # The first id of the tokenised end is left out, whatever more of it is stable.
        "critic_suffix_ids": list(contract.ar_suffix_ids[-2:]),
    }
    return tokens, contract.templates_av.replace("<INJECT>", "{injection_char}"), contract.templates_ar


def trained_by_kitft(base: Path, role: str) -> dict[str, Any]:
    """As the trainer writes it: an actor's says nothing of the layer, a critic's in `critic`."""
    tokens, actor, critic = tokens_and_templates(base)
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "rl",
        "base_checkpoint": "org/base",
        "d_model": D,
        "extraction": {"injection_scale": 150.0 if role == "actor" else None, "mse_scale": D**0.5},
        "tokens": tokens,
        "prompt_templates": {"actor": actor, "critic": critic},
        "trained_on": ["rl.parquet"],
        "parent_checkpoints": ["org/base"],
        "created_at": "2026-01-01T00:00:00+00:00",
        "created_by": "nla.train_actor.NLAFSDPActor",
        **({"critic": {"extraction_layer_index": LAYER}} if role == "critic" else {}),
        "training": {"rollout_id": 7, "lr": 1e-5},
    }


def released_by_kitft(base: Path, role: str) -> dict[str, Any]:
    """As it is published: renamed, with the layer at the top."""
    raw = trained_by_kitft(base, {"av": "actor", "ar": "critic"}[role])
    templates = raw["prompt_templates"]
    raw["prompt_templates"] = {"av": templates["actor"], "ar": templates["critic"]}
    return {**raw, "role": role, "extraction_layer_index": LAYER}


def of_schema_1(base: Path, role: str) -> dict[str, Any]:
    raw = trained_by_kitft(base, role)
    return {**raw, "schema_version": 1, "critic": {"num_hidden_layers": LAYER}}


def as_documented(base: Path, role: str) -> dict[str, Any]:
    """The reconstructor's example in the documentation: the block under its other name, a rounded scale."""
    raw = released_by_kitft(base, role)
    for key in ("critic", "extraction_layer_index"):
        raw.pop(key, None)
    return {**raw, "extraction": {"mse_scale": D**0.5 + 0.004}, "ar": {"num_hidden_layers": LAYER}}


def left_by_easynla(base: Path) -> dict[str, Any]:
    """The sidecar of the training data, copied beside the checkpoint."""
    tokens, actor, critic = tokens_and_templates(base)
    return {
        "dataset_id": "rl_0123456789abcdef",
        "stage": "rl",
        "row_count": 48,
        "extraction": {
            "base_model": "org/base", "d_model": D, "layer_index": LAYER, "norm": "none", "corpus": "corpus",
            "corpus_slice": {"start": 0, "length": 100}, "positions_per_doc": 10,
        },
        "kind": "nla_dataset",
        "schema_version": 1,
        "keep_debug_metadata": True,
        "tokens": {**tokens, "critic_suffix_ids": None},
        "prompt_templates": {"actor": actor, "critic": critic},
        "parent_datasets": ["base_0123456789abcdef"],
        "created_at": "2026-01-01T00:00:00+00:00",
        "created_by": "nla.datagen.stage3_build",
        "git_commit": "abcdef0",
    }  # fmt: skip


SIDECARS = {
    "trained": lambda base, role: trained_by_kitft(base, {"av": "actor", "ar": "critic"}[role]),
    "released": released_by_kitft,
    "schema 1": lambda base, role: of_schema_1(base, {"av": "actor", "ar": "critic"}[role]),
    "documented": as_documented,
    "data set's": lambda base, role: left_by_easynla(base),
}


def told_of(sidecar: str) -> Told:
    return EASYNLA if sidecar == "data set's" else KITFT


def put(directory: Path, raw: dict[str, Any]) -> Path:
    (directory / "nla_meta.yaml").write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
    return directory


def head_weight() -> Tensor:
    return torch.eye(D) + 0.1 * torch.randn(D, D, generator=torch.Generator().manual_seed(4))


def critic(base: Path, directory: Path, form: str) -> Path:
    """An AR's directory as `form` says: what its exporter leaves of the final norm and the output layer."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.config.num_hidden_layers = LAYER + 1
    model.config.layer_types = model.config.layer_types[: LAYER + 1]
    model.model.layers = model.model.layers[: LAYER + 1]
    if form != "with norm and lm_head":
        model.lm_head, model.model.norm = nn.Identity(), nn.Identity()
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    head = head_weight()
    if form == "for Megatron":
        _add_stand_ins(directory)
        head = head.bfloat16()
    save_file({"weight": head}, directory / "value_head.safetensors")
    return directory


def _add_stand_ins(directory: Path) -> None:
    """A norm of ones and an identity of (D, D) in the place of the output layer, in a file of their own."""
    names = dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors")
    extra = {"model.norm.weight": torch.ones(D), "lm_head.weight": torch.eye(D)}
    save_file(extra, directory / "model-megatron-compat.safetensors")
    names |= dict.fromkeys(extra, "model-megatron-compat.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def predictions(directory: Path, world: World) -> Tensor:
    """The AR's vectors of three rows, by our model."""
    model = load_reconstructor(str(directory), read_shape(directory), world, "float32")
    out: list[Tensor] = []
    batch = Batch(ids=[[5, 6, 7, 8], [9, 10], [11, 12, 13]])
    parts = microbatches(batch, world, 3)
    forward_each(model, parts, world, lambda vectors, part: out.append(vectors[part.rows.argsort()]))
    return out[0]


def expected_predictions(base: Any, head: Tensor) -> Tensor:
    """The same by transformers: the stream after block K at the last token, through the head."""
    with torch.no_grad():
        streams = [
            base(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0, -1]
            for ids in ([5, 6, 7, 8], [9, 10], [11, 12, 13])
        ]
    return torch.stack(streams) @ head.float().T


@pytest.mark.parametrize("form", ["bare", "with norm and lm_head", "for Megatron"])
@pytest.mark.parametrize("sidecar", SIDECARS)
def test_an_ar_of_any_naming_predicts_what_it_did(
    sidecar: str, form: str, world: World, base: Path, tmp_path: Path
) -> None:
    source = put(critic(base, tmp_path / "theirs", form), SIDECARS[sidecar](base, "ar"))
    adopted = adopt(source, tmp_path / "ours", told_of(sidecar))
    assert (adopted.role, adopted.extraction.layer_index, adopted.d_model) == ("ar", LAYER, D)
    assert adopted.bos_policy == "none", "this tokenizer adds no special tokens, whatever the policy"
    assert read_model_sidecar(tmp_path / "ours") == adopted
    head = head_weight().bfloat16() if form == "for Megatron" else head_weight()
    expected = expected_predictions(AutoModelForCausalLM.from_pretrained(base), head)
    torch.testing.assert_close(predictions(tmp_path / "ours", world), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sidecar", ["trained", "released", "schema 1", "data set's"])
def test_an_av_of_any_naming_says_how_it_is_injected(sidecar: str, base: Path, tmp_path: Path) -> None:
    source = put(Path(shutil.copytree(base, tmp_path / "theirs")), SIDECARS[sidecar](base, "av"))
    layer = LAYER if sidecar == "trained" else None  # such a file does not say it
    adopted = adopt(source, tmp_path / "ours", replace(told_of(sidecar), layer_index=layer))
    assert (adopted.role, adopted.extraction.layer_index) == ("av", LAYER)
    assert adopted.injection == (NORM_ADD if sidecar == "data set's" else REPLACE)
    assert prompt_contract(adopted).templates_av == tiny_contract(base).templates_av
    before, after = (load_file(one / "model.safetensors") for one in (base, tmp_path / "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adopted_pair_fits_a_table_of_ours(base: Path, tmp_path: Path) -> None:
    """Equal templates and marker; the trainers record other numbers of the AR prompt's last ids."""
    task = NlaTask.open(str(tiny_table(tmp_path / "rl.parquet", base, "rl")), "rl", str(base))
    adopt(put(Path(shutil.copytree(base, tmp_path / "av")), left_by_easynla(base)), tmp_path / "our av", EASYNLA)
    adopt(put(critic(base, tmp_path / "ar", "bare"), as_documented(base, "ar")), tmp_path / "our ar", KITFT)
    assert task.check_model(str(tmp_path / "our av"), "av").injection == NORM_ADD
    assert task.check_model(str(tmp_path / "our ar"), "ar").tokens.critic_suffix_ids is not None
    with pytest.raises(SidecarError, match="'bos_policy'"):
        task.check_model(str(tmp_path / "ar"), "ar")


def test_the_command_adopts_and_asks_for_what_is_not_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put(Path(shutil.copytree(base, tmp_path / "av")), left_by_easynla(base))
    command = ["adopt", f"checkpoint={source}", f"out={tmp_path / 'ours'}"]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("SidecarError: ") and not (tmp_path / "ours").exists()
    assert main([*command, "trainer=easynla"]) == 0
    assert read_model_sidecar(tmp_path / "ours").injection == NORM_ADD


def test_an_ar_that_ends_otherwise_does_not_fit(base: Path, tmp_path: Path) -> None:
    contract = tiny_contract(base)
    shorter = replace(contract, ar_suffix_ids=contract.ar_suffix_ids[-1:])
    assert shorter.with_suffix_of(contract) == contract and contract.with_suffix_of(shorter) == shorter
    other = replace(contract, ar_suffix_ids=(*contract.ar_suffix_ids[:-1], 7))
    assert other.with_suffix_of(contract) == other


def easynla_adapter(base: Path, directory: Path, blocks: int | None) -> tuple[Path, Any]:
    """An adapter of that trainer, and the model it makes of the base; `blocks` makes it an AR's."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if blocks is not None:
        model.model.layers = model.model.layers[:blocks]
    torch.manual_seed(3)
    pattern = r".*\.self_attn\.(q_proj|k_proj|v_proj|o_proj)|.*\.mlp\.(gate_proj|up_proj|down_proj)"
    lora = LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=pattern, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    directory.mkdir()
    if blocks is None:
        wrapped.save_pretrained(directory)
    else:
        held = {name.removeprefix("base_model.model."): value for name, value in wrapped.named_parameters()}
        pairs = {f"backbone.{name}": value.detach() for name, value in held.items() if "lora_" in name}
        save_file({**pairs, "value_head.weight": head_weight()}, directory / "ar_lora_value_head.safetensors")
        meta = {
            "ar_num_layers": blocks, "lora_r": 4, "lora_alpha": 16, "quant": "4bit", "target_modules": pattern,
            "final_norm_stripped": True,
        }  # fmt: skip
        (directory / "ar_meta.json").write_text(json.dumps(meta))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    return put(directory, left_by_easynla(base)), wrapped.merge_and_unload()


def test_an_avs_adapter_becomes_a_whole_av(base: Path, tmp_path: Path) -> None:
    source, merged = easynla_adapter(base, tmp_path / "theirs", None)
    with pytest.raises(MissingFile, match="holds an adapter only"):
        adopt(source, tmp_path / "ours", EASYNLA)
    assert not list(tmp_path.glob("ours*"))
    assert adopt(source, tmp_path / "ours", EASYNLA, base=base).injection == NORM_ADD
    expected, found = merged.state_dict(), load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in found) and len(found) > 40


def test_an_ars_adapter_becomes_a_whole_ar(world: World, base: Path, tmp_path: Path) -> None:
    source, merged = easynla_adapter(base, tmp_path / "theirs", LAYER + 1)
    adopted = adopt(source, tmp_path / "ours", EASYNLA, base=base)
    assert adopted.role == "ar" and read_shape(tmp_path / "ours").num_layers == LAYER + 1
    merged.model.norm = nn.Identity()
    torch.testing.assert_close(
        predictions(tmp_path / "ours", world), expected_predictions(merged, head_weight()), rtol=1e-4, atol=1e-4
    )
    names = set(load_file(tmp_path / "ours" / "model.safetensors"))
    assert not names & {"lm_head.weight", "model.norm.weight"}


def test_a_sidecar_beside_the_run_serves_its_checkpoints(base: Path, tmp_path: Path) -> None:
    """One trainer keeps a run's sidecar a level above what it saves; the role is the checkpoint's own."""
    put(tmp_path, left_by_easynla(base))
    ar = critic(base, tmp_path / "critic_latest", "bare")
    assert adopt(ar, tmp_path / "our ar", EASYNLA, sidecar=tmp_path).role == "ar"
    av, _ = easynla_adapter(base, tmp_path / "iter_000100", None)
    (av / "nla_meta.yaml").unlink()
    with pytest.raises(MissingFile, match="nla_meta.yaml"):
        adopt(av, tmp_path / "our av", EASYNLA, base=base)
    assert adopt(av, tmp_path / "our av", EASYNLA, base=base, sidecar=tmp_path).role == "av"


@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        (Told(), SidecarError, "does not say bos_policy and injection"),
        (Told(), SidecarError, "trainer=easynla: norm_add at block 1"),
        (Told(bos_policy="none"), SidecarError, "does not say injection"),
        (Told(injection=NORM_ADD), SidecarError, "does not say bos_policy"),
        (Told("kitft"), SidecarError, "does not say injection"),  # that file has no injection_scale
        (Told("easynla", layer_index=LAYER + 1), SidecarError, "layer_index = 2 in the sidecar"),
        (Told("somebody"), ConfigError, "somebody"),
    ],
)
def test_what_is_not_said_is_asked_for_and_never_guessed(
    told: Told, kind: type[NlaError], message: str, base: Path, tmp_path: Path
) -> None:
    source = put(Path(shutil.copytree(base, tmp_path / "theirs")), left_by_easynla(base))
    with pytest.raises(kind, match=message):
        adopt(source, tmp_path / "ours", told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_values_that_are_given_need_no_trainer(base: Path, tmp_path: Path) -> None:
    source = put(Path(shutil.copytree(base, tmp_path / "theirs")), left_by_easynla(base))
    found = adopt(source, tmp_path / "ours", Told(injection=InjectionSpec("add", 2, 3.0), bos_policy="none"))
    assert (found.injection, found.bos_policy) == (InjectionSpec("add", 2, 3.0), "none")


def test_an_ar_of_the_wrong_depth_or_norm_is_refused(base: Path, tmp_path: Path) -> None:
    source = put(critic(base, tmp_path / "ar", "bare"), released_by_kitft(base, "ar"))
    raw = {**released_by_kitft(base, "ar"), "extraction_layer_index": LAYER + 1, "critic": {}}
    with pytest.raises(SidecarError, match=f"an AR of {LAYER + 1} blocks for activations of block {LAYER + 1}"):
        adopt(put(source, raw), tmp_path / "ours", KITFT)
    (source / "ar_meta.json").write_text(json.dumps({"final_norm_stripped": False}))
    with pytest.raises(UnsupportedModel, match="final_norm_stripped"):
        adopt(put(source, left_by_easynla(base)), tmp_path / "ours", EASYNLA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ar"]


def test_a_tokenizer_that_gives_other_ids_is_refused(base: Path, tmp_path: Path) -> None:
    raw = left_by_easynla(base)
    raw["tokens"]["injection_char"] = "㊙"
    source = put(Path(shutil.copytree(base, tmp_path / "theirs")), raw)
    with pytest.raises(MarkerError, match="㊙"):
        adopt(source, tmp_path / "ours", EASYNLA)


def test_an_ar_without_its_head_is_no_identity(world: World, base: Path, tmp_path: Path) -> None:
    source = put(critic(base, tmp_path / "ar", "bare"), released_by_kitft(base, "ar"))
    save_file({"weight": torch.eye(D - 1)}, source / "value_head.safetensors")
    with pytest.raises(CheckpointError, match=r"\(63, 63\)"):
        load_reconstructor(str(source), read_shape(source), world, "float32")
    save_file({"head.weight": torch.eye(D)}, source / "value_head.safetensors")
    with pytest.raises(CheckpointError, match="head.weight"):
        load_reconstructor(str(source), read_shape(source), world, "float32")
    (source / "value_head.safetensors").unlink()
    with pytest.raises(MissingFile, match="value_head.safetensors"):
        load_reconstructor(str(source), read_shape(source), world, "float32")
    assert head_of(base, read_shape(base), ReconstructorSpec()) is None, "a base model starts an AR with the identity"


@pytest.mark.parametrize("scale", ["raw", "none", "8.0"])
def test_scales_written_as_words_are_read(scale: str, base: Path, tmp_path: Path) -> None:
    raw = released_by_kitft(base, "ar")
    raw["extraction"]["mse_scale"] = scale
    found = read_model_sidecar(put(tmp_path, raw)).extraction.mse_scale
    assert found == (8.0 if scale == "8.0" else None)


def test_a_template_that_is_null_under_one_name_is_read_under_the_other(base: Path, tmp_path: Path) -> None:
    raw = released_by_kitft(base, "av")
    templates = raw["prompt_templates"]
    raw["prompt_templates"] = {"av": None, "actor": templates["av"], "ar": None, "critic": templates["ar"]}
    found = read_model_sidecar(put(tmp_path, raw)).prompt_templates
    assert found.ar == tiny_contract(base).templates_ar and found.av == tiny_contract(base).templates_av
