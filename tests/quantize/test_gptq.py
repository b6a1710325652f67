from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimkit.quantize import ptq
from slimkit.quantize.methods.gptq import GPTQ, _alike, _suits_others, compensated_levels
from slimkit.quantize.methods.sampled_layers import LayerSamples, answers, hessian


def one_by_one(
    weight: np.ndarray, step: np.ndarray, hessian: np.ndarray, limit: int, order: list[int]
) -> np.ndarray:
    """Optimal brain quantization of every row in a given order, with least squares each time.

    After each rounding the weights that are still free get the values that are best given those
    that are not: ``w_F = w⁰_F − H_FF⁻¹ H_FR (q_R − w⁰_R)``.
    """
    levels = np.zeros_like(weight)
    for row, first in enumerate(weight):
        current, fixed = first.copy(), list[int]()
        for column in order:
            level = np.clip(np.round(current[column] / step[row]), -limit, limit)
            levels[row, column], current[column] = level, level * step[row]
            fixed.append(column)
            free = [c for c in order if c not in fixed]
            if free:
                change = hessian[np.ix_(free, fixed)] @ (current[fixed] - first[fixed])
                current[free] = first[free] - np.linalg.solve(hessian[np.ix_(free, free)], change)
    return levels


@pytest.mark.parametrize("act_order", [False, True])
def test_it_is_optimal_brain_quantization_in_a_fixed_order(act_order: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 3, 6, generator=generator)  # two groups of three outputs
    inputs = torch.randn(2, 40, 6, generator=generator) @ torch.randn(2, 6, 6, generator=generator)
    h = hessian(inputs, 0.01)
    step = weight.abs().amax(2, keepdim=True) / 7
    full = torch.full_like(weight, 7.0)
    found = compensated_levels(weight, step.expand_as(weight), -full, full, h, act_order=act_order)
    for group in range(2):
        diagonal = h[group].diagonal()
        order = diagonal.argsort(descending=True).tolist() if act_order else list(range(6))
        expected = one_by_one(
            weight[group].double().numpy(), step[group, :, 0].numpy(), h[group].numpy(), 7, order
        )
        assert found[group].tolist() == expected.tolist()
    assert not torch.equal(found, (weight / step).round())


def test_hessian_by_hand() -> None:
    inputs = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])  # mean of 2 x xᵀ over two positions
    expected = torch.tensor([[[10.0, 2.0], [2.0, 4.0]]], dtype=torch.float64)
    expected += 0.1 * 7.0 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(hessian(inputs, 0.1), expected)


def test_inputs_that_are_never_anything_but_zero_do_no_harm() -> None:
    weight = torch.randn(1, 3, 4)
    step, full = torch.full_like(weight, 0.1), torch.full_like(weight, 127.0)
    h = hessian(torch.zeros(1, 10, 4), 0.01)
    found: Tensor = compensated_levels(weight, step, -full, full, h, act_order=True)
    assert torch.equal(found, (weight / step).round())


def test_columns_in_chunks_give_the_same_as_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 2, 150, generator=generator)
    h = hessian(torch.randn(1, 400, 150, generator=generator), 0.01)
    step, full = torch.full_like(weight, 0.5), torch.full_like(weight, 7.0)
    found = compensated_levels(weight, step, -full, full, h, act_order=False)
    steps = np.full(2, 0.5)
    expected = one_by_one(weight[0].double().numpy(), steps, h[0].numpy(), 7, list(range(150)))
    assert found[0].tolist() == expected.tolist()


@pytest.mark.parametrize("most", [1, 1 << 25], ids=["channel by channel", "at once"])
def test_channels_have_hessians_of_their_own_behind_an_activation(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimkit.quantize.methods.gptq._MOST_ELEMENTS", most)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 30, 5, generator=generator)  # two groups of three outputs
    passed = torch.rand(30, 6, generator=generator)
    samples = LayerSamples(inputs, torch.zeros(30, 6), None, None, passed)
    found = [(rows, hessian(weighted, 0.0)) for rows, weighted in _alike(samples)]
    assert len(found) == (6 if most == 1 else 1)
    matrices = torch.cat([matrix for _, matrix in found])
    for channel in range(6):
        x = inputs[channel // 3].double()
        expected = 2 / 30 * x.T @ torch.diag(passed[:, channel].double()) @ x
        torch.testing.assert_close(matrices[channel], expected, atol=1e-5, rtol=1e-5)


def test_behind_a_relu_what_comes_out_of_it_counts() -> None:
    """Half of the inputs are large and close it: an error there is none."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(24, 32, 1), nn.ReLU()).eval()
    x = torch.randn(2048, 24)
    x[1::2] = torch.randn(1024, 6) @ torch.randn(6, 24)  # what it lets through is simpler
    x[:, 0] = torch.tensor([9.0, 0.0]).repeat(1024)
    x = x.reshape(2048, 24, 1, 1)
    with torch.no_grad():
        layer[0].weight[:, 0] = -0.2  # type: ignore[index, operator]
    errors = []
    for behind in (False, True):
        method = GPTQ(images=1024, behind_activation=behind, compensate=False)
        q = ptq(layer, x[:1], calibration=[x[:1024]], methods=[method], weight_bits=3)
        with torch.no_grad():
            errors.append(float((q(x[1024:]) - layer(x[1024:])).square().mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("positions", "rank", "expected"),
    [(48, 64, False), (48, 6, True), (2048, 6, True)],
    ids=["few of anything", "few of much the same", "many"],
)
def test_what_suits_a_few_images_must_suit_others(
    positions: int, rank: int, expected: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.eye(64) if rank == 64 else torch.randn(rank, 64, generator=generator)
    inputs = torch.randn(1, positions, rank, generator=generator) @ basis
    weight = torch.randn(16, 64, generator=generator)
    samples = LayerSamples(inputs, answers_of(inputs, weight), None)
    nearest = weight.round()

    def rounded(seen: LayerSamples) -> Tensor:
        ends = torch.full((1, 16, 64), -9.0), torch.full((1, 16, 64), 9.0)
        steps = torch.ones(1, 16, 64)
        gram = hessian(seen.inputs, GPTQ.damping)
        return compensated_levels(weight[None], steps, *ends, gram, act_order=False)[0]

    def error(levels: Tensor, seen: LayerSamples) -> float:
        return float(answers(seen, levels - weight, slice(None)).square().mean())

    assert _suits_others(samples, rounded, error, nearest) is expected
    unseen = torch.randn(1, 4096, rank, generator=generator) @ basis
    others = LayerSamples(unseen, answers_of(unseen, weight), None)
    assert (error(rounded(samples), others) < error(nearest, others)) is expected


def answers_of(inputs: Tensor, weight: Tensor) -> Tensor:
    return inputs[0] @ weight.T
