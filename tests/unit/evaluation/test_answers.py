"""How sure an evaluation of responses is of its figure."""

from __future__ import annotations

import numpy as np

from nla_megatron.config.schema import EvalConfig
from nla_megatron.evaluation.answers import _interval


def test_the_interval_is_over_prompts_whose_samples_are_alike() -> None:
    """Two prompts, one always right and one never: however many samples, nobody knows more than two answers tell."""
    config = EvalConfig(out="x", bootstrap=200)
    values_N, prompts = np.repeat([0.0, 1.0], 50), np.repeat(["a", "b"], 50).tolist()
    assert _interval(config, values_N, prompts) == [0.0, 1.0]
