"""The distillation losses against the same formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimkit.losses import dist, kd, mimic

RANDOM = np.random.default_rng(0)
STUDENT = RANDOM.normal(size=(6, 5))
TEACHER = RANDOM.normal(size=(6, 5)) * 2


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    student = torch.tensor(STUDENT, dtype=torch.float32, requires_grad=True)
    return student, torch.tensor(TEACHER, dtype=torch.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def mean_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_tempered_divergence(temperature: float) -> None:
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
    assert kd(*tensors(), temperature).item() == pytest.approx(expected, abs=1e-6)


def test_kd_of_a_hand_computed_pair() -> None:
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[float(np.log(3.0)), 0.0]])  # probabilities 3/4 and 1/4
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kd(student, teacher, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_kd_averages_over_positions() -> None:
    student, teacher = tensors()
    maps = [value.t().reshape(1, 5, 2, 3) for value in (student, teacher)]
    assert kd(*maps, 2.0).item() == pytest.approx(kd(student, teacher, 2.0).item(), abs=1e-6)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1, 1, 1), (2, 0, 1), (0, 1, 3)])
def test_dist_is_one_minus_the_correlations(beta: float, gamma: float, temperature: float) -> None:
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    inter, intra = 1 - mean_correlation(p, q), 1 - mean_correlation(p.T, q.T)
    expected = temperature**2 * (beta * inter + gamma * intra)
    value = dist(*tensors(), beta=beta, gamma=gamma, temperature=temperature)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_dist_of_one_sample_has_finite_gradients() -> None:
    student = torch.zeros(1, 4, requires_grad=True)
    dist(student, torch.randn(1, 4)).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_mimic_is_the_mean_square() -> None:
    expected = ((STUDENT - TEACHER) ** 2).mean()
    assert mimic(*tensors()).item() == pytest.approx(expected, abs=1e-6)


def test_normalised_mimic_is_a_cosine() -> None:
    cosines = (STUDENT * TEACHER).sum(axis=1) / (
        np.linalg.norm(STUDENT, axis=1) * np.linalg.norm(TEACHER, axis=1)
    )
    value = mimic(*tensors(), normalize=True)
    assert value.item() == pytest.approx(2 - 2 * cosines.mean(), abs=1e-6)


@pytest.mark.parametrize("loss", [kd, dist, mimic])
def test_equal_inputs_cost_nothing_and_only_the_student_learns(loss: object) -> None:
    student, teacher = tensors()
    teacher.requires_grad_()
    assert callable(loss)
    loss(student, teacher).backward()
    assert student.grad is not None
    assert float(student.grad.abs().sum()) > 0
    assert teacher.grad is None
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [kd, dist, mimic])
def test_half_precision_is_computed_in_float32(loss: object) -> None:
    assert callable(loss)
    value = loss(*(value.detach().bfloat16() for value in tensors()))
    assert value.dtype == torch.float32
