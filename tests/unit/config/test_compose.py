"""Every file of `conf/` composes, every mistake is one message that names key, found and expected."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from nla_megatron.config.compose import as_yaml, compose, conf_dir, describe
from nla_megatron.config.recipes import GROUP
from nla_megatron.config.schema import SCHEMAS
from nla_megatron.errors import ConfigError
from nla_megatron.launch.commands import COMMANDS

ROOTS = sorted(path.stem for path in conf_dir().glob("*.yaml"))
OPTIONS = sorted((path.parent.name, path.stem) for path in conf_dir().glob("*/*.yaml"))
VALUES = [(group, option) for group, option in OPTIONS if group != GROUP]
"""Without recipes, which set keys of several groups."""


def required(root: str) -> list[str]:
    """Overrides that fill what a command asks for."""
    names = [item.name for item in fields(SCHEMAS[root]) if item.default == "???"]
    return [f"{name}={'av' if name == 'role' else 'somewhere'}" for name in names]


def groups(root: str) -> set[str]:
    """The groups that a root's defaults name."""
    entries = yaml.safe_load((conf_dir() / f"{root}.yaml").read_text())["defaults"]
    return {group for entry in entries if isinstance(entry, dict) for group in entry}


def refusal(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        compose("rl", [*required("rl"), *overrides])
    return caught.value


def test_every_command_has_a_root_and_a_schema() -> None:
    assert ROOTS == sorted(SCHEMAS) == sorted(COMMANDS)


def test_conf_holds_only_roots_and_options() -> None:
    found = {path.relative_to(conf_dir()) for path in conf_dir().rglob("*") if path.is_file()}
    assert found == {Path(f"{root}.yaml") for root in ROOTS} | {Path(group, f"{name}.yaml") for group, name in OPTIONS}


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes_to_its_schema(root: str) -> None:
    config = compose(root, required(root))
    assert type(config) is SCHEMAS[root]
    assert "???" not in as_yaml(config)


@pytest.mark.parametrize(("group", "option"), VALUES, ids=lambda part: part)
def test_every_option_composes_where_its_group_is_used(group: str, option: str) -> None:
    users = [root for root in ROOTS if group in groups(root)]
    assert users, f"no root uses the group {group}"
    text = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text())
    # A group has the same schema in every root, so one of them tells.
    config = compose(users[0], [*required(users[0]), f"{group}={option}"])
    block = config if hasattr(config, next(iter(text))) else getattr(config, group)
    for key, value in text.items():
        # `${key}` stands for another key of the configuration.
        resolved = OmegaConf.create({**yaml.safe_load(as_yaml(config)), "expected": value})
        value = OmegaConf.to_container(resolved, resolve=True)["expected"]
        assert getattr(block, key) == value, f"{group}={option} loses {key} in {users[0]}"


@pytest.mark.parametrize("root", ROOTS)
def test_describe_lists_every_key_and_marks_what_must_be_given(root: str) -> None:
    shown = yaml.safe_load(describe(root))
    assert set(shown) == {item.name for item in fields(SCHEMAS[root])}
    assert {key for key, value in shown.items() if value == "???"} == {one.split("=")[0] for one in required(root)}


def test_overrides_reach_nested_keys_and_are_converted() -> None:
    config = compose("rl", [*required("rl"), "optim.lr=3e-4", "parallel=tp2pp2", "steps=7", "held_out=there"])
    assert (config.optim.lr, config.ar_optim.lr, config.steps, config.held_out) == (3e-4, 2e-5, 7, "there")
    assert (config.parallel.tp, config.parallel.pp, config.parallel.dp) == (2, 2, None)


def frozen_parts(config: Any) -> list[Any]:
    parts = [getattr(config, item.name) for item in fields(config)]
    return [config, *(one for part in parts if is_dataclass(part) for one in frozen_parts(part))]


@pytest.mark.parametrize("root", ROOTS)
def test_configurations_are_frozen_at_every_level(root: str) -> None:
    for part in frozen_parts(compose(root, required(root))):
        with pytest.raises(FrozenInstanceError):
            setattr(part, fields(part)[0].name, 1)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stepz=3", ["stepz"]),
        ("optim.lrr=1", ["optim.lrr"]),
        ("+extra=1", ["extra"]),
        ("++extra=1", ["extra"]),
        ("+optim.foo=3", ["optim.foo"]),
        ("steps=abc", ["steps", "'abc'", "Integer"]),
        ("steps=1.5", ["steps", "'1.5'", "Integer"]),
        ("steps=null", ["steps", "not Optional"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "Float"]),
        ("optim=3", ["optim", "3", "OptimConfig"]),
        ("export=perhaps", ["export", "'perhaps'", "bool"]),
        ("parallel=nowhere", ["parallel/nowhere", "tp2pp2"]),
        ("nogroup=x", ["nogroup"]),
        ("steps", ["steps"]),
    ],
)
def test_what_the_schema_does_not_know_is_refused_by_name(override: str, named: list[str]) -> None:
    error = refusal(override)
    assert [word for word in named if word not in error.found] == []
    assert "`nla-megatron rl`" in error.expected and "`nla-megatron rl --help`" in error.remedy
    assert "use +" not in str(error), "advice that would be refused in turn"


@pytest.mark.parametrize(
    ("override", "found", "expected"),
    [
        ("steps=0", "steps=0", "at least 1"),
        ("batch_size=0", "batch_size=0", "at least 1"),
        ("micro_batch_size=-1", "micro_batch_size=-1", "at least 1"),
        ("save_every=0", "save_every=0", "at least 1"),
        ("ar_updates=0", "ar_updates=0", "at least 1"),
        ("samples_per_prompt=0", "samples_per_prompt=0", "at least 1"),
        (
            "rollout.lora=adapter",
            "rollout.lora=adapter with lora.rank=0",
            "an adapter, of a rank of at most 512",
        ),
        ("dtype=fp8", "dtype='fp8'", "one of float32, bfloat16"),
        ("optim.lr=-1", "lr=-1.0", "at least 0"),
        ("optim.lr=nan", "lr=nan", "at least 0"),
        ("ar_optim.schedule=linear", "schedule='linear'", "one of cosine, constant"),
        ("parallel.tp=0", "parallel.tp=0", "at least 1"),
        ("parallel.dp=0", "parallel.dp=0", "at least 1"),
        ("algorithm.minibatches=0", "algorithm.minibatches=0", "at least 1"),
        ("reward.product=length", "reward.product='length'", "one of correctness_length, correctness_length_format"),
        ("rollout.lora_rank=600", "rollout.lora_rank=600", "at most 512, vLLM's largest"),
        ("rollout.temperature=0", "rollout.temperature=0", "a temperature above 0"),
        ("rollout.temperature=-1", "rollout.temperature=-1.0", "0 (greedy) or above"),
        ("logger.wandb_mode=on", "logger.wandb_mode='on'", "one of offline, online, disabled"),
    ],
)
def test_a_value_out_of_range_names_key_found_and_expected(override: str, found: str, expected: str) -> None:
    error = refusal(override)
    assert (error.found, error.expected) == (found, expected)


def test_an_adapter_beside_weights_that_the_trainer_does_not_have_is_refused() -> None:
    error = refusal("rollout.lora=adapter", "lora.rank=2", "lora.quantize=nf4")
    assert error.found == "rollout.lora=adapter with lora.quantize=nf4" and error.expected == "rollout.lora=merged"


@pytest.mark.parametrize(
    ("root", "override", "found"),
    [
        ("sft", "role=judge", "role='judge'"),
        ("convert", "direction=sideways", "direction='sideways'"),
        ("convert", "dtype=fp8", "dtype='fp8'"),
        ("eval", "dtype=fp8", "dtype='fp8'"),
        ("eval", "rollout.engine=policy", "rollout.engine=policy in eval"),
        ("eval", "rollout.lora=adapter", "rollout.lora=adapter in eval"),
        ("eval", "rollout.record=true", "rollout.record=True in eval"),
        ("eval", "rollout.replay=run", "rollout.replay=run in eval"),
        ("sft", "ar_lora.rank=2", "role=av with ar_lora.rank=2"),
        ("sft", "lora.rank=-1", "rank=-1"),
        ("sft", "lora.alpha=0", "LoRA with alpha=0.0 and targets=['all-linear']"),
        ("sft", "lora.targets=[q_proj]", "LoRA with targets=['q_proj'], of rank 0"),
        ("sft", "lora.quantize=nf4", "LoRA with quantize=nf4, of rank 0"),
        ("sft", "lora.quantize=int3", "quantize='int3'"),
        ("eval", "bootstrap=0", "bootstrap=0"),
        ("extract", "dtype=fp8", "dtype='fp8'"),
        ("extract", "long_documents=drop", "long_documents='drop'"),
        ("extract", "min_position=-1", "min_position=-1"),
        ("extract", "max_length=50", "max_length=50"),
        ("build", "intervention.method=mul", "intervention.method='mul'"),
        ("build", "intervention.layer=-2", "intervention.layer=-2"),
    ],
)
def test_values_of_other_commands_are_checked_too(root: str, override: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(root, [*required(root), override])
    assert caught.value.found == found


@pytest.mark.parametrize("root", [root for root in ROOTS if required(root)])
def test_all_missing_values_are_named_at_once(root: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(root)
    names = sorted(one.split("=")[0] for one in required(root))
    assert caught.value.found == f"no value for {', '.join(names)}"
    assert all(f"{name}=..." in caught.value.remedy for name in names)


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("stepz=3", "steps"),
        ("micro_batch_sise=2", "micro_batch_size"),
        ("optim.lrr=1", "optim.lr"),
        ("+rollout.temprature=1", "rollout.temperature"),
        ("paralel=tp2", "parallel"),
    ],
)
def test_a_misspelt_key_suggests_the_near_one(override: str, near: str) -> None:
    assert f"did you mean {near}? " in refusal(override).remedy


@pytest.mark.parametrize("override", ["steps=abc", "parallel=nowhere", "zzz=1"])
def test_nothing_is_suggested_where_nothing_is_near(override: str) -> None:
    assert "did you mean" not in refusal(override).remedy


def test_an_unknown_command_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"command 'dance'[\s\S]*pretrain, extract"):
        compose("dance")


@pytest.mark.parametrize("override", ["provider.options={n_keywords:2}", "provider.options.n_keywords=2"])
def test_a_providers_options_are_free_keys(override: str) -> None:
    """The provider itself checks them."""
    assert compose("explain", [*required("explain"), override]).provider.options == {"n_keywords": 2}


def test_a_demos_stages_take_overrides_as_they_would_be_typed() -> None:
    stages = compose("demo", ["stages.rl=['steps=3','optim.lr=1e-3']"]).stages
    assert stages["rl"] == ["steps=3", "optim.lr=1e-3"] and stages["pretrain"]
