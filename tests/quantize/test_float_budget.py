"""A share of the multiply-adds in float, where it helps the outputs most."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import InputError
from slimkit.quantize import Limit, ptq
from slimkit.quantize.layer_choice.float_budget import best_within, worst_within
from slimkit.quantize.layer_choice.noise_estimate import NoiseShares
from slimkit.quantize.outputs.distance import OutputDistance
from slimkit.quantize.planning.partial_plans import integer_layers

Images = Callable[..., Tensor]


def macs_of(model: nn.Module, x: Tensor) -> dict[str, int]:
    return {row.name: row.macs for row in sk.profile(model, x).layers if row.macs}


def in_float(q: sk.quantize.QuantizedModel, macs: dict[str, int]) -> float:
    """Share of the multiply-adds."""
    integer = set(integer_layers(q.plan))
    return sum(n for layer, n in macs.items() if layer not in integer) / sum(macs.values())


@pytest.mark.parametrize("share", [0.1, 0.4, 0.75])
def test_the_budget_is_kept_and_helps(small: nn.Module, images: Images, share: float) -> None:
    data = [images(8, seed) for seed in range(2)]
    macs = macs_of(small, images(1))
    whole = ptq(small, images(1), calibration=data)
    q = ptq(small, images(1), calibration=data, limit=Limit(max_float=share))
    assert 0 < in_float(q, macs) <= share
    distance = OutputDistance(small, [sk.Inputs((x,)) for x in data])
    assert distance.noise(q) < distance.noise(whole)
    left = [d.module for d in q.plan.decisions if d.reason.startswith("left in float within")]
    assert set(left) == set(macs) - set(integer_layers(q.plan))
    told = f"{', '.join(left)} left in float within {100 * share:g} % of the multiply-adds: "
    assert q.plan.warnings[-1].startswith(told)
    assert q.plan.warnings[-1].endswith("dB with every layer quantized")


def test_the_poisoned_layer_goes_first(poisoned: nn.Module, images: Images) -> None:
    data, macs = [images(8, 0)], macs_of(poisoned, images(1))
    share = macs["pointwise"] / sum(macs.values())
    settings: dict[str, Any] = {"calibration": data, "granularity": "tensor", "methods": []}
    q = ptq(poisoned, images(1), limit=Limit(max_float=share), **settings)
    assert "pointwise" not in integer_layers(q.plan)
    assert in_float(q, macs) <= share


def test_what_is_skipped_is_part_of_the_budget(small: nn.Module, images: Images) -> None:
    macs = macs_of(small, images(1))
    share = macs["conv1"] / sum(macs.values())
    q = ptq(small, images(1), calibration=[images(8)], skip="conv1", limit=Limit(max_float=share))
    assert set(macs) - set(integer_layers(q.plan)) == {"conv1"}
    assert q.plan.warnings == ()


def test_methods_adjust_the_rest(small: nn.Module, images: Images) -> None:
    data, settings = [images(32, 1)], {"granularity": "tensor", "limit": Limit(max_float=0.1)}
    q = ptq(small, images(1), calibration=data, methods=["gptq"], **settings)
    plain = ptq(small, images(1), calibration=data, methods=[], **settings)
    assert integer_layers(q.plan) == integer_layers(plain.plan)
    same = {
        name
        for name in macs_of(small, images(1))
        if torch.equal(
            q.model.get_submodule(name).get_parameter("weight"),
            plain.model.get_submodule(name).get_parameter("weight"),
        )
    }
    assert same == set(macs_of(small, images(1))) - set(integer_layers(q.plan))
    assert same


def test_it_works_without_static_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    x = torch.randn(16, 8)
    q = ptq(model, x[:1], mode="dynamic", calibration=[x], limit=Limit(max_float=0.3))
    assert integer_layers(q.plan) == ("2",)
    assert (
        ptq(
            model, x[:1], mode="weights", calibration=[x], limit=Limit(max_float=0.01)
        ).plan.warnings
        == ()
    )


def chosen(shares: NoiseShares, layers: tuple[str, ...]) -> float:
    return shares.of(set(shares.needed) - set(layers))


@pytest.mark.parametrize("budget", range(8))
@pytest.mark.parametrize("select", [best_within, worst_within])
def test_selections_stay_within_the_budget(budget: int, select: Callable[..., Any]) -> None:
    layers, _ = example()
    costs = {"a": 3, "b": 1, "c": 2, "d": 4}
    found = select(layers, costs, budget)
    assert sum(costs[layer] for layer in found) <= budget
    assert list(found) == [layer for layer in costs if layer in found]


def example() -> tuple[NoiseShares, float]:
    """a writes what b reads, and so on; the worst lies between b and c."""
    noise = {"in": 1.0, "ab": 2.0, "bc": 9.0, "cd": 1.0}
    edges = ["in", "ab", "bc", "cd", None]
    needed = {
        layer: frozenset(name for name in (before, after) if name)
        for layer, before, after in zip("abcd", edges[:-1], edges[1:], strict=True)
    }
    return NoiseShares(noise, needed), sum(noise.values())


def test_neighbours_go_together_where_only_that_helps() -> None:
    shares, _ = example()
    costs = {"a": 3, "b": 1, "c": 2, "d": 4}
    assert best_within(shares, costs, 3) == ("b", "c")
    subsets = chain.from_iterable(combinations(costs, count) for count in range(5))
    within = [s for s in subsets if sum(costs[layer] for layer in s) <= 3]
    assert chosen(shares, ("b", "c")) == min(chosen(shares, s) for s in within)


def test_nothing_is_spent_on_nothing() -> None:
    shares = NoiseShares({"x": 0.0, "y": 1.0}, {"a": frozenset("x"), "b": frozenset("y")})
    assert best_within(shares, {"a": 1, "b": 1}, 2) == ("b",)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_a_wrong_share(small: nn.Module, images: Images, share: Any) -> None:
    with pytest.raises(InputError, match=r"max_float: expected a share") as caught:
        ptq(small, images(1), calibration=[images(8)], limit=Limit(max_float=share))
    assert caught.value.hint


@pytest.mark.parametrize("share", [True, "0.1", float("nan")])
def test_a_share_that_is_no_number(share: Any) -> None:
    with pytest.raises(InputError, match="max_float: expected a finite number, got"):
        Limit(max_float=share)


def test_percent_is_understood(small: nn.Module, images: Images) -> None:
    with pytest.raises(InputError) as caught:
        ptq(small, images(1), calibration=[images(8)], limit=Limit(max_float=10))
    assert caught.value.hint == "0.1"


def test_a_budget_is_no_limit(small: nn.Module, images: Images) -> None:
    with pytest.raises(InputError, match="max_float"):
        ptq(small, images(1), calibration=[images(8)], limit=Limit(max_float=0.1, min_sqnr=20))
    with pytest.raises(InputError, match="max_float needs data"):
        ptq(small, images(1), mode="dynamic", limit=Limit(max_float=0.1))


class Transform(nn.Module):
    """Linear, with a weight that is not trained, as of a cosine transform."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_layer_whose_weight_is_a_buffer_has_its_price() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Transform(), nn.ReLU(), nn.Linear(64, 8)).eval()
    data = [torch.randn(16, 64)]
    q = ptq(model, data[0], calibration=data, limit=Limit(max_float=0.2))
    assert integer_layers(q.plan) == ("0",)  # 4096 of 4608 multiply-adds
