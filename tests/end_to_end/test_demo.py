"""`nla-megatron demo` runs every stage and leaves what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from nla_megatron.contract.sidecar import read_model_sidecar
from nla_megatron.contract.splits import held_out
from nla_megatron.contract.tables import Table
from tests.support.ranks import command

SUMMARY = {
    "fve_sft",
    "fve_rl",
    "fve_rl_ci95",
    "fve_gold_text",
    "fve_shuffled",
    "steps",
    "world",
    "seconds",
    "logprob_gap_max",
    "injected",
    "expected_injections",
}


def test_summary_holds_the_measured_figures(toy: Path) -> None:
    summary = json.loads((toy / "summary.json").read_text())
    assert SUMMARY <= set(summary)
    assert summary["world"] == {"tp": 2, "pp": 1, "dp": 1, "rollout_tp": 2}
    assert set(summary["seconds"]) == {
        "corpus",
        "pretrain",
        "extract",
        "explain",
        "build",
        "sft_av",
        "sft_ar",
        "eval_sft",
        "rl",
        "eval",
        "total",
    }
    evaluated = json.loads((toy / "eval" / "eval.json").read_text())
    assert (summary["fve_rl"], summary["fve_shuffled"]) == (evaluated["fve_av"], evaluated["fve_shuffled"])
    assert evaluated["fve_mean_predictor"] == 0.0
    assert (
        summary["fve_frozen_ar"] == evaluated["fve_frozen_ar"] and summary["fve_text_only"] == evaluated["fve_quoted"]
    )


def test_the_ar_also_reads_the_last_words_of_the_context(toy: Path) -> None:
    found = json.loads((toy / "eval" / "eval.json").read_text())
    assert found["fve_quoted"] != found["fve_gold"] and found["extraction_failed_quoted"] == 0


def test_a_demo_of_a_model_that_is_there_trains_none(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "a b=c,ü"
    done = command("demo", f"out={out}", "scale=toy", f"model={toy / 'pretrain' / 'hf'}", "seed=1", timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This is going to take about" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert "pretrain" not in summary["seconds"] and not (out / "pretrain").exists() and not (out / "tokenizer").exists()
    assert summary["model"] == str(toy / "pretrain" / "hf") and (out / "report.html").is_file()
    assert read_model_sidecar(out / "rl" / "av").base_checkpoint.startswith(str(toy / "pretrain" / "hf"))


def test_every_step_injected_what_it_should_and_sampler_and_trainer_agree(toy: Path) -> None:
    steps = [json.loads(line) for line in (toy / "rl" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((toy / "summary.json").read_text())
    assert [step["step"] for step in steps] == list(range(summary["steps"]))
    for step in steps:
        assert step["injected"] == step["expected_injections"] == 4
        assert step["logprob_gap_max"] <= 1e-3
        assert {f"seconds_{phase}" for phase in ("generate", "score", "look", "policy", "learn", "reload")} <= set(step)
    # 2 steps of 4 samples, and two evaluations of 16 texts with their own and with shuffled vectors.
    assert summary["injected"] == summary["expected_injections"] == len(steps) * 4 + 2 * 2 * 16


def test_report_is_one_file_with_the_figures_in_it(toy: Path) -> None:
    page = (toy / "report.html").read_text()
    assert "<script src" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "FVE" in page and "<svg" in page


def test_transformers_loads_the_base_model_and_the_trained_av(toy: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for directory in (toy / "pretrain" / "hf", toy / "rl" / "av"):
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ids = AutoTokenizer.from_pretrained(directory)("The with statement", return_tensors="pt").input_ids
        assert torch.isfinite(model(ids).logits).all()


def test_transformers_loads_the_trained_ar_as_a_truncated_backbone(toy: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModel

    directory = toy / "rl" / "ar"
    model, info = AutoModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert set(info["missing_keys"]) == {"norm.weight"}
    layer = read_model_sidecar(directory).extraction.layer_index
    assert layer is not None and model.config.num_hidden_layers == layer + 1
    assert load_file(directory / "value_head.safetensors")["weight"].shape == (64, 64)


def test_exports_carry_sidecars_of_their_role(toy: Path) -> None:
    for role in ("av", "ar"):
        sidecar = read_model_sidecar(toy / "rl" / role)
        assert (sidecar.role, sidecar.stage, sidecar.d_model) == (role, "rl", 64)


def test_the_base_model_has_not_read_the_held_out_documents(toy: Path) -> None:
    records = {name: yaml.safe_load((toy / name / "run.yaml").read_text()) for name in ("pretrain", "build")}
    assert records["pretrain"]["held_out"] == records["build"]["held_out"] == 0.2


def test_held_out_documents_are_in_no_training_table(toy: Path) -> None:
    documents = {
        name: set(Table.open(toy / "build" / f"{name}.parquet", "rl" if name == "held_out" else name).column("doc_id"))
        for name in ("av_sft", "ar_sft", "rl", "held_out")
    }
    assert all(held_out(doc_id, 0.2) for doc_id in documents["held_out"])
    names = list(documents)
    assert all(not documents[a] & documents[b] for i, a in enumerate(names) for b in names[i + 1 :])


def test_activations_are_the_hidden_states_of_transformers(toy: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = toy / "pretrain" / "hf"
    table = Table.open(toy / "extract" / "base.parquet", "base")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        AutoTokenizer.from_pretrained(base),
    )
    texts, counts, layers = (
        table.column(name) for name in ("detokenized_text_truncated", "n_raw_tokens", "activation_layer")
    )
    checked = 0
    for row in range(0, table.n_rows, table.n_rows // 12):
        ids = tokenizer(texts[row], return_tensors="pt").input_ids
        # A text cut inside a word may be tokenised otherwise; those rows cannot be looked up this way.
        if ids.shape[1] == counts[row]:
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states[layers[row] + 1]
            assert torch.allclose(states[0, -1], torch.from_numpy(table.vectors([row])[0]), atol=2e-4)
            checked += 1
    assert checked >= 6


def test_a_finished_demo_does_nothing_again(toy: Path) -> None:
    before = (toy / "summary.json").stat().st_mtime_ns
    done = command("demo", f"out={toy}", "scale=toy")
    assert done.returncode == 0 and "finished already" in done.stderr
    assert done.stdout.strip().endswith(str(toy / "report.html"))
    assert (toy / "summary.json").stat().st_mtime_ns == before
