"""How long the demo is said to take: the operations of its stages, counted by hand and by torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nla_megatron.config.compose import compose
from nla_megatron.conversion.hf import read_shape
from nla_megatron.errors import ConfigError, MissingFile
from nla_megatron.launch import demo, forecast
from nla_megatron.launch.forecast import Sizes
from tests.support.tiny import SHAPE, tiny_model


def test_a_token_costs_what_torch_counts(tmp_path: Path) -> None:
    """Forward and backward of a whole model; attention over a few tokens is left out of the forecast."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, 16, dtype=torch.long)).logits.sum().backward()
    expected = 6.0 * forecast.weights(read_shape(tmp_path)) * 4 * 16
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_stages_cost_what_their_settings_say() -> None:
    sizes = Sizes.of(SHAPE, 1, None)
    assert sizes.blocks == 2 and Sizes.of(SHAPE, None, None).blocks == 3
    assert Sizes.of(SHAPE, None, 65).corpus == sizes.corpus / 10
    few, many = (compose("sft", ["out=a", "role=av", "model=m", "data=d", f"steps={n}"]) for n in (10, 30))
    assert forecast.flops("sft", many, sizes) == 3 * forecast.flops("sft", few, sizes) > 0
    assert forecast.flops("build", None, sizes) == 0


@pytest.mark.parametrize("scale", ["toy", "full", "real"])
def test_what_is_told_is_the_sum_of_its_stages(scale: str) -> None:
    config = compose("demo", [f"scale={scale}", "out=somewhere"])
    stages = [(stage.name, stage.command, demo._overrides(config, stage)) for stage in demo.stages(config)]
    assert ("pretrain" in {name for name, _, _ in stages}) == (scale != "real")
    told = forecast.told(stages, Sizes.of(SHAPE, None, None), lambda: 1e9)
    slower = forecast.told(stages, Sizes.of(SHAPE, None, None), lambda: 1e7)
    assert told.startswith("This is going to take about ") and told != slower
    assert "same command goes on" in told and "rl" not in told.split("(")[0] and "rl " in slower


def test_a_model_that_is_not_there_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="model=nowhere") as raised:
        demo.check(compose("demo", [f"out={tmp_path / 'a'}", "scale=toy", "model=nowhere"]), 1)
    assert "smollm2" in raised.value.expected
    with pytest.raises(ConfigError, match="stages.pretrian"):
        demo.check(compose("demo", [f"out={tmp_path / 'a'}", "+stages.pretrian=[]"]), 1)
