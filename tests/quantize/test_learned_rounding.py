from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from slimkit.quantize.quantizers.learned_scales import (
    gradient_scale,
    round_channels,
    round_clipped,
    round_tensor,
)

ZERO = torch.tensor(0, dtype=torch.int32)


def composed(x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """LSQ+ as a dozen operators: equations 1 and 2 with rounding passed straight through."""
    beta = torch.zeros(()) if offset is None else offset
    clipped = ((x - beta) / step).clamp(qmin, qmax)
    rounded = clipped + (clipped.round() - clipped).detach()
    return rounded * step + beta


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def test_the_gradients_of_lsq_by_hand() -> None:
    """Equations 3 and 5 for the integers −2 … 2 and s = 0.5."""
    x = torch.tensor([-1.6, -1.0, -0.3, 0.1, 0.7, 1.2], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    y = round_tensor(
        x, step, None, scale=step, zero_point=ZERO, qmin=-2, qmax=2, factor=gradient_scale(6, 2)
    )
    assert y.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 1.0]
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4, 1e5])
    for_x, for_step = gradients((y * weights).sum(), x, step)
    assert for_x.tolist() == [0.0, 0.0, 100.0, 1000.0, 1e4, 0.0]
    by_hand = [-2, -2, 0.6 - 1, -0.2, 1 - 1.4, 2]
    expected = float(np.dot(by_hand, weights.numpy())) / np.sqrt(6 * 2)
    assert float(for_step) == pytest.approx(expected, rel=1e-5)


@given(
    seed=st.integers(0, 10_000),
    zero_point=st.integers(0, 15),
    step=st.floats(0.05, 0.5),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_the_fused_function_equals_its_composition(
    seed: int, zero_point: int, step: float, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, 4, generator=generator).to(memory_format=layout).requires_grad_()
    s = torch.tensor(step, requires_grad=True)
    beta = torch.tensor(-zero_point * step, requires_grad=True)
    between = (x.detach() / step).frac().abs() - 0.5
    assume(between.abs().min() > 1e-4)  # at a tie, the last bit decides where each of them rounds
    upstream = torch.randn(2, 3, 5, 4, generator=generator).to(memory_format=layout)
    point = torch.tensor(zero_point, dtype=torch.int32)
    ours = round_tensor(x, s, beta, scale=s, zero_point=point, qmin=0, qmax=15, factor=1.0)
    theirs = composed(x, s, beta, 0, 15)
    torch.testing.assert_close(ours, theirs)
    mine = gradients((ours * upstream).sum(), x, s, beta)
    autograd = gradients((theirs * upstream).sum(), x, s, beta)
    for a, b in zip(mine, autograd, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert mine[0].stride() == x.stride()


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_have_gradients_of_their_own(
    axis: int, layout: torch.memory_format, zero_points: bool
) -> None:
    weight = torch.randn(4, 6, 3, 3).to(memory_format=layout).requires_grad_()
    step = (torch.rand(weight.shape[axis]) * 0.3 + 0.1).requires_grad_()
    upstream = torch.randn(4, 6, 3, 3)
    shape = [-1 if d == axis else 1 for d in range(4)]
    low: Tensor | int = -3
    if zero_points:
        low = torch.arange(weight.shape[axis], dtype=torch.int32).clamp(max=4) - 4
    high = low + 6
    ours = round_channels(weight, step, scale=step, axis=axis, low=low, high=high, factor=0.5)
    per_channel = step.reshape(shape)
    low, high = (end.reshape(shape) if isinstance(end, Tensor) else end for end in (low, high))
    theirs = composed(weight, per_channel, None, low, high)
    torch.testing.assert_close(ours, theirs)
    mine = gradients((ours * upstream).sum(), weight, step)
    autograd = gradients((theirs * upstream).sum(), weight, step)
    torch.testing.assert_close(mine[0], autograd[0])
    torch.testing.assert_close(mine[1], 0.5 * autograd[1], rtol=1e-4, atol=1e-5)


def test_the_gradient_of_pact_is_one_at_the_clip_and_zero_below() -> None:
    x = torch.tensor([0.0, 0.4, 1.4, 1.5, 7.0], requires_grad=True)
    clip = torch.tensor(1.5, requires_grad=True)
    y = round_clipped(x, clip, scale=clip / 3, qmax=3)
    assert y.tolist() == [0.0, 0.5, 1.5, 1.5, 1.5]
    for_x, for_clip = gradients((y * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])).sum(), x, clip)
    assert for_x.tolist() == [0.0, 2.0, 4.0, 0.0, 0.0]
    assert float(for_clip) == pytest.approx(24.0)


Rounding = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize(
    "rounding",
    [
        lambda x, s: round_tensor(x, s, None, scale=s, zero_point=ZERO, qmin=0, qmax=7, factor=1.0),
        lambda x, s: round_clipped(x, s, scale=s / 7, qmax=7),
    ],
    ids=["lsq", "pact"],
)
def test_a_result_may_be_changed_in_place_behind(rounding: Rounding) -> None:
    """``y += x`` follows many convolutions."""
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    s = torch.tensor(0.1, requires_grad=True)
    kept, changed = rounding(x, s), rounding(x, s)
    once = gradients((kept + 1.0).square().sum(), x, s)
    changed += 1.0
    again = gradients(changed.square().sum(), x, s)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b)


def test_scales_may_change_between_forward_and_backward() -> None:
    x = torch.randn(50, requires_grad=True)
    step, scale = torch.tensor(0.1, requires_grad=True), torch.tensor(0.1)

    def run(*, disturb: bool) -> list[Tensor]:
        held = scale.clone()
        y = round_tensor(x, step, None, scale=held, zero_point=ZERO, qmin=-7, qmax=7, factor=1.0)
        if disturb:
            held.fill_(9.0)
        return gradients(y.square().sum(), x, step)

    for a, b in zip(run(disturb=False), run(disturb=True), strict=True):
        assert torch.equal(a, b)


def test_half_precision_keeps_its_type(device: torch.device) -> None:
    x = torch.randn(4, 8, device=device).bfloat16().requires_grad_()
    step = torch.tensor(0.1, device=device, requires_grad=True)
    zero = ZERO.to(device)
    y = round_tensor(x, step, None, scale=step, zero_point=zero, qmin=-7, qmax=7, factor=1.0)
    for_x, for_step = gradients(y.float().sum(), x, step)
    assert (y.dtype, for_x.dtype, for_step.dtype) == (x.dtype, x.dtype, torch.float32)
