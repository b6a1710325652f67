from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slimkit.quantize import TARGETS, ptq
from slimkit.quantize.quantizers.fixed import WeightQuantizer
from slimkit.quantize.scales import (
    affine_parameters,
    along,
    mse_weight_grid,
    pair_sums,
    weight_grid,
)
from slimkit.quantize.targets import NumberFormat, resolve_target
from slimkit.runtime.fake_quantize import quantized_integers

UINT8 = NumberFormat(8)
INT8 = NumberFormat(8, signed=True, symmetric=True)


def test_scale_and_zero_point_by_hand() -> None:
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(4.1), UINT8)
    assert float(scale) == pytest.approx(0.02)
    assert int(zero_point) == 50
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(2.54), INT8)
    assert float(scale) == pytest.approx(0.02)
    assert int(zero_point) == 0


@given(
    low=st.floats(-1e6, 1e6, width=32),
    high=st.floats(-1e6, 1e6, width=32),
    form=st.sampled_from([UINT8, INT8, NumberFormat(4), NumberFormat(4, True, True)]),
)
def test_zero_is_exact_and_the_range_is_covered(
    low: float, high: float, form: NumberFormat
) -> None:
    low, high = min(low, high), max(low, high)
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high), form)
    assert torch.isfinite(scale)
    assert scale > 0
    assert form.qmin <= int(zero_point) <= form.qmax
    reach = 0.51 * float(scale)  # rounding the zero point shifts the range by half a step
    assert (form.qmin - int(zero_point)) * float(scale) <= min(low, 0.0) + reach
    assert (form.qmax - int(zero_point)) * float(scale) >= max(high, 0.0) - reach


def test_a_range_after_relu_has_zero_point_zero() -> None:
    scale, zero_point = affine_parameters(torch.tensor(0.0), torch.tensor(5.1), UINT8)
    assert int(zero_point) == 0
    assert float(scale) == pytest.approx(0.02)


def test_weight_scales_per_channel_and_per_tensor() -> None:
    weight = torch.tensor([[1.27, -0.5], [0.1, -2.54]])
    assert torch.allclose(weight_grid(weight, INT8, 0)[0], torch.tensor([0.01, 0.02]))
    assert weight_grid(weight, INT8, None)[0] == pytest.approx(0.02)
    assert torch.allclose(weight_grid(weight, INT8, 1)[0], torch.tensor([0.01, 0.02]))


def test_grids_with_zero_points_by_hand() -> None:
    form = NumberFormat(4, signed=True)  # −8 … 7
    weight = torch.tensor([[0.0, 3.0], [-1.0, 2.0], [0.5, 1.5], [-3.0, -1.5]])
    scale, zero_point = weight_grid(weight, form, 0)
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.2, 0.1, 0.2]))
    assert zero_point.tolist() == [-8, -3, -8, 7]  # 0 is a level, at the end where it can be
    scale, zero_point = weight_grid(weight, form, None)
    assert (float(scale), int(zero_point)) == (pytest.approx(0.4), 0)  # −8 + 3 / 0.4 = −0.5
    scale, zero_point = weight_grid(weight[:2], form, 0, blocks=2)
    assert scale.shape == zero_point.shape == (2, 2)
    assert zero_point.tolist()[1] == [7, -8]


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mse_grid_with_a_zero_point_is_about_the_best_of_all(
    axis: int | None, weighted: bool
) -> None:
    form = NumberFormat(4, signed=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 100, generator=generator) + torch.linspace(-2, 2, 6)[:, None]
    importance = torch.rand(6, 100, generator=generator) if weighted else torch.ones(6, 100)
    scale, zero_point = mse_weight_grid(
        weight, form, axis, importance=importance if weighted else None
    )
    rows = list(zip(weight, importance, strict=True)) if axis == 0 else [(weight, importance)]

    def error(row: int, step: Tensor, zero: Tensor) -> float:
        values, counts = rows[row]
        rounded = ((values / step).round() + zero).clamp(-8, 7) - zero
        return float(((rounded * step - values).square() * counts).sum())

    for row, (step, zero) in enumerate(zip(scale.reshape(-1), zero_point.reshape(-1), strict=True)):
        steps = torch.linspace(0.2, 1.2, 150) * float(weight_grid(weight, form, axis)[0].max())
        best = min(error(row, s, torch.tensor(z)) for s in steps for z in range(-8, 8))
        assert error(row, step, zero) <= 1.03 * best


def test_dead_channels_have_finite_scales() -> None:
    weight = torch.zeros(3, 4)
    assert torch.equal(weight_grid(weight, INT8, 0)[0], torch.ones(3))
    for grid in (weight_grid, mse_weight_grid):
        scale, zero_point = grid(weight, NumberFormat(4, signed=True), 0)
        assert torch.equal(scale, torch.ones(3))
        assert torch.equal(zero_point, torch.full((3,), -8, dtype=torch.int32))
    weight[1] = 1.27
    weight[2] = 1e-30
    scale = weight_grid(weight, INT8, 0)[0]
    assert scale[0] == scale[1]
    assert scale[2] == pytest.approx(float(scale[1]) * 2.0**-20)


# --- processors that sum two products in 16 bits ------------------------------------------------


def test_pairs_are_neighbours_among_the_input_channels_of_one_kernel_position() -> None:
    weight = torch.arange(8.0).reshape(1, 4, 1, 2)  # channel c, column k holds 2c + k
    assert pair_sums(weight).tolist() == [[2.0, 10.0, 4.0, 12.0]]  # 0+2, 4+6, 1+3, 5+7
    odd = torch.tensor([[1.0, 2.0, 4.0]])
    assert pair_sums(odd).tolist() == [[3.0, 6.0]]
    assert pair_sums(torch.tensor([[5.0]])).tolist() == [[5.0]]


@given(
    shape=st.sampled_from([(3, 8), (2, 5), (4, 3, 3, 3), (2, 6, 2, 1), (1, 1), (3, 4, 5)]),
    seed=st.integers(0, 10_000),
    spread=st.floats(0.0, 4.0),
    per_channel=st.booleans(),
)
def test_no_pair_of_products_exceeds_sixteen_bits(
    shape: tuple[int, ...], seed: int, spread: float, per_channel: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).exp().pow(spread)
    axis = 0 if per_channel else None
    scale = weight_grid(weight, INT8, axis, pairs=True)[0]
    zero = torch.zeros_like(scale, dtype=torch.int32)
    levels = quantized_integers(weight, scale, zero, qmin=-127, qmax=127, axis=axis)
    if weight[0].numel() > 1:
        assert 255 * int(pair_sums(levels).abs().max()) < 2**15
    assert bool((scale >= weight_grid(weight, INT8, axis)[0] * 0.9999).all())
    assert bool((scale <= weight_grid(weight, INT8, axis)[0] * 2.02).all())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(self.conv(x))


def test_depthwise_filters_keep_their_range(images: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 4, 8, 8)
    q = ptq(Two(), x, calibration=[x], target="onnxruntime-avx2")
    pairs = {spec.parameter: spec.pairs for spec in q.plan.quantizers if spec.parameter}
    assert pairs == {"conv.weight": True, "depthwise.weight": False}
    assert "16 bits" in q.plan.explain()
    assert "16 bits" not in ptq(Two(), x, calibration=[x], target="onnxruntime-vnni").plan.explain()


def test_the_default_target_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for saturates, sums in ((True, "int16_pairs"), (False, "int32")):
        monkeypatch.setattr("slimkit.quantize.targets.saturates_int8_pairs", lambda s=saturates: s)
        assert resolve_target("onnxruntime").sums == sums
        assert resolve_target("onnxruntime-avx2").sums == "int16_pairs"
    assert TARGETS.get("onnxruntime").sums == "host"


def test_a_fixed_scale_stays() -> None:
    from slimkit.quantize.specs import QuantizerSpec

    quantizer = WeightQuantizer(QuantizerSpec("w", INT8, "w", channels=2, scale="fixed"))
    quantizer.scale.copy_(torch.tensor([0.5, 0.25]))
    rounded = quantizer(torch.tensor([[0.6, 1.3], [0.3, -0.1]]))
    assert rounded.tolist() == [[0.5, 1.5], [0.25, 0.0]]
    assert quantizer.scale.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("axis", [0, None])
def test_the_mse_scale_is_the_best_of_a_fine_grid(axis: int | None) -> None:
    form = NumberFormat(4, signed=True, symmetric=True)
    weight = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    scale = mse_weight_grid(weight, form, axis)[0]
    largest = weight_grid(weight, form, axis)[0]
    rows = zip(weight, scale, largest, strict=True) if axis == 0 else [(weight, scale, largest)]

    def error(values: Tensor, step: Tensor) -> float:
        return float(((values / step).round().clamp(-7, 7) * step - values).square().sum())

    for values, found, most in rows:
        grid = [error(values, most * share) for share in torch.linspace(0.2, 1.0, 400)]
        assert error(values, found) <= 1.02 * min(grid)
        assert error(values, found) < 0.8 * error(values, most)


def test_important_weights_are_not_clipped() -> None:
    form = NumberFormat(4, signed=True, symmetric=True)
    weight = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    largest = weight.abs().amax()
    importance = torch.where(weight.abs() == largest, 1e6, 1.0)
    steps = mse_weight_grid(weight, form, 0, importance=importance)[0]
    clipped = mse_weight_grid(weight, form, 0)[0]
    assert float(largest / clipped) > 7.7
    assert float(largest / steps) < 7.5


@pytest.mark.parametrize("axis", [0, None])
def test_a_clipping_scale_keeps_pairs_within_16_bits(axis: int | None) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).abs() * 0.2
    weight[:, 0] = 30.0  # alone so far out that clipping it would be best
    weight[:, 1] = -14.0
    importance = torch.ones_like(weight)
    importance[:, :2] = 0.0
    scale = mse_weight_grid(weight, INT8, axis, pairs=True, importance=importance)[0]
    assert bool((scale < 0.6 * weight_grid(weight, INT8, axis, pairs=True)[0]).all())
    steps = along(scale, weight, axis)
    for rounded in (torch.floor, torch.ceil):
        levels = rounded(weight / steps).clamp(-127, 127)
        assert int(pair_sums(levels).abs().max()) <= 128
    assert int(pair_sums((weight / steps).round()).abs().max()) >= 125  # no larger than it must be
