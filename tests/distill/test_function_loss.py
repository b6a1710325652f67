"""A function of somebody else's as a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slimkit.distill import FunctionLoss, parse_losses
from slimkit.errors import InputError, RecipeError


def weighted(ours: Tensor, theirs: Tensor, labels: Tensor, *, power: float = 1.0) -> Tensor:
    """One value for each sample."""
    return (ours - theirs).abs().pow(power).sum(1) * labels


HERE = f"{__name__}:weighted"
ARGUMENTS = {"ours": "student", "theirs": "teacher", "labels": "labels"}


def test_a_function_gets_its_arguments_by_name_and_is_averaged() -> None:
    student, teacher = torch.randn(2, 5, 3)
    labels = torch.arange(5)
    loss = FunctionLoss(function=HERE, arguments=ARGUMENTS, options={"power": 3.0})
    expected = weighted(student, teacher, labels, power=3.0).mean()
    assert torch.equal(loss.compute(student, teacher, labels), expected)
    with pytest.raises(InputError, match="needs labels"):
        loss.compute(student, teacher)


def test_torchs_own_losses_need_no_mapping() -> None:
    student, teacher = torch.randn(2, 5, 3)
    (loss,) = parse_losses([{"type": "function", "function": "torch.nn.functional:huber_loss",
                             "options": {"delta": 0.3}}])  # fmt: skip
    assert torch.equal(loss.compute(student, teacher), F.huber_loss(student, teacher, delta=0.3))


def test_a_function_without_a_signature_is_taken_as_it_is() -> None:
    student, teacher = torch.randn(2, 5, 3)
    loss = FunctionLoss(function="torch:dist", arguments={"input": "student", "other": "teacher"})
    assert torch.equal(loss.compute(student, teacher), torch.dist(student, teacher))


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"function": "torch.nn.functional:huber_los"}, ["distill.0.function", "'huber_loss'"]),
        ({"function": "torch.nn.functional"}, ["distill.0.function", "package.module:function"]),
        ({"function": "math:pi"}, ["distill.0.function", "no function"]),
        ({"function": HERE}, ["distill.0.arguments.input", "no argument 'input'"]),
        (
            {"function": HERE, "arguments": {"ours": "student", "theirs": "teacher"}},
            ["distill.0.arguments", "needs 'labels'", "arguments: {labels: student}"],
        ),
        (
            {"function": HERE, "arguments": ARGUMENTS, "options": {"powr": 2}},
            ["distill.0.options.powr", "'power'"],
        ),
        (
            {"function": HERE, "arguments": {"ours": "studnet"}},
            ["distill.0.arguments.ours", "'student'"],
        ),
        ({}, ["distill.0.function", "required"]),
    ],
)
def test_what_does_not_fit_the_signature_is_named(entry: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_losses([{"type": "function", **entry}])
    for part in parts:
        assert part in str(caught.value)
