"""What is refused before a run: unknown and doubled names, groups too small, options that contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nla_megatron.algorithms import check_algorithm, make_algorithm, register
from nla_megatron.config.compose import compose, conf_dir
from nla_megatron.config.schema import AlgorithmConfig
from nla_megatron.errors import ConfigError
from tests.support.sampled import per_rollout, sampled

PRESETS = sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml"))
SINGLE = {"actor_critic", "reinforce", "reinforce_mean", "reinforce_ema", "scst", "reinforce_pp", "ppo"}


def preset(name: str) -> AlgorithmConfig:
    needed = ["out=o", "av=a", "ar=b", "data=d"]
    return compose("rl", [*needed, f"algorithm={name}", "rollout.max_new_tokens=37"]).algorithm


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_an_algorithm_and_says_what_it_is(name: str) -> None:
    config = preset(name)
    check_algorithm(config, 4)
    first = (conf_dir() / "algorithm" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith(".")
    if config.loss_mean == "constant":
        assert config.loss_length == 37, "the longest response of this run"


def test_the_presets_are_those_of_the_systems_we_carry() -> None:
    expected = "grpo dr_grpo loo rloo reinforce reinforce_mean reinforce_ema scst reinforce_pp ppo dapo gspo cispo"
    assert set(expected.split()) <= set(PRESETS)
    files = {name: yaml.safe_load((conf_dir() / "algorithm" / f"{name}.yaml").read_text()) for name in PRESETS}
    assert len({str(sorted(values.items())) for values in files.values()}) == len(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_group_of_one_is_refused_by_what_compares_within_groups(name: str) -> None:
    if name in SINGLE:
        check_algorithm(preset(name), 1)
        return
    with pytest.raises(ConfigError, match=r"samples_per_prompt=1[\s\S]*at least 2"):
        check_algorithm(preset(name), 1)


def test_a_group_of_one_is_refused_with_a_groups_baseline_or_dynamic_sampling() -> None:
    with pytest.raises(ConfigError, match="samples_per_prompt=1 with algorithm.name=reinforce_pp"):
        check_algorithm(AlgorithmConfig(name="reinforce_pp", baseline="group"), 1)
    with pytest.raises(ConfigError, match="dynamic_sampling=2 with samples_per_prompt=1"):
        check_algorithm(AlgorithmConfig(name="reinforce", dynamic_sampling=2), 1)


def test_more_minibatches_than_prompts_are_refused() -> None:
    known = ["out=o", "av=a", "ar=b", "data=d", "batch_size=3"]
    assert compose("rl", [*known, "algorithm.minibatches=3"]).algorithm.minibatches == 3
    with pytest.raises(ConfigError, match="algorithm.minibatches=4 with batch_size=3"):
        compose("rl", [*known, "algorithm.minibatches=4"])


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.name='sarsa'[\s\S]*cispo, grpo, gspo, [\s\S]*reinforce"):
        make_algorithm(AlgorithmConfig(name="sarsa"))


USERS = """
from nla_megatron.algorithms.advantages import to_tokens
from nla_megatron.algorithms.policy_gradient import PolicyGradient
from nla_megatron.types import Credit


class Scaled(PolicyGradient):
    options = ("factor",)

    def credit(self, sampled):
        return Credit(to_tokens(sampled.rewards * self.config.options["factor"], sampled.mask))
"""


def test_a_users_class_is_found_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_algorithm.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = ["algorithm.name=users_algorithm:Scaled", "algorithm.options={factor: 3.0}"]
    config = compose("rl", ["out=o", "av=a", "ar=b", "data=d", *map(quoted, chosen)]).algorithm
    check_algorithm(config, 1)
    batch = sampled([1.0, -2.0], [0, 1])
    assert per_rollout(make_algorithm(config).credit(batch).advantages, batch.mask) == [3.0, -6.0]
    with pytest.raises(ConfigError, match="algorithm.options.fact0r[\\s\\S]*one of factor"):
        make_algorithm(AlgorithmConfig(name="users_algorithm:Scaled", options={"fact0r": 1}))


def quoted(override: str) -> str:
    key, _, value = override.partition("=")
    return override if value.startswith("{") else f"{key}='{value}'"


@pytest.mark.parametrize(
    "path",
    [
        "no.such.module:Thing", "nla_megatron.algorithms.grpo:Nothing", ":Grpo", "nla_megatron.algorithms.grpo:",
        "nla_megatron.algorithms.kl:kl", "nla_megatron.algorithms:register",
    ],
)  # fmt: skip
def test_an_import_path_that_does_not_resolve_to_an_algorithm_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        check_algorithm(AlgorithmConfig(name=path), 4)


def test_an_option_that_an_algorithm_does_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.options.depth with algorithm.name=grpo[\s\S]*no options"):
        make_algorithm(AlgorithmConfig(options={"depth": 2}))


def test_a_name_is_taken_once() -> None:
    make_algorithm(AlgorithmConfig())
    with pytest.raises(ConfigError, match="a second algorithm 'grpo'[\\s\\S]*Grpo"):
        register("grpo")(lambda config: make_algorithm(config))
    assert type(make_algorithm(AlgorithmConfig())).__name__ == "Grpo"


@pytest.mark.parametrize(
    ("name", "baseline", "known"),
    [
        ("grpo", "ema", "group, leave_one_out"),
        ("rloo", "mean", "leave_one_out"),
        ("reinforce", "group", "mean, none, ema, scst"),
        ("reinforce_pp", "scst", "none, group"),
        ("ppo", "mean", "none"),
    ],
)
def test_a_baseline_of_another_algorithm_is_refused(name: str, baseline: str, known: str) -> None:
    with pytest.raises(ConfigError, match=rf"baseline='{baseline}' with algorithm.name={name}[\s\S]*{known}"):
        make_algorithm(AlgorithmConfig(name=name, baseline=baseline))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"kl": "k4"}, "algorithm.kl='k4'"),
        ({"kl_in": "both"}, "algorithm.kl_in='both'"),
        ({"kl": "k1"}, "algorithm.kl=k1 in the loss"),
        ({"kl_weighted": True, "kl_in": "reward"}, "algorithm.kl_weighted=true with algorithm.kl_in=reward"),
        ({"loss_mean": "batch"}, "algorithm.loss_mean='batch'"),
        ({"loss_mean": "constant"}, "algorithm.loss_mean=constant without algorithm.loss_length"),
        ({"loss_length": 0}, "algorithm.loss_length=0"),
        ({"correction": "ris"}, "algorithm.correction='ris'"),
        ({"correction_low": 3.0}, "algorithm.correction_low=3.0 above correction_high=2.0"),
        ({"reference": "old"}, "algorithm.reference='old'"),
        ({"reference": "ema", "kl_coef": 0.0}, "algorithm.reference=ema with algorithm.kl_coef=0"),
        ({"reference_decay": 1.5}, "algorithm.reference_decay=1.5"),
        ({"ema_decay": -0.1}, "algorithm.ema_decay=-0.1"),
        ({"gamma": float("nan")}, "algorithm.gamma=nan"),
        ({"gae_lambda": 2.0}, "algorithm.gae_lambda=2.0"),
        ({"kl_coef": float("nan")}, "algorithm.kl_coef=nan"),
        ({"clip_low": -0.2}, "algorithm.clip_low=-0.2"),
        ({"entropy_coef": -1.0}, "algorithm.entropy_coef=-1.0"),
        ({"epochs": 0}, "algorithm.epochs=0"),
        ({"minibatches": 0}, "algorithm.minibatches=0"),
        ({"dynamic_sampling": -1}, "algorithm.dynamic_sampling=-1"),
        ({"value_clip": -1.0}, "algorithm.value_clip=-1.0"),
    ],
)
def test_options_out_of_range_or_against_each_other_are_named(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AlgorithmConfig(**options)
    assert caught.value.found == found


def test_k1_in_the_loss_is_accepted_where_it_has_a_gradient_or_no_weight() -> None:
    AlgorithmConfig(kl="k1", kl_weighted=True)
    AlgorithmConfig(kl="k1", kl_in="reward")
    AlgorithmConfig(kl="k1", kl_coef=0.0)
