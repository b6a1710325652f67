from __future__ import annotations

import pytest
import torch
from torch import nn

from slimkit.quantize.methods.sampled_layers import (
    LayerSamples,
    answers,
    centre,
    compensation,
    importance,
    keep_mean,
    passed_on,
    reliable_mean,
)


def test_compensation_undoes_a_distortion_of_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2000, 6, generator=generator)
    distortion = torch.eye(6) + 0.15 * torch.randn(6, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    samples = LayerSamples(x @ distortion.T, (x @ weight.T).squeeze(0) + 5.0, None)
    exact = weight @ torch.linalg.inv(distortion)
    found = weight + compensation(samples, weight)
    before, after = (float((w - exact).norm()) for w in (weight, found))
    assert after < 0.1 * before  # what is left is the ridge


def test_compensation_does_not_learn_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 30, generator=generator)
    weight = torch.randn(4, 30, generator=generator)
    noise = torch.randn(40, 4, generator=generator)
    change = compensation(LayerSamples(x, (x @ weight.T).squeeze(0) + noise, None), weight)
    assert float(change.norm()) < 0.1 * float(weight.norm())


def test_compensation_does_not_learn_what_one_image_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2000, 6, generator=generator)
    examples = torch.arange(2000) // 200  # ten images
    weight = torch.randn(4, 6, generator=generator)
    distortion = torch.zeros(2000, 6)
    distortion[(examples == 1) | (examples == 7)] = 0.5  # in one image of each half
    targets = ((x + distortion * x) @ weight.T).squeeze(0)
    alike = compensation(LayerSamples(x, targets, None), weight)
    apart = compensation(LayerSamples(x, targets, None, examples), weight)
    assert float(alike.norm()) > 0.05 * float(weight.norm())
    assert not apart.any()


def test_compensation_leaves_zeros_and_treats_groups_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 500, 4, generator=generator)  # three groups of two outputs
    weight = torch.randn(6, 4, generator=generator)
    weight[1, 2] = 0.0
    targets = answers(LayerSamples(x, torch.empty(0), None), weight, slice(None))
    factors = torch.tensor([2.0, 1.0, 0.5]).reshape(3, 1, 1)
    found = weight + compensation(LayerSamples(x * factors, targets, None), weight)
    expected = weight / factors.repeat_interleave(2, 1).reshape(6, 1)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)
    assert found[1, 2] == 0.0


def test_centre_moves_the_bias_to_the_right_mean() -> None:
    bias = nn.Parameter(torch.tensor([1.0, -1.0]))
    inputs = torch.tensor([[[1.0], [3.0]]])
    samples = LayerSamples(inputs, torch.tensor([[4.0, 0.0], [6.0, 1.0]]), bias)
    weight = torch.tensor([[1.0], [0.5]])
    centre(samples, weight)  # W x is 2 and −0.5, then 4 and 0.5: both images agree
    torch.testing.assert_close(bias.detach(), torch.tensor([3.0, -0.5]))


def test_a_changed_weight_keeps_the_mean() -> None:
    bias = nn.Parameter(torch.zeros(2))
    inputs = torch.tensor([[[2.0], [2.0]]])
    samples = LayerSamples(inputs, torch.zeros(2, 2), bias)
    keep_mean(samples, torch.tensor([[1.0], [0.5]]), torch.tensor([[0.5], [1.0]]))
    assert bias.tolist() == [1.0, -1.0]


def test_centre_counts_images_not_positions() -> None:
    bias = nn.Parameter(torch.zeros(1))
    inputs = torch.zeros(1, 6, 1)
    targets = torch.tensor([[1.0], [1.0], [1.0], [1.0], [3.0], [2.0]])
    examples = torch.tensor([0, 0, 0, 0, 1, 1])
    centre(LayerSamples(inputs, targets, bias, examples), torch.ones(1, 1))
    means = torch.tensor([1.0, 2.5])
    expected = means.mean() - means.var() / 2 / means.mean()
    torch.testing.assert_close(bias.detach(), expected.reshape(1))


def test_a_mean_that_images_agree_about_is_kept_and_one_of_chance_is_not() -> None:
    draw = torch.Generator().manual_seed(0)
    chance = torch.randn(16, 1000, generator=draw)
    assert reliable_mean(chance).square().mean() < 0.5 * chance.mean(0).square().mean()
    sure = 3.0 + chance
    torch.testing.assert_close(reliable_mean(sure), sure.mean(0), rtol=0.05, atol=0.0)
    assert reliable_mean(torch.zeros(4, 2)).tolist() == [0.0, 0.0]
    assert reliable_mean(torch.tensor([[2.0, -1.0]])).tolist() == [2.0, -1.0]


def test_importance_is_the_mean_square_of_the_input() -> None:
    inputs = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    samples = LayerSamples(inputs, torch.empty(0), None)
    found = importance(samples, torch.zeros(3, 1, 2, 1))
    assert found.shape == (3, 1, 2, 1)
    assert found[2].flatten().tolist() == pytest.approx([5.0, 2.0])


def test_a_relu_passes_on_errors_where_it_is_open() -> None:
    targets = torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.5, 0.0]])
    inputs = torch.eye(3).unsqueeze(0)
    rounded = torch.tensor([[-4.0, 6.0, -0.5], [1.0, 1.0, 1.0]])  # off by 1 everywhere
    found = passed_on(LayerSamples(inputs, targets, None), torch.relu, rounded)
    assert found is not None
    # slopes over ±1: of −5 and 5 that of the branch, of 0.5 1.5 / 2, of 0 1 / 2
    expected = torch.tensor([[0.1, 0.25], [1.0, 0.25], [0.75**2, 0.25]])
    torch.testing.assert_close(found, expected)


def test_without_an_activation_function_everything_is_passed_on() -> None:
    x = torch.randn(1, 20, 3)
    weight = torch.randn(2, 3)
    samples = LayerSamples(x, (x @ weight.T).squeeze(0), None)
    assert passed_on(samples, lambda y: y, weight.round()) is None


def test_importance_counts_what_is_passed_on() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[1.0, 1.0], [2.0, 2.0]]])  # two groups
    passed = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    samples = LayerSamples(x, torch.zeros(2, 2), None, None, passed)
    expected = torch.tensor([[0.5, 2.0], [2.25, 2.25]])  # (1·1, 1·4) / 2, (0.5·1 + 1·4) / 2
    torch.testing.assert_close(importance(samples, torch.ones(2, 2)), expected)
    first, _ = samples.divided(0.5)
    torch.testing.assert_close(importance(first, torch.ones(2, 2))[1], torch.tensor([0.5, 0.5]))
