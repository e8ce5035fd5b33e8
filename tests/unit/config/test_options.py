"""Free keys become typed options, and import paths classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from nla_megatron.config.options import bind, is_import_path, resolve
from nla_megatron.errors import ConfigError


@dataclass(frozen=True)
class Options:
    name: str
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    limit: int | None = None
    levels: tuple[int, ...] = ()
    words: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    anything: Any = None
    _own: int = field(init=False, default=0)


def test_values_become_those_of_their_fields() -> None:
    made = bind(
        Options,
        {"name": "a", "rate": 2, "limit": 3, "levels": [1, 2], "words": ["x"], "weights": {"a": 1}, "anything": [{}]},
        "task.options",
    )
    assert made == Options("a", 1, 2.0, False, 3, (1, 2), ["x"], {"a": 1.0}, [{}])
    assert isinstance(made.rate, float) and isinstance(made.levels, tuple) and isinstance(made.weights["a"], float)
    assert bind(Options, {"name": "a", "limit": None}, "x").limit is None


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"name": "a", "cuont": 1}, "task.options.cuont"),
        ({"name": "a", "_own": 1}, "task.options._own"),
        ({}, "task.options.name"),
        ({"name": "a", "count": 1.5}, "task.options.count"),
        ({"name": "a", "count": None}, "task.options.count"),
        ({"name": "a", "rate": "fast"}, "task.options.rate"),
        ({"name": "a", "rate": float("nan")}, "rate=nan"),
        ({"name": "a", "flag": "perhaps"}, "task.options.flag"),
        ({"name": "a", "limit": "x"}, "task.options.limit"),
        ({"name": "a", "levels": 3}, "task.options.levels"),
        ({"name": "a", "levels": [1, "b"]}, "task.options.levels[1]"),
        ({"name": "a", "weights": [1]}, "task.options"),
        ({"name": "a", "weights": {"b": "c"}}, "task.options.weights.b"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(Options, options, "task.options")
    assert found in caught.value.found


def test_a_misspelt_option_suggests_the_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean count?"):
        bind(Options, {"name": "a", "cuont": 1}, "task.options")


def test_import_paths_have_a_colon() -> None:
    assert resolve("collections.abc:Mapping", "key").__name__ == "Mapping"
    assert is_import_path("a.b:c") and not is_import_path("a.b") and not is_import_path("gsm8k")


@pytest.mark.parametrize("path", ["", "plain", "nowhere.module:f", "collections:nothing", ":f", "collections:"])
def test_an_import_path_that_does_not_resolve_is_named_with_its_key(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(path, "reward.function")
    assert caught.value.found.startswith(f"reward.function={path!r}")
