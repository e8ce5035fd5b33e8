"""A run in which nothing is learned fails; one that skips a step now and then does not, resumed or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla_megatron.config.compose import compose
from nla_megatron.errors import NotFinite
from nla_megatron.parallel.world import World
from nla_megatron.training.tally import PATIENCE, Tally, check_learns, recorded, restore


class Module:
    def __init__(self) -> None:
        self.tally = Tally()


def ends_after(skipped: list[bool], steps: int, modules: dict[str, Module]) -> int | None:
    """The step at which a run of so many fails, None where it does not."""
    for number, skips in enumerate(skipped):
        modules["av"].tally.count(skips)
        try:
            check_learns({**modules, "average": object()}, last=number + 1 == steps)
        except NotFinite as error:
            assert "gradients of av" in error.found
            return number
    return None


@pytest.mark.parametrize(
    ("skipped", "steps", "fails_at"),
    [
        ([True] * 3, 3, 2),
        ([True], 1, 0),
        ([True] * 100, 100, PATIENCE - 1),
        ([False] + [True] * 99, 100, None),
        ([True] * (PATIENCE - 1) + [False] + [True] * 50, 100, None),
        ([True, True, False], 3, None),
        ([], 3, None),
    ],
)
def test_only_a_run_whose_every_update_is_skipped_fails(skipped: list[bool], steps: int, fails_at: int | None) -> None:
    assert ends_after(skipped, steps, {"av": Module(), "ar": Module()}) == fails_at


@pytest.mark.parametrize(("before", "fails"), [([False, True], False), ([True, True], True)])
def test_a_resumed_run_knows_what_it_skipped_before(before: list[bool], fails: bool) -> None:
    first, again = {"av": Module()}, {"av": Module()}
    assert ends_after(before, 3, first) is None
    restore(again, json.loads(json.dumps(recorded(first))), 2)
    assert (ends_after([True], 1, again) is not None) == fails


def test_a_checkpoint_without_tallies_counts_as_having_learned() -> None:
    modules = {"av": Module()}
    restore(modules, {}, 5)
    assert ends_after([True], 1, modules) is None


def test_sft_on_gradients_that_overflow_neither_exports_nor_ends_well(tmp_path: Path, world: World) -> None:
    from safetensors.torch import load_file, save_file

    from nla_megatron.training import sft
    from tests.support.tiny import tiny_model, tiny_table

    model = tiny_model(tmp_path / "model")
    table = tiny_table(tmp_path / "av_sft.parquet", model, "av_sft")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 3e38
    save_file(weights, model / "model.safetensors")
    words = ["role=av", f"model={model}", f"data={table}", f"out={tmp_path / 'out'}", "steps=2", "batch_size=4"]
    config = compose("sft", [*words, "micro_batch_size=4"])
    sft.check(config, 1)
    with pytest.raises(NotFinite, match="each of its 2 updates"):
        sft.run(config, world)
    assert not (tmp_path / "out" / "hf").exists() and not (tmp_path / "out" / "done").exists()
