"""The losses on features, relations and generated images against their formulas in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimkit import losses

RANDOM = np.random.default_rng(1)
N, C, H, W = 4, 3, 2, 5
STUDENT = RANDOM.normal(size=(N, C, H, W))
TEACHER = RANDOM.normal(size=(N, C, H, W)) * 1.5 + 0.3
LATE_STUDENT = RANDOM.normal(size=(N, 2, H, W))
LATE_TEACHER = RANDOM.normal(size=(N, 2, H, W))
LABELS = np.array([0, 2, 1, 1])
SCORES = RANDOM.normal(size=(N, 5)) * 2
OTHER_SCORES = RANDOM.normal(size=(N, 5)) * 2

Array = np.ndarray


def softmax(x: Array, axis: int = 1) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def huber(x: Array) -> Array:
    return np.where(np.abs(x) <= 1, x**2 / 2, np.abs(x) - 0.5)


def rows(x: Array) -> Array:
    return x.reshape(len(x), -1)


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- each formula, written down a second time ----------------------------------------------


def expected_distances() -> float:
    def distances(x: Array) -> Array:
        pairs = itertools.combinations(rows(x), 2)
        d = np.array([np.sqrt(((a - b) ** 2).sum()) for a, b in pairs])
        return d / d.mean()

    return float(huber(distances(STUDENT) - distances(TEACHER)).mean())


def expected_angles() -> float:
    def angle(x: Array, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    ours, theirs = rows(STUDENT), rows(TEACHER)
    triplets = list(itertools.permutations(range(N), 3))
    return float(np.mean([huber(angle(ours, *t) - angle(theirs, *t)) for t in triplets]))


def expected_attention(power: float) -> float:
    def attention(x: Array) -> Array:
        return unit(rows((np.abs(x) ** power).mean(axis=1)))

    return float(((attention(STUDENT) - attention(TEACHER)) ** 2).mean())


def expected_boundary(margin: float) -> float:
    total = 0.0
    for s, t in zip(STUDENT.ravel(), TEACHER.ravel(), strict=True):
        total += max(0.0, margin - s) ** 2 if t > 0 else max(0.0, margin + s) ** 2
    return total / STUDENT.size


def expected_partial() -> float:
    total = 0.0
    for s, t in zip(STUDENT.ravel(), TEACHER.ravel(), strict=True):
        total += 0.0 if s <= t <= 0 else (s - t) ** 2
    return total / STUDENT.size


def expected_channels(temperature: float) -> float:
    ours = softmax(STUDENT.reshape(N, C, -1) / temperature, axis=2)
    theirs = softmax(TEACHER.reshape(N, C, -1) / temperature, axis=2)
    return float(temperature**2 * (theirs * np.log(theirs / ours)).sum() / (N * C))


def expected_factors() -> float:
    return float(np.abs(unit(rows(STUDENT)) - unit(rows(TEACHER))).sum() / N)


def expected_pearson() -> float:
    pairs = [(STUDENT[:, c].ravel(), TEACHER[:, c].ravel()) for c in range(C)]
    half_square = []
    for a, b in pairs:
        a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()  # noqa: PLW2901
        half_square.append(((a - b) ** 2).mean() / 2)
    return float(np.mean(half_square))


def expected_flow() -> float:
    def flow(early: Array, late: Array) -> Array:
        return np.einsum("nchw,ndhw->ncd", early, late) / (H * W)

    difference = flow(STUDENT, LATE_STUDENT) - flow(TEACHER, LATE_TEACHER)
    return float((difference**2).mean())


def expected_guided(mask: float, attention: float, relation: float, temperature: float) -> float:
    masked, attended, related = [], [], []
    for s, t, r_s, r_t in zip(STUDENT, TEACHER, TEACHER * 2, STUDENT, strict=True):
        a_s, a_t = np.abs(s).mean(axis=0), np.abs(t).mean(axis=0)
        b_s, b_t = np.abs(s).mean(axis=(1, 2)), np.abs(t).mean(axis=(1, 2))
        m_a = H * W * softmax(((a_s + a_t) / temperature).reshape(1, -1)).reshape(H, W)
        m_b = C * softmax(((b_s + b_t) / temperature)[None])[0]
        masked.append(np.sqrt(((s - t) ** 2 * m_a[None] * m_b[:, None, None]).sum()))
        attended.append(np.linalg.norm(a_s - a_t) + np.linalg.norm(b_s - b_t))
        related.append(np.linalg.norm(r_s - r_t))
    return float(
        mask * np.mean(masked) + attention * np.mean(attended) + relation * np.mean(related)
    )


def expected_standardized(temperature: float) -> float:
    z = [(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (SCORES, OTHER_SCORES)]
    q, p = softmax(z[0] / temperature), softmax(z[1] / temperature)
    return float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean())


def expected_soft_entropy(temperature: float, weights: Array | None = None) -> float:
    q, p = softmax(SCORES / temperature), softmax(OTHER_SCORES / temperature)
    each = -(p * np.log(q)).sum(axis=1)
    return float(temperature**2 * (each if weights is None else each * weights).mean())


def expected_decoupled(alpha: float, beta: float, temperature: float) -> float:
    total = 0.0
    for s, t, y in zip(SCORES, OTHER_SCORES, LABELS, strict=True):
        q, p = softmax(s[None] / temperature)[0], softmax(t[None] / temperature)[0]
        target = p[y] * np.log(p[y] / q[y]) + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y]))
        p_others, q_others = np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])
        others = (p_others * np.log(p_others / q_others)).sum()
        total += alpha * target + beta * others
    return temperature**2 * total / N


def expected_weighted_soft(temperature: float) -> float:
    def hard(x: Array) -> Array:
        return -np.log(softmax(x)[np.arange(N), LABELS])

    return expected_soft_entropy(temperature, 1 - np.exp(-hard(SCORES) / hard(OTHER_SCORES)))


def expected_contrast(samples: int) -> float:
    scores, others = np.exp(SCORES), SCORES.shape[1] - 1
    total = 0.0
    for row in scores:
        total -= np.log(row[0] / (row[0] + others / samples))
        total -= sum(np.log(1 - s / (s + others / samples)) for s in row[1:])
    return float(total / N)


def tensor(x: Array, *, grad: bool = False) -> Tensor:
    return torch.tensor(x, dtype=torch.float32, requires_grad=grad)


Case = tuple[Callable[..., Tensor], Array, Array, dict[str, Any], float]
LABELLED = {"labels": torch.tensor(LABELS)}
CASES: dict[str, Case] = {
    "rkd_distance": (losses.rkd_distance, STUDENT, TEACHER, {}, expected_distances()),
    "rkd_angle": (losses.rkd_angle, STUDENT, TEACHER, {}, expected_angles()),
    "attention": (losses.attention_transfer, STUDENT, TEACHER, {}, expected_attention(2)),
    "attention 4": (
        losses.attention_transfer, STUDENT, TEACHER, {"power": 4}, expected_attention(4)
    ),
    "boundary": (losses.activation_boundary, STUDENT, TEACHER, {}, expected_boundary(1)),
    "boundary 2": (
        losses.activation_boundary, STUDENT, TEACHER, {"margin": 2.0}, expected_boundary(2)
    ),
    "ofd": (losses.ofd, STUDENT, TEACHER, {}, expected_partial()),
    "cwd": (losses.cwd, STUDENT, TEACHER, {}, expected_channels(1)),
    "cwd 4": (losses.cwd, STUDENT, TEACHER, {"temperature": 4.0}, expected_channels(4)),
    "factors": (losses.factor_transfer, STUDENT, TEACHER, {}, expected_factors()),
    "l1": (losses.l1, STUDENT, TEACHER, {}, float(np.abs(STUDENT - TEACHER).mean())),
    "pkd": (losses.pkd, STUDENT, TEACHER, {}, expected_pearson()),
    "fsp": (
        losses.fsp, STUDENT, TEACHER,
        {"student_late": tensor(LATE_STUDENT), "teacher_late": tensor(LATE_TEACHER)},
        expected_flow(),
    ),
    "fbkd": (
        losses.fbkd, STUDENT, TEACHER,
        {"student_relation": tensor(TEACHER * 2), "teacher_relation": tensor(STUDENT),
         "mask_weight": 0.3, "attention_weight": 2.0, "relation_weight": 0.5, "temperature": 0.4},
        expected_guided(0.3, 2.0, 0.5, 0.4),
    ),
    "kd standardised": (
        losses.kd, SCORES, OTHER_SCORES, {"temperature": 2.0, "standardize": True},
        expected_standardized(2),
    ),
    "soft cross-entropy": (
        losses.soft_cross_entropy, SCORES, OTHER_SCORES, {"temperature": 3.0},
        expected_soft_entropy(3),
    ),
    "soft cross-entropy weighted": (
        losses.soft_cross_entropy, SCORES, OTHER_SCORES,
        {"temperature": 3.0, "sample_weights": torch.tensor([1.0, 0.5, 0.0, 2.0])},
        expected_soft_entropy(3, np.array([1.0, 0.5, 0.0, 2.0])),
    ),
    "dkd": (
        losses.dkd, SCORES, OTHER_SCORES, {"alpha": 0.7, "beta": 2.0, "temperature": 2, **LABELLED},
        expected_decoupled(0.7, 2.0, 2),
    ),
    "wsld": (
        losses.wsld, SCORES, OTHER_SCORES, {"temperature": 2.0, **LABELLED},
        expected_weighted_soft(2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_formula(name: str) -> None:
    loss, student, teacher, options, expected = CASES[name]
    value = loss(tensor(student), tensor(teacher), **options)
    assert value.shape == ()
    # float32 holds seven digits: 1e-6 of values up to 1, relative above
    assert value.item() == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_only_the_student_learns(name: str) -> None:
    loss, student, teacher, options, _ = CASES[name]
    ours, theirs = tensor(student, grad=True), tensor(teacher, grad=True)
    loss(ours, theirs, **options).backward()
    assert ours.grad is not None
    assert float(ours.grad.abs().sum()) > 0
    assert bool(ours.grad.isfinite().all())
    assert theirs.grad is None


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    loss, student, teacher, options, _ = CASES[name]
    assert loss(tensor(student).bfloat16(), tensor(teacher).bfloat16(), **options).dtype == (
        torch.float32
    )


AGREEMENT = [name for name in CASES if "cross-entropy" not in name and name != "wsld"]


@pytest.mark.parametrize("name", [n for n in AGREEMENT if not n.startswith(("boundary", "fbkd"))])
def test_a_student_that_agrees_pays_nothing(name: str) -> None:
    loss, _, teacher, options, _ = CASES[name]
    if name == "fsp":
        options = {**options, "student_late": options["teacher_late"]}
    same = tensor(teacher, grad=True)
    value = loss(same, tensor(teacher), **options)
    assert value.item() == pytest.approx(0, abs=1e-6)
    value.backward()
    assert same.grad is not None
    assert bool(same.grad.isfinite().all())  # no root of zero on the way


def test_the_contrastive_loss_is_its_formula() -> None:
    scores = tensor(np.exp(SCORES), grad=True)
    value = losses.crd(scores, samples=50)
    assert value.item() == pytest.approx(expected_contrast(50), rel=1e-6)
    value.backward()
    assert scores.grad is not None
    assert bool((scores.grad[:, 0] < 0).all())  # nearer to its partner
    assert bool((scores.grad[:, 1:] > 0).all())  # further from the others


def test_standardised_scores_forget_shift_and_scale() -> None:
    student = tensor(SCORES)
    a = losses.kd(student, tensor(OTHER_SCORES), 2.0, standardize=True)
    b = losses.kd(3 * student - 1, 7 * tensor(OTHER_SCORES) + 2, 2.0, standardize=True)
    assert a.item() == pytest.approx(b.item(), abs=1e-5)


def test_decoupling_with_the_teachers_own_weights_is_plain_distillation() -> None:
    """KD is the target term plus the others' weighted by 1 − p_t."""
    p = softmax(OTHER_SCORES / 2)
    for n in range(N):
        one = [tensor(x[n : n + 1]) for x in (SCORES, OTHER_SCORES)]
        label = torch.tensor(LABELS[n : n + 1])
        beta = 1 - p[n, LABELS[n]]
        value = losses.dkd(*one, label, alpha=1, beta=beta, temperature=2)
        assert value.item() == pytest.approx(losses.kd(*one, 2).item(), abs=1e-5)


def test_sharp_scores_have_finite_gradients() -> None:
    student = tensor(SCORES * 100, grad=True)
    teacher = tensor(OTHER_SCORES * 100)
    total = (
        losses.dkd(student, teacher, torch.tensor(LABELS))
        + losses.wsld(student, teacher, torch.tensor(LABELS))
        + losses.kd(student, teacher, standardize=True)
    )
    total.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
@pytest.mark.parametrize("samples", [1, 2])
def test_relations_of_too_few_samples_are_nothing(loss: Any, samples: int) -> None:
    student = torch.randn(samples, 3, requires_grad=True)
    value = loss(student, torch.randn(samples, 4))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_the_flow_joins_layers_of_different_sizes() -> None:
    early, late = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    pooled = torch.nn.functional.max_pool2d(early, 2)
    zeros = [torch.zeros_like(early), torch.zeros_like(late)]
    big = losses.fsp(early, zeros[0], late, zeros[1])
    small = losses.fsp(pooled, zeros[0][:, :, :2, :2], late, zeros[1])
    assert big.item() == pytest.approx(small.item(), abs=1e-6)


# --- what a generator is told ---------------------------------------------------------------


def test_the_generators_losses_are_their_formulas() -> None:
    p = softmax(OTHER_SCORES)
    one_hot = -np.log(p.max(axis=1)).mean()
    mean = p.mean(axis=0)
    entropy = (mean * np.log10(mean)).sum()
    q = softmax(SCORES)
    gap = -(p * np.log(p / q)).sum(axis=1).mean()
    teacher, student = tensor(OTHER_SCORES), tensor(SCORES)
    assert losses.dafl_one_hot(teacher).item() == pytest.approx(one_hot, abs=1e-6)
    assert losses.dafl_entropy(teacher).item() == pytest.approx(entropy, abs=1e-6)
    features = losses.dafl_activation(tensor(TEACHER)).item()
    assert features == pytest.approx(-np.abs(TEACHER).mean(), abs=1e-6)
    assert losses.zskt_gap(student, teacher).item() == pytest.approx(gap, rel=1e-6)
    distance = losses.dfad_gap(student, teacher).item()
    assert distance == pytest.approx(-np.abs(SCORES - OTHER_SCORES).mean(), rel=1e-6)


@pytest.mark.parametrize("loss", [losses.zskt_gap, losses.dfad_gap])
def test_a_generators_gap_has_gradient_through_both_networks(loss: Any) -> None:
    student, teacher = tensor(SCORES, grad=True), tensor(OTHER_SCORES, grad=True)
    loss(student, teacher).backward()
    for scores in (student, teacher):
        assert scores.grad is not None
        assert float(scores.grad.abs().sum()) > 0
