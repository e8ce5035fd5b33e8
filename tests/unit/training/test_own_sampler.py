"""What a policy that writes its own responses draws from. Legend: V vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from nla_megatron.config.schema import RolloutConfig
from nla_megatron.errors import ConfigError
from nla_megatron.rollout.requests import PromptRequest
from nla_megatron.training.own_sampler import _Response, narrowed

SHARES = [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        # Of what two leave, 4/7 and 3/7, the first alone has half.
        ({"top_k": 2, "top_p": 0.5}, [1]),
    ],
)
def test_what_top_k_and_then_top_p_keep(options: dict[str, float], kept: list[int]) -> None:
    logprobs_V = torch.tensor(SHARES).log()
    found = narrowed(logprobs_V, RolloutConfig(**options))  # type: ignore[arg-type]
    assert torch.isfinite(found).nonzero()[:, 0].tolist() == kept
    assert torch.equal(found[kept], logprobs_V[kept])


def test_noise_draws_tokens_by_their_probability() -> None:
    request = PromptRequest(0, 0, (1,), None, seed=7)
    logprobs_V, count = torch.tensor(SHARES).log(), 4000
    drawn = [int((logprobs_V + _Response(request, sample).noise(4)).argmax()) for sample in range(count)]
    for token, share in enumerate(SHARES):
        # Four standard deviations of a share of so many draws.
        assert drawn.count(token) / count == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))


def test_noise_is_a_function_of_seed_sample_and_token() -> None:
    def noise(seed: int, sample: int, written: int) -> torch.Tensor:
        return _Response(PromptRequest(0, 0, (1,), None, seed=seed), sample, [5] * written).noise(8)

    first = noise(1, 0, 0)
    assert torch.equal(first, noise(1, 0, 0))
    assert not any(torch.equal(first, other) for other in (noise(2, 0, 0), noise(1, 1, 0), noise(1, 0, 1)))


@pytest.mark.parametrize("options", [{"tp": 2}, {"expert_parallel": True}, {"lora": "adapter"}])
def test_keys_of_vllm_are_refused_beside_it(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine=policy") as caught:
        RolloutConfig(engine="policy", **options)  # type: ignore[arg-type]
    assert "rollout.engine=vllm" in caught.value.remedy
