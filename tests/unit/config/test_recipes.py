"""Recipes set what they say on their own command, and the command line goes before them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import yaml

from nla_megatron.algorithms import check_algorithm
from nla_megatron.config.compose import compose, conf_dir
from nla_megatron.config.recipes import command_of, recipes_of
from nla_megatron.config.schema import SCHEMAS
from nla_megatron.errors import ConfigError
from tests.support.recipes import FREE, composed_recipe, required

RECIPES = sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml"))


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything a recipe sets."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_what_its_file_says(recipe: str) -> None:
    values = yaml.safe_load((conf_dir() / "recipe" / f"{recipe}.yaml").read_text())
    values.pop("defaults", None)
    config = composed_recipe(command_of(recipe), recipe)
    assert leaves(values), "a recipe that sets nothing"
    for key, value in leaves(values).items():
        assert at(config, key) == value, key


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_chooses_the_groups_that_it_names(recipe: str) -> None:
    defaults = yaml.safe_load((conf_dir() / "recipe" / f"{recipe}.yaml").read_text()).get("defaults", [])
    for entry in defaults:
        ((group, option),) = ((key.removeprefix("override /"), value) for key, value in entry.items())
        config, text = composed_recipe(command_of(recipe), recipe), (conf_dir() / group / f"{option}.yaml").read_text()
        name = yaml.safe_load(text).get("name")
        assert name is None or getattr(config, group).name == name


def test_every_command_with_recipes_has_some_and_the_six_systems_are_there() -> None:
    assert {command_of(recipe) for recipe in RECIPES} == {"rl", "sft", "build", "extract"}
    systems = {"paper", "easynla", "verl_nla", "verl_sae", "hackable_grpo", "nano_rl"}
    assert systems <= set(recipes_of("rl", conf_dir()))


def test_the_command_line_wins_over_a_recipe() -> None:
    config = compose("rl", ["out=x", "recipe=paper", "optim.lr=0.5", "rollout.max_new_tokens=7"])
    assert (config.optim.lr, config.rollout.max_new_tokens) == (0.5, 7)
    before = compose("rl", ["out=x", "optim.lr=0.5", "recipe=paper"])
    assert before.optim.lr == 0.5, "the order of the two does not matter"


def test_a_group_of_the_command_line_wins_over_a_recipe_in_what_its_file_sets() -> None:
    config = compose("rl", ["out=x", "recipe=paper", "algorithm=dapo", "rollout=tp2", "algorithm.clip_low=0.1"])
    assert (config.algorithm.kl_coef, config.algorithm.loss_mean) == (0.0, "token"), "dapo.yaml sets them"
    assert config.algorithm.clip_low == 0.1 and config.rollout.tp == 2
    assert config.rollout.max_new_tokens == 150, "tp2.yaml says nothing of it"


def test_a_reward_of_the_command_line_has_its_own_terms_alone() -> None:
    assert set(compose("rl", ["out=x", "recipe=nano_rl", "reward=reconstruction"]).reward.terms) == {"reconstruction"}


def test_without_a_recipe_nothing_changes() -> None:
    assert compose("rl", ["out=x", "recipe=null"]) == compose("rl", ["out=x"])
    assert compose("eval", [*required("eval"), "recipe=null"]) == compose("eval", required("eval"))


@pytest.mark.parametrize(
    ("command", "recipe", "found", "expected", "remedy"),
    [
        ("rl", "paper_build", "a recipe of `build`, with `rl`", "easynla, hackable_grpo", "nla-megatron build recipe="),
        ("sft", "paper", "a recipe of `rl`, with `sft`", "paper_sft_ar, paper_sft_av", "nla-megatron rl recipe=paper"),
        ("eval", "paper", "a recipe of `rl`, with `eval`", "`eval` has none", "nla-megatron rl recipe=paper"),
        ("rl", "papre", "recipe=papre", "paper", "did you mean paper?"),
        ("rl", "zzz", "recipe=zzz", "paper", "drop it"),
    ],
)
def test_a_recipe_that_does_not_fit_is_named_with_those_that_do(
    command: str, recipe: str, found: str, expected: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(command, [*required(command), f"recipe={recipe}"])
    assert found in caught.value.found and expected in caught.value.expected and remedy in caught.value.remedy


@pytest.mark.parametrize("recipe", RECIPES)
def test_options_that_the_schema_leaves_free_are_known_to_who_reads_them(recipe: str) -> None:
    """Reward terms and tasks check theirs when a run starts; a recipe's must not fail there."""
    config = composed_recipe(command_of(recipe), recipe)
    if command_of(recipe) != "rl":
        return
    for label, part in config.reward.parts.items():
        FREE.term(label, part.term or label, part.options)
    FREE.task(config.task.name, config.task.options)


@pytest.mark.parametrize("recipe", recipes_of("rl", conf_dir()))
def test_the_algorithm_of_a_recipe_takes_its_groups(recipe: str) -> None:
    config = composed_recipe("rl", recipe)
    check_algorithm(config.algorithm, config.samples_per_prompt)


def test_no_recipe_names_a_file_or_directory() -> None:
    """What must be given stays for the user to give, but for the role of `sft`."""
    for recipe in RECIPES:
        command = command_of(recipe)
        for item in fields(SCHEMAS[command]):
            if item.default == "???" and item.name != "role":
                assert getattr(composed_recipe(command, recipe), item.name) == "somewhere"
