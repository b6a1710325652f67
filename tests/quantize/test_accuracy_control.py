"""Post-training quantization that keeps a metric: few layers in float, each candidate evaluated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import InputError
from slimkit.quantize import METHODS, EvaluationError, LayerSensitivity, Limit, ptq
from slimkit.quantize.layer_choice.accuracy_control import AccuracyLimit, _fewest, _Trials
from slimkit.quantize.layer_choice.noise_estimate import NoiseShares
from slimkit.quantize.outputs.distance import OutputDistance, decibels
from slimkit.quantize.planning.partial_plans import integer_layers

Images = Callable[..., Tensor]
LAYERS = ("conv1", "depthwise", "pointwise", "branch", "fc")


@pytest.fixture
def batches(images: Images) -> list[Tensor]:
    return [images(8, seed) for seed in range(2)]


class Quality:
    """Decibels above the quantization noise on other images, at most 100; higher is better."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.distance = OutputDistance(model, [sk.Inputs((x,))])
        self.seen: list[tuple[str, ...]] = []

    def __call__(self, model: nn.Module) -> float:
        plan = getattr(model, "plan", None)
        self.seen.append(integer_layers(plan) if plan is not None else ())
        return min(100.0, decibels(self.distance.noise(model)))


def test_the_poisoned_layer_alone_goes_back_to_float(
    poisoned: nn.Module, images: Images, batches: list[Tensor], tmp_path: Path
) -> None:
    quality = Quality(poisoned, images(16, 9))
    q = ptq(
        poisoned, images(1), calibration=batches, granularity="tensor", methods=[],
        limit=Limit(evaluate=quality, max_drop=65, sensitivity=tmp_path / "layers.json"),
    )  # fmt: skip
    reason = "left in float to keep the metric within 65"
    assert {d.module: d.reason for d in q.plan.decisions if d.reason == reason} == {
        "pointwise": reason
    }
    assert integer_layers(q.plan) == ("conv1", "depthwise", "branch", "fc")
    assert len(q.plan.warnings) == 1
    assert q.plan.warnings[0].startswith(f"pointwise {reason}: it falls by ")
    assert reason in q.plan.explain()
    choices: dict[str, Any] = {"granularity": "tensor", "methods": []}
    expected = ptq(poisoned, images(1), calibration=batches, skip="pointwise", **choices)
    with torch.no_grad():
        assert torch.equal(q(images(8, 3)), expected(images(8, 3)))
    assert quality(q) >= 35
    assert len(LayerSensitivity.load(tmp_path / "layers.json").points) == 5
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=poisoned)
    with torch.no_grad():
        assert torch.equal(again(images(8, 3)), expected(images(8, 3)))


def test_without_labels_the_outputs_are_the_limit(
    poisoned: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    choices: dict[str, Any] = {"calibration": batches, "granularity": "tensor", "methods": []}
    whole = ptq(poisoned, images(1), **choices)
    distance = OutputDistance(poisoned, [sk.Inputs((x,)) for x in batches])
    assert decibels(distance.noise(whole)) < 25
    q = ptq(poisoned, images(1), limit=Limit(min_sqnr=30), **choices)
    assert integer_layers(q.plan) == ("conv1", "depthwise", "branch", "fc")
    assert decibels(distance.noise(q)) >= 30
    assert q.plan.warnings[0].startswith("pointwise left in float to keep the outputs at 30 dB: ")
    assert q.plan.warnings[0].endswith("dB with every layer quantized")


def test_multiply_adds_in_float_can_count_instead_of_layers(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    macs = {row.name: row.macs for row in sk.profile(small, images(1)).layers}
    whole = ptq(small, images(1), calibration=batches)
    distance = OutputDistance(small, [sk.Inputs((x,)) for x in batches])
    least = decibels(distance.noise(whole)) + 4.2  # fc alone brings about 3
    left = {}
    for fewest in ("layers", "macs"):
        q = ptq(small, images(1), calibration=batches, limit=Limit(min_sqnr=least, fewest=fewest))
        assert decibels(distance.noise(q)) >= least
        left[fewest] = [name for name in LAYERS if name not in integer_layers(q.plan)]
    spent = {fewest: sum(macs[name] for name in names) for fewest, names in left.items()}
    assert len(left["layers"]) <= len(left["macs"]) < len(LAYERS)
    assert 0 < spent["macs"] < spent["layers"]


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"min_sqnr": -1}, "min_sqnr"),
        ({"min_sqnr": float("nan")}, "min_sqnr"),
        ({"min_sqnr": 300}, "min_sqnr"),
        ({"min_sqnr": 20, "max_drop": 1, "evaluate": lambda _: 1.0}, "min_sqnr"),
        ({}, "limit"),
        ({"fewest": "macs"}, "limit"),
        ({"min_sqnr": 20, "fewest": "flops"}, "fewest"),
    ],
)
def test_limits_that_make_no_sense(wrong: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        Limit(**wrong)
    assert caught.value.where == where


def test_a_limit_of_the_outputs_needs_data(small: nn.Module, images: Images) -> None:
    with pytest.raises(InputError, match="calibration: min_sqnr needs data"):
        ptq(small, images(1), mode="dynamic", limit=Limit(min_sqnr=20))
    wrong: Any = 20
    with pytest.raises(InputError, match="limit: expected a Limit, got 20"):
        ptq(small, images(1), calibration=[images(4)], limit=wrong)


def test_where_the_limit_holds_everything_stays_integer(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    quality = Quality(small, images(8, 9))
    q = ptq(small, images(1), calibration=batches, limit=Limit(evaluate=quality, max_drop=80))
    expected = ptq(small, images(1), calibration=batches)
    assert q.plan == expected.plan
    assert quality.seen == [(), LAYERS]
    with torch.no_grad():
        assert torch.equal(q(images(4)), expected(images(4)))


def test_a_limit_that_only_float_meets_is_met_with_a_warning(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    with pytest.warns(UserWarning, match="no layer is left to quantize"):
        q = ptq(
            small,
            images(1),
            calibration=batches,
            limit=Limit(evaluate=Quality(small, images(8, 9)), max_drop=0),
        )
    assert integer_layers(q.plan) == ()


def test_a_limit_out_of_reach_gives_the_best_and_says_so(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    def evaluate(model: nn.Module) -> float:  # no candidate is as good as the float network
        if not hasattr(model, "plan"):
            return 90.0
        return 70.0 + (10.0 if integer_layers(model.plan) == LAYERS[:4] else 0.0)

    with pytest.warns(UserWarning, match="cannot be kept within 1, not even in float: with fc in"):
        q = ptq(small, images(1), calibration=batches, limit=Limit(evaluate=evaluate, max_drop=1))
    assert "falls by 10 from 90, and by 20 with every layer quantized" in q.plan.warnings[0]
    assert integer_layers(q.plan) == LAYERS[:4]


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), RuntimeError("out of luck")])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failing_evaluation_loses_nothing(
    small: nn.Module, images: Images, batches: list[Tensor], answer: Any, at: int
) -> None:
    calls: Iterator[int] = iter(range(10))

    def evaluate(model: nn.Module) -> float:
        if next(calls) < at:
            return 90.0 if not hasattr(model, "plan") else 10.0
        if isinstance(answer, Exception):
            raise answer
        return float(answer)

    named = ("the float network", "all integer", "1 layer in float")[at]
    with pytest.raises(EvaluationError, match=named) as caught:
        ptq(small, images(1), calibration=batches, limit=Limit(evaluate=evaluate, max_drop=1))
    if at == 0:
        assert caught.value.model is None
        return
    expected = ptq(small, images(1), calibration=batches)
    assert caught.value.model is not None
    with torch.no_grad():
        assert torch.equal(caught.value.model(images(4)), expected(images(4)))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"max_drop": 1}, "evaluate"),
        ({"evaluate": len}, "max_drop"),
        ({"evaluate": len, "max_drop": -1}, "max_drop"),
        ({"evaluate": len, "max_drop": float("nan")}, "max_drop"),
        ({"evaluate": "accuracy", "max_drop": 1}, "evaluate"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options: Any, where: str) -> None:
    with pytest.raises(InputError, match=f"^{where}"):
        Limit(**options)


def test_a_layer_in_float_gets_back_what_methods_changed(
    poisoned: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    @dataclass(frozen=True)
    class Shift:
        """Adds a little to every bias, as a bias correction does."""

        when: ClassVar[Literal["before", "after"]] = "after"

        def run(self, work: Any) -> None:
            with torch.no_grad():
                for layer in integer_layers(work.quantized.plan):
                    work.quantized.model.get_submodule(layer).bias.add_(1e-4)

    with METHODS.scratch():
        METHODS.register("shift")(Shift)
        plain = ptq(poisoned, images(1), calibration=batches, granularity="tensor", methods=[])
        q = ptq(
            poisoned, images(1), calibration=iter(batches), granularity="tensor",
            methods=["shift"], limit=Limit(evaluate=Quality(poisoned, images(16, 9)), max_drop=65),
        )  # fmt: skip
    assert "pointwise" not in integer_layers(q.plan)
    for layer in LAYERS:
        before, after = (m.model.get_submodule(layer).bias for m in (plain, q))
        assert torch.equal(before, after) == (layer == "pointwise"), layer


@pytest.mark.parametrize("gain", [3.0, 8.0])
def test_methods_run_again_on_the_layers_that_stay_integer(
    small: nn.Module, images: Images, batches: list[Tensor], gain: float
) -> None:
    choices: dict[str, Any] = {"calibration": batches, "weight_bits": 4, "methods": ["gptq"]}
    distance = OutputDistance(small, [sk.Inputs((x,)) for x in batches])
    whole = decibels(distance.noise(ptq(small, images(1), **choices)))
    q = ptq(small, images(1), limit=Limit(min_sqnr=whole + gain), **choices)
    assert decibels(distance.noise(q)) >= whole + gain
    left = [name for name in LAYERS if name not in integer_layers(q.plan)]
    assert 0 < len(left) < len(LAYERS)
    assert f"{whole:.4g} dB with every layer quantized" in q.plan.warnings[-1]
    expected = ptq(small, images(1), skip=left, **choices)
    with torch.no_grad():
        assert torch.equal(q(images(4)), expected(images(4)))


def test_methods_cannot_reach_every_limit(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    with pytest.warns(UserWarning, match="no layer is left to quantize"):
        q = ptq(small, images(1), calibration=batches, methods=["gptq"], limit=Limit(min_sqnr=150))
    assert integer_layers(q.plan) == ()


# --- the search for the fewest layers --------------------------------------------------------


class Network:
    """Stands for the switches: what is on is all there is to know."""

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.layers = layers

    def set(self, in_float: Any) -> Any:
        import contextlib

        return contextlib.nullcontext(_Module(frozenset(in_float)))


class _Module(nn.Module):
    def __init__(self, in_float: frozenset[str]) -> None:
        super().__init__()
        self.in_float = in_float


@settings(max_examples=60)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(0, 60), st.randoms())
def test_no_layer_is_left_in_float_without_need(costs: list[int], limit: int, random: Any) -> None:
    layers = tuple(f"layer{number}" for number in range(len(costs)))
    cost = dict(zip(layers, costs, strict=True))

    def evaluate(model: Any) -> float:
        return 100.0 - sum(cost[name] for name in layers if name not in model.in_float)

    goal = AccuracyLimit(limit, 100.0, evaluate)
    trials = _Trials(goal, evaluate, Network(layers))  # type: ignore[arg-type]
    if trials.meets(()):
        return
    fewest = _fewest(trials, NoiseShares.measured(cost), dict.fromkeys(layers, 1))
    assert fewest is not None
    dropped = sum(costs) - sum(cost[name] for name in fewest)
    assert dropped <= limit
    by_size = sorted(costs, reverse=True)
    assert len(fewest) == next(k for k in range(10) if sum(by_size[k:]) <= limit)
    wrong = {name: random.random() for name in layers}  # a wrong ranking wastes no layer either
    prices = {name: random.randint(1, 9) for name in layers}
    some = _fewest(trials, NoiseShares.measured(wrong), prices)
    assert some is not None
    assert sum(costs) - sum(cost[name] for name in some) <= limit
    for name in some:
        assert dropped_without(cost, some, name) > limit


@settings(max_examples=60)
@given(st.lists(st.floats(1e-4, 1e-1), min_size=2, max_size=40), st.floats(5, 40))
def test_noise_that_adds_up_wastes_no_layer(noises: list[float], limit: float) -> None:
    noise = {f"layer{number}": value for number, value in enumerate(noises)}
    prices = {name: 1 + number % 7 for number, name in enumerate(noise)}

    def score(model: Any) -> float:
        left = sum(noise[name] for name in noise if name not in model.in_float)
        return min(200.0, decibels(left))

    trials = _Trials(AccuracyLimit(0.0, limit), score, Network(tuple(noise)))  # type: ignore[arg-type]
    if trials.meets(()):
        return
    found = _fewest(trials, NoiseShares.measured(noise), prices)
    assert found is not None
    allowed = 10 ** (-limit / 10) * (1 + 1e-9)
    assert sum(noise.values()) - sum(noise[name] for name in found) <= allowed
    assert len(found) == len(noise) or all(
        dropped_without(noise, found, n) > allowed for n in found
    )


def test_layers_far_too_noisy_to_be_integer_are_not_tried() -> None:
    noise = {f"layer{number}": 1e-2 if number < 30 else 1e-5 for number in range(100)}

    def score(model: Any) -> float:
        return decibels(1e-9 + sum(noise[name] for name in noise if name not in model.in_float))

    trials = _Trials(AccuracyLimit(0.0, 30.0), score, Network(tuple(noise)))  # type: ignore[arg-type]
    assert not trials.meets(())
    found = _fewest(trials, NoiseShares.measured(noise), dict.fromkeys(noise, 1))
    assert found is not None
    assert sorted(noise[name] for name in found) == [1e-2] * 30
    assert len(trials.tried) <= 12  # to 64 by doubling, to 30 by halving, and none of the 30


def dropped_without(cost: Mapping[str, float], kept: tuple[str, ...], name: str) -> float:
    return sum(cost.values()) - sum(cost[other] for other in kept if other != name)


def test_nothing_is_said_when_all_is_well(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ptq(
            small,
            images(1),
            calibration=batches,
            limit=Limit(evaluate=Quality(small, images(8, 9)), max_drop=52),
        )
