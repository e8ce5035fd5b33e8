"""Names that are taken once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nla_megatron.config.registry import Registry
from nla_megatron.errors import ConfigError


def test_what_registers_is_found_by_its_name_and_told_it_where_asked() -> None:
    rulers: Registry[type] = Registry("ruler", named=True)

    @rulers.register("metric")
    class Metric:
        name = ""

    assert rulers["metric"] is Metric and Metric.name == "metric" and dict(rulers) == {"metric": Metric}
    plain: Registry[Callable[[], int]] = Registry("number")
    plain.register("one")(lambda: 1)
    assert plain["one"]() == 1 and "two" not in plain


def test_a_second_of_a_name_is_refused_and_the_first_stays() -> None:
    rulers: Registry[type] = Registry("ruler")
    rulers.register("metric")(int)
    with pytest.raises(ConfigError) as caught:
        rulers.register("metric")(float)
    assert caught.value.found == "a second ruler 'metric' (float)" and "int has it" in caught.value.expected
    assert rulers["metric"] is int
