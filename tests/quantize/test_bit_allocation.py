"""Bits per layer under a budget: the solver against brute force, and on a network."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import DataError, InputError, PlanError
from slimkit.quantize import BitAllocation, mixed_precision, ptq, qat, sensitivity
from slimkit.quantize.layer_choice.choice_knapsack import choose_within
from slimkit.recipe.stages.quantization import PtqStage

Images = Callable[..., Tensor]

ITEMS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 50), st.floats(0, 1e3, allow_subnormal=False)),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=6,
)


def parts(items: Any) -> tuple[list[list[int]], list[list[float]]]:
    return [[c for c, _ in item] for item in items], [[x for _, x in item] for item in items]


def least(items: Any, budget: int) -> float | None:
    """By trying everything."""
    sums = [
        (sum(c for c, _ in combination), sum(x for _, x in combination))
        for combination in itertools.product(*items)
    ]
    return min((loss for cost, loss in sums if cost <= budget), default=None)


@settings(max_examples=200)
@given(ITEMS, st.integers(0, 200))
def test_the_choice_is_the_best_of_all(items: Any, budget: int) -> None:
    costs, losses = parts(items)
    chosen = choose_within(costs, losses, budget)
    expected = least(items, budget)
    if chosen is None:
        assert expected is None
        return
    assert sum(item[pick][0] for item, pick in zip(items, chosen, strict=True)) <= budget
    found = sum(item[pick][1] for item, pick in zip(items, chosen, strict=True))
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_a_hundred_layers_take_no_time() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10**3, 10**7, (100,), generator=generator).tolist()
    noise = torch.rand(100, generator=generator).tolist()
    costs = [[size * bits for bits in (2, 4, 8)] for size in sizes]
    losses = [[x * 4.0**-bits for bits in (2, 4, 8)] for x in noise]
    budget = sum(sizes) * 5
    chosen = choose_within(costs, losses, budget)
    assert chosen is not None
    assert 0.999 * budget < sum(c[p] for c, p in zip(costs, chosen, strict=True)) <= budget


# --- of a network ----------------------------------------------------------------------------


@pytest.fixture
def batches(images: Images) -> list[Tensor]:
    return [images(8, seed) for seed in range(2)]


@pytest.mark.parametrize(("budget", "removed"), [("size", 0.3), ("bops", 0.2)])
def test_the_budget_is_met_at_the_least_noise(
    small: nn.Module, images: Images, batches: list[Tensor], budget: str, removed: float
) -> None:
    options: dict[str, Any] = {budget: removed}
    found = mixed_precision(small, images(1), calibration=batches, bits=(8, 4), **options)
    table = sensitivity(small, images(1), calibration=batches, bits=(4, 8))
    weights = {name: small.get_parameter(f"{name}.weight").numel() for name in found}
    macs = {row.name: row.macs for row in sk.profile(small, images(1)).layers}
    unit = weights if budget == "size" else macs
    whole = sum(8 * unit[name] for name in found)
    best = min(
        sum(table.damage(name, bits) for name, bits in zip(found, choice, strict=True))
        for choice in itertools.product((4, 8), repeat=len(found))
        if sum(unit[n] * b for n, b in zip(found, choice, strict=True)) <= (1 - removed) * whole
    )
    assert found.loss == pytest.approx(best)
    left = sum(unit[name] * bits for name, bits in found.items())
    gone = found.size_removed if budget == "size" else found.bops_removed
    assert gone == pytest.approx(1 - left / whole)
    assert gone >= removed
    assert set(found.values()) == {4, 8}
    assert f"{100 * gone:.1f} %" in str(found)


def test_the_allocation_is_what_weight_bits_and_recipes_take(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    found = mixed_precision(small, images(1), calibration=batches, size=0.3)
    q = ptq(small, images(1), calibration=batches, weight_bits=found)
    assert {path: bits for path, (bits, _) in q.plan.bit_widths().items()} == dict(found)
    trained = qat(small, images(1), calibration=batches, weight_bits=found)
    assert trained.plan.bit_widths() == q.plan.bit_widths()
    stage = PtqStage.model_validate(json.loads(json.dumps({"weight_bits": dict(found)})))
    assert stage.weight_bits == dict(found)
    json.dumps(found.to_json())
    size = sk.profile(q, images(1)).bytes
    assert size < sk.profile(ptq(small, images(1), calibration=batches), images(1)).bytes


def test_a_module_inside_another_keeps_its_own_bits() -> None:
    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.relu(self.inner(x)))

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = Outer()

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(x)

    x = torch.randn(16, 6)
    for evaluate, bits in ((4, 8), (8, 4)):
        found = mixed_precision(
            Holder().eval(), x, calibration=x, size=0.2,
            evaluate=lambda model, wide=evaluate: -worth(model, wide),
        )  # fmt: skip
        assert dict(found) == {"outer.inner": bits, "outer": evaluate}
        q = ptq(Holder().eval(), x, calibration=x, weight_bits=found)
        assert {name: b for name, (b, _) in q.plan.bit_widths().items()} == dict(found)


def worth(model: Any, wide: int) -> float:
    """Loses more where the layer that shall be wide is narrow."""
    widths = model.plan.bit_widths() if hasattr(model, "plan") else {}
    dear = "outer" if wide == 8 else "outer.inner"
    return float(sum((8 - b[0]) * (2 if name == dear else 1) for name, b in widths.items()))


def test_what_cannot_be_is_said(
    small: nn.Module, images: Images, batches: list[Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "layers.json"
    common: dict[str, Any] = {"calibration": batches, "file": file}
    with pytest.raises(PlanError, match=r"size: 4 bits everywhere remove 0\.500, 0\.6 was asked"):
        mixed_precision(small, images(1), size=0.6, **common)
    assert file.exists()  # for another budget
    assert isinstance(mixed_precision(small, images(1), size=0.5, **common), BitAllocation)
    for options in ({}, {"size": 0.2, "bops": 0.2}, {"size": 0}, {"bops": 1.0}, {"size": True}):
        with pytest.raises(InputError, match=r"size|bops"):
            mixed_precision(small, images(1), **common, **options)

    class Loader(list[Tensor]):
        role = "test"

    with pytest.raises(DataError, match="test data"):
        mixed_precision(small, images(1), calibration=Loader(batches), size=0.3)
