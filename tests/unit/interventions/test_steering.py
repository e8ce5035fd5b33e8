"""SAEs and the three ways to steer with them, against loops over numbers. Legend: T tokens, D hidden, M features."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nla_megatron.errors import ConfigError, WidthError
from nla_megatron.interventions.maths import Slots, apply, apply_indexed, apply_whole
from nla_megatron.interventions.sae import ARCHITECTURES, NORMALISATIONS, Sae
from nla_megatron.interventions.sae_files import SaeFormat, _build
from nla_megatron.interventions.spec import Intervention
from nla_megatron.interventions.steering import formula_of
from tests.unit.interventions.slow import SlowSae, each, make_tensors

D, M, K = 5, 9, 3
kinds = pytest.mark.parametrize(
    ("architecture", "normalisation"), list(itertools.product(ARCHITECTURES, NORMALISATIONS))
)
# The same examples every time: a feature on the very edge of its threshold falls on either side in fp32 and fp64.
exact = settings(max_examples=15, derandomize=True)
cases = given(seed=st.integers(0, 10**6), centred=st.booleans())


def make(architecture: str, normalisation: str, centred: bool, seed: int) -> tuple[Sae, SlowSae]:
    tensors = make_tensors(architecture, D, M, seed)
    fast = _build(SaeFormat(architecture, centred, normalisation, k=K), tensors, (D, M), None, "memory")
    slow = SlowSae(
        tensors, architecture=architecture, normalize_activations=normalisation, apply_b_dec_to_input=centred, k=K
    )
    return fast, slow


def draw(seed: int, t: int = 4) -> Tensor:
    return torch.randn(t, D, generator=torch.Generator().manual_seed(seed + 1)) * 2 + 0.3


def everywhere(strengths_TF: list[list[float]]) -> Slots:
    """Token t takes slot t."""
    count = len(strengths_TF)
    return Slots(torch.arange(count), torch.zeros(count, 0), torch.tensor(strengths_TF))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=2e-4, atol=2e-4)


@exact
@cases
@kinds
def test_encoding_and_decoding_are_the_slow_loop(
    architecture: str, normalisation: str, seed: int, centred: bool
) -> None:
    (sae, slow), stream_TD = make(architecture, normalisation, centred, seed), draw(seed)
    features_TM = sae.encode(stream_TD)
    close(features_TM, each(slow.encode, stream_TD))
    close(sae.decode(features_TM, stream_TD), each(lambda x: slow.decode(slow.encode(x), x), stream_TD))
    assert (sae.width, sae.num_features) == (D, M)


@exact
@cases
@kinds
def test_setting_features_keeps_the_error_and_every_other_feature(
    architecture: str, normalisation: str, seed: int, centred: bool
) -> None:
    (sae, slow), stream_TD = make(architecture, normalisation, centred, seed), draw(seed)
    chosen, max_acts, strengths = (6, 2), (1.5, 3.0), [[1.0, -0.5], [0.0, 2.0], [0.25, 0.0], [4.0, 1.0]]
    formula = formula_of(Intervention(3, "features", "all", sae="x", features=chosen, max_acts=max_acts), D, sae)
    got = apply_whole(formula, stream_TD, everywhere(strengths))
    rows = iter(strengths)

    def change(f: list[float]) -> list[float]:
        f = list(f)
        for feature, max_act, strength in zip(chosen, max_acts, next(rows), strict=True):
            f[feature] = max_act * strength
        return f

    close(got, each(lambda x: slow.steered(x, change), stream_TD))


@exact
@cases
@kinds
def test_global_steering_scales_all_features_and_keeps_the_error(
    architecture: str, normalisation: str, seed: int, centred: bool
) -> None:
    (sae, slow), stream_TD = make(architecture, normalisation, centred, seed), draw(seed)
    strengths = [[0.0], [1.0], [2.5], [-1.0]]
    got = apply_whole(formula_of(Intervention(3, "global", "all", sae="x"), D, sae), stream_TD, everywhere(strengths))
    rows = iter(strengths)

    def change(f: list[float]) -> list[float]:
        [strength] = next(rows)
        return [strength * value for value in f]

    close(got, each(lambda x: slow.steered(x, change), stream_TD))
    assert torch.equal(got[1], stream_TD[1])


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), strength=st.floats(-5, 5))
def test_clamping_one_feature_sets_the_stream_s_component_along_it(seed: int, strength: float) -> None:
    (sae, slow), stream_TD = make("standard", "none", True, seed), draw(seed)
    clamp = Intervention(3, "clamp", "all", sae="x", features=(4,), max_acts=(2.0,))
    got = apply_whole(formula_of(clamp, D, sae), stream_TD, everywhere([[strength]] * 4))
    direction = slow.direction(4)

    def by_formula(h: list[float]) -> list[float]:
        along = sum(a * b for a, b in zip(h, direction, strict=True))
        return [a - along * b + 2.0 * strength * b for a, b in zip(h, direction, strict=True)]

    close(got, each(by_formula, stream_TD))


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), order=st.permutations([1, 4, 8]))
def test_clamping_several_features_sets_all_components_in_any_order_and_nothing_else(
    seed: int, order: list[int]
) -> None:
    (sae, _), stream_TD = make("standard", "none", True, seed), draw(seed)
    targets = {1: 0.5, 4: -1.0, 8: 2.0}
    clamp = Intervention(3, "clamp", "all", sae="x", features=tuple(order))
    unit_FD = sae.decoder_MD[order].double() / sae.decoder_MD[order].double().norm(dim=-1, keepdim=True)
    assume(float(torch.linalg.svdvals(unit_FD)[-1]) > 0.2)
    formula = formula_of(clamp, D, sae)
    got = apply_whole(formula, stream_TD, everywhere([[targets[feature] for feature in order]] * 4))
    wanted_F = torch.tensor([targets[feature] for feature in order]).double()
    torch.testing.assert_close(got.double() @ unit_FD.T, wanted_F.expand(4, 3), rtol=1e-4, atol=1e-4)
    beside = torch.eye(D).double() - torch.linalg.pinv(unit_FD) @ unit_FD
    torch.testing.assert_close((got - stream_TD).double() @ beside, torch.zeros(4, D).double(), rtol=0, atol=1e-4)


def test_each_form_by_hand() -> None:
    """Two features along the axes, the second decoded twice as long; x = (3, 4, 5), of which 5 is the error."""
    form = SaeFormat("standard", False)
    tensors = {
        "W_enc": torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]]),
        "W_dec": torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]),
        "b_enc": torch.tensor([0.0, -1.0]),
        "b_dec": torch.tensor([0.0, 0.0, 0.5]),
    }
    sae, x = _build(form, tensors, (3, 2), None, "memory"), torch.tensor([[3.0, 4.0, 5.0]])
    assert sae.encode(x).tolist() == [[3.0, 1.0]]
    assert sae.decode(sae.encode(x), x).tolist() == [[3.0, 2.0, 0.5]]
    two = {"sae": "x", "features": (1,), "max_acts": (10.0,)}
    for intervention, by_hand in (
        (Intervention(0, "features", "all", **two), [3.0, 4.0 - 2.0 + 10.0, 5.0]),  # f = 5 in the place of 1
        (Intervention(0, "clamp", "all", **two), [3.0, 5.0, 5.0]),  # the component itself is 10 * 0.5
        (Intervention(0, "global", "all", sae="x"), [1.5, 3.0, 5.0]),  # half of (3, 2) is left
    ):
        got = apply_whole(formula_of(intervention, 3, sae), x, everywhere([[0.5]]))
        assert got.tolist() == [by_hand], intervention.mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["features", "clamp", "global"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steering_leaves_other_tokens_bit_for_bit_and_their_nan_alone(
    architecture: str, mode: str, dtype: torch.dtype
) -> None:
    sae, _ = make(architecture, "layer_norm", True, 3)
    features = () if mode == "global" else (1, 5)
    formula = formula_of(Intervention(3, mode, "all", sae="x", features=features), D, sae)
    stream_TD = draw(3, 6).to(dtype)
    stream_TD[1], stream_TD[3, 0] = float("nan"), -0.0
    slots = Slots(
        torch.tensor([0, -1, 1, -1, 0, -1]), torch.zeros(2, 0), torch.tensor([[0.7] * max(1, len(features))] * 2),
        torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0]),
    )  # fmt: skip
    change = apply(formula, stream_TD, slots)
    whole = apply_whole(formula, stream_TD, slots)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(whole.view(bits)[1::2], stream_TD.view(bits)[1::2])
    assert torch.equal((stream_TD + change).view(bits)[3::2], stream_TD.view(bits)[3::2])
    torch.testing.assert_close(apply_indexed(formula, stream_TD, slots), change)
    assert bool((change[::2] != 0).any(-1).all()) and bool(torch.isfinite(change).all())
    stream_TD.requires_grad_()
    apply(formula, stream_TD, slots).float().sum().backward()
    assert stream_TD.grad is not None and bool(torch.isfinite(stream_TD.grad).all())


@pytest.mark.parametrize("mode", ["features", "clamp", "global"])
@kinds
def test_steering_can_be_captured(architecture: str, normalisation: str, mode: str) -> None:
    """Fake tensors have no values: whatever asks for one raises."""
    sae, _ = make(architecture, normalisation, True, 3)
    features = () if mode == "global" else (1, 5)
    formula = formula_of(Intervention(3, mode, "all", sae="x", features=features), D, sae)
    with FakeTensorMode(allow_non_fake_inputs=True):
        slots = Slots(
            torch.zeros(4, dtype=torch.int32), torch.zeros(2, 0), torch.zeros(2, max(1, len(features))), torch.zeros(4)
        )
        assert apply(formula, torch.zeros(4, D), slots).shape == (4, D)


def test_an_sae_that_does_not_fit_is_named() -> None:
    sae = _build(SaeFormat("standard", True, layer=12), make_tensors("standard", D, M, 0), (D, M), None, "memory")
    features = Intervention(12, "features", sae="my/sae", features=(M - 1,))
    formula_of(features, D, sae)
    with pytest.raises(WidthError, match="'my/sae' is 5 wide"):
        formula_of(features, 8, sae)
    with pytest.raises(ConfigError, match=r"features \[9\] of the SAE 'my/sae'"):
        formula_of(Intervention(12, "clamp", sae="my/sae", features=(M,)), D, sae)
    with pytest.raises(ConfigError, match="at layer 11"):
        formula_of(Intervention(11, "global", sae="my/sae"), D, sae)
    sae.decoder_MD[2] = -3 * sae.decoder_MD[1]
    with pytest.raises(ConfigError, match="depend on each other"):
        formula_of(Intervention(12, "clamp", sae="my/sae", features=(1, 2)), D, sae)
    sae.decoder_MD[3] = 0
    with pytest.raises(ConfigError, match="depend on each other"):
        formula_of(Intervention(12, "clamp", sae="my/sae", features=(3,)), D, sae)


def test_an_sae_moves_to_another_device_whole() -> None:
    sae, _ = make("gated", "none", True, 0)
    moved = sae.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    assert len(tensors) == 7 and all(value.device.type == "meta" for value in tensors)
    assert moved.architecture == "gated"
