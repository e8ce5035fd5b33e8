"""Composed recipes, and the names of options that the configuration's schema leaves free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from nla_megatron.config.compose import compose
from nla_megatron.config.schema import SCHEMAS


def required(command: str, recipe: str | None = None) -> list[str]:
    """Overrides that fill what a command asks for; a recipe of `sft` says the role itself."""
    names = [item.name for item in fields(SCHEMAS[command]) if item.default == "???"]
    return [f"{name}={'av' if name == 'role' else 'somewhere'}" for name in names if recipe is None or name != "role"]


@cache
def composed_recipe(command: str, recipe: str | None, *overrides: str) -> Any:
    """The configuration of a command with a recipe and everything that must be given."""
    chosen = [f"recipe={recipe}"] if recipe else []
    return compose(command, [*required(command, recipe), *chosen, *overrides])


def _found(place: str) -> type:
    from nla_megatron.config.options import resolve

    found = resolve(f"nla_megatron.{place}", "place")
    assert isinstance(found, type)
    return found


class Free:
    """Who reads the options that are free, by where they stand."""

    def term(self, label: str, name: str, options: Mapping[str, Any]) -> None:
        """Raises ConfigError where a reward term has not these options."""
        from nla_megatron.config.options import bind

        bind(self.term_options(name), self._filled(self.term_options(name), options), f"reward.terms.{label}.options")

    def task(self, name: str, options: Mapping[str, Any]) -> None:
        """Raises ConfigError where a task has not these options."""
        from nla_megatron.config.options import bind

        if (kind := self.task_options(name)) is not None:
            bind(kind, options, "task.options")
        for key, inner in self.inner_options(name).items():
            values = options.get(key, [])
            for one in values if isinstance(values, list) else [values]:
                bind(inner, one, f"task.options.{key}")

    def term_options(self, name: str) -> type:
        from nla_megatron.rewards.terms import options_type, registered

        return options_type(registered()[name])

    def task_options(self, name: str) -> type | None:
        """The dataclass of a task's options; None where it has none."""
        places = {"math": "tasks.math.task:MathOptions", "lexical": "tasks.lexical:LexicalOptions"}
        places |= {"sae": "tasks.sae:SaeOptions"}
        return _found(places[name]) if name != "nla" else None

    def inner_options(self, name: str) -> dict[str, type]:
        """Options that are mappings, or lists of them, with a dataclass of their own."""
        if name != "sae":
            return {}
        return {
            "interventions": _found("tasks.sae:InterventionOptions"),
            "predictor": _found("tasks.sae:PredictorOptions"),
        }

    def provider_options(self) -> type:
        from nla_megatron.datagen.providers.anthropic import AnthropicProvider

        return AnthropicProvider

    @staticmethod
    def _filled(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
        """With something for what only a user can give, such as a file."""
        absent = [item.name for item in fields(kind) if item.default == "???" and item.name not in options]
        return {**{name: 1 if name == "budget" else "given" for name in absent}, **options}


FREE = Free()
