"""Layers are switched one at a time on a network that was calibrated once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import ArtifactError, DataError, InputError, PatternError
from slimkit.quantize import EvaluationError, LayerSensitivity, Limit, ptq, sensitivity
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.planning.partial_plans import integer_layers, leave_in_float
from slimkit.quantize.targets import resolve_target

Images = Callable[..., Tensor]
LAYERS = ("conv1", "depthwise", "pointwise", "branch", "fc")


@pytest.fixture
def batches(images: Images) -> list[Tensor]:
    return [images(8, seed) for seed in range(2)]


class Heads(nn.Module):
    """A linear layer that another one reads, a shared layer, and sums of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.shared = nn.Linear(8, 8)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.shared(torch.relu(self.stem(x)))
        y = self.shared(x) + self.left(x)
        return self.right(y), y


def rules(plan: Any) -> Any:
    """A plan without the names of its quantizers, which are counted as they come."""
    calls = {at: (sorted(rule.inputs), sorted(rule.outputs)) for at, rule in plan.calls.items()}
    written = [(d.address, d.integer, d.writes is not None) for d in plan.decisions if d.integer]
    return calls, written, len(plan.quantizers)


@pytest.mark.parametrize("network", ["small", "heads"])
def test_switching_layers_off_equals_skipping_them(
    network: str, small: nn.Module, images: Images
) -> None:
    torch.manual_seed(1)
    model = small if network == "small" else Heads().eval()
    x = images(4) if network == "small" else torch.randn(16, 6)
    switches = LayerSwitches(ptq(model, x, calibration=x), target=resolve_target("onnxruntime"))
    for number in (1, len(switches.layers) - 1, len(switches.layers)):
        for off in itertools.combinations(switches.layers, number):
            expected = ptq(model, x, calibration=x, skip=off)
            assert rules(switches.plan(off)) == rules(expected.plan)
            with torch.no_grad(), switches.set(off) as q:
                for one, other in zip(
                    sk.Inputs((x,)).call(q), sk.Inputs((x,)).call(expected), strict=True
                ):
                    assert torch.equal(one, other), off


def test_switching_to_fewer_bits_equals_quantizing_to_them(
    small: nn.Module, images: Images
) -> None:
    x = images(4)
    q = ptq(small, x, calibration=x)
    before = q(x)
    switches = LayerSwitches(q, target=resolve_target("onnxruntime"))
    bits = {"conv1": 4, "fc": 3}
    expected = ptq(small, x, calibration=x, weight_bits=bits, skip="branch", methods=[])
    with torch.no_grad(), switches.set(["branch"], bits):
        assert torch.equal(q(x), expected(x))
        assert q.bit_widths() == expected.bit_widths()
    assert torch.equal(q(x), before)


def test_only_integer_layers_with_weights_are_layers(small_quantized: Any) -> None:
    assert integer_layers(small_quantized.plan) == LAYERS
    plan = leave_in_float(small_quantized.plan, LAYERS, float_outputs={"linear"})
    assert not plan.quantizers
    assert not plan.calls
    assert not any(decision.integer for decision in plan.decisions)


def test_the_poisoned_layer_is_the_most_sensitive(
    poisoned: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    for options in ({}, {"leave_one_out": True}):
        table = sensitivity(
            poisoned, images(1), calibration=batches, granularity="tensor", **options
        )
        assert table.ranking()[0] == "pointwise"
        assert str(table).splitlines()[2].startswith("pointwise")
    alone = sensitivity(poisoned, images(1), calibration=batches, granularity="tensor")
    skip = [layer for layer in LAYERS if layer != "pointwise"]
    choices: dict[str, Any] = {"granularity": "tensor", "methods": []}
    q = ptq(poisoned, images(1), calibration=batches, skip=skip, **choices)
    with torch.no_grad():
        pairs = [(poisoned(x), q(x)) for x in batches]
    noise = sum(float((a - b).double().square().sum()) for a, b in pairs)
    signal = sum(float(a.double().square().sum()) for a, _ in pairs)
    assert alone.damage("pointwise") == pytest.approx(noise / signal, rel=1e-4)


def test_the_metric_is_what_counts_where_there_is_one(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    def metric(model: nn.Module) -> float:
        if not hasattr(model, "plan"):
            return 90.0
        return 90.0 - sum(len(name) for name in integer_layers(model.plan))

    alone = sensitivity(small, images(1), calibration=batches, evaluate=metric)
    assert alone.base == 90.0
    assert {name: alone.damage(name) for name in LAYERS} == {n: len(n) for n in LAYERS}
    others = sensitivity(small, images(1), calibration=batches, evaluate=metric, leave_one_out=True)
    assert others.ranking() == alone.ranking() == sorted(LAYERS, key=lambda n: -len(n))
    assert "wins back" in str(others)
    assert "float 90" in str(alone)


def test_narrow_weights_cost_more(small: nn.Module, images: Images, batches: list[Tensor]) -> None:
    table = sensitivity(small, images(1), calibration=batches, bits=(8, 4))
    assert table.bits == (8, 4)
    assert all(table.damage(name, 4) > table.damage(name, 8) for name in LAYERS)
    assert table.quantized[4] > table.quantized[8]


def test_groups_are_switched_together(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    groups = {"block": ["depthwise", "pointwise"], "head": "fc"}
    table = sensitivity(small, images(1), calibration=batches, groups=groups)
    assert list(table.layers) == ["conv1", "block", "branch", "head"]
    assert table.layers["block"] == ("depthwise", "pointwise")
    for wrong, kind in (
        ({"a": "nothing"}, PatternError),
        ({"a": "relu"}, InputError),
        ({"a": "fc", "b": "Linear"}, InputError),
    ):
        with pytest.raises(kind, match="groups"):
            sensitivity(small, images(1), calibration=batches, groups=wrong)


# --- the file --------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an error: a signal."""


class Counting:
    """Noise of the outputs, that counts and stops."""

    def __init__(self, reference: nn.Module, x: Tensor, stop: int = 1000) -> None:
        self.reference, self.x = reference, x
        self.calls, self.stop = 0, stop

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        if self.calls > self.stop:
            raise Killed
        return -float((model(self.x) - self.reference(self.x)).square().sum())


def test_a_killed_analysis_goes_on_to_the_same_table(
    small: nn.Module, images: Images, batches: list[Tensor], tmp_path: Path
) -> None:
    def run(evaluate: Counting, name: str, **options: Any) -> LayerSensitivity:
        return sensitivity(
            small, images(1), calibration=batches, evaluate=evaluate,
            file=tmp_path / name, **options,
        )  # fmt: skip

    whole = run(Counting(small, images(8, 9)), "whole.json", bits=(8, 4))
    with pytest.raises(Killed):
        run(Counting(small, images(8, 9), stop=5), "part.json", bits=(8, 4))
    assert len(LayerSensitivity.load(tmp_path / "part.json").points) == 2
    rest = Counting(small, images(8, 9))
    assert run(rest, "part.json", bits=(8, 4)) == whole
    assert rest.calls == 2 + 13 - 5  # two known; float, everything and five layers at two widths
    assert LayerSensitivity.load(tmp_path / "part.json") == whole
    again = Counting(small, images(8, 9))
    assert run(again, "part.json", bits=4).bits == (4,)
    assert again.calls == 2  # to see that it is the same evaluation
    json.loads((tmp_path / "part.json").read_text())


def test_a_file_that_another_evaluation_filled_is_refused(
    small: nn.Module, images: Images, batches: list[Tensor], tmp_path: Path
) -> None:
    def run(evaluate: Any) -> LayerSensitivity:
        options: dict[str, Any] = {"calibration": batches, "file": tmp_path / "s.json"}
        return sensitivity(small, images(1), evaluate=evaluate, **options)

    whole = run(Counting(small, images(8, 9)))
    before = (tmp_path / "s.json").read_bytes()
    other = Counting(small, images(8, 3))
    for evaluate, message in (
        (lambda model: 90.0 + other(model), "the float network scores .* there and 90 here"),
        (other, "everything quantized at 8 bits scores"),  # the float network is equal to itself
    ):
        with pytest.raises(InputError, match=message):
            run(evaluate)
    assert (tmp_path / "s.json").read_bytes() == before
    assert run(Counting(small, images(8, 9))) == whole


def test_a_file_of_another_network_or_question_is_refused(
    small: nn.Module, images: Images, batches: list[Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "s.json"
    sensitivity(small, images(1), calibration=batches, file=file)
    with pytest.raises(InputError, match="leave_one_out"):
        sensitivity(small, images(1), calibration=batches, file=file, leave_one_out=True)
    with pytest.raises(InputError, match="calibration"):
        sensitivity(small, images(1), calibration=batches[:1], file=file)
    with torch.no_grad():
        small.get_parameter("fc.weight").mul_(1.5)
    with pytest.raises(InputError, match=r"weights\.fc\.weight"):
        sensitivity(small, images(1), calibration=batches, file=file)
    file.write_text('{"kind": "other", "version": 1}')
    with pytest.raises(ArtifactError, match="layer sensitivities"):
        sensitivity(small, images(1), calibration=batches, file=file)


def test_a_file_of_another_evaluation_is_refused(
    small: nn.Module, images: Images, batches: list[Tensor], tmp_path: Path
) -> None:
    calls: list[str] = []

    def rated(name: str, value: float) -> Any:
        def evaluate(_model: nn.Module) -> float:
            calls.append(name)
            return value

        return evaluate

    options: dict[str, Any] = {"calibration": batches, "file": tmp_path / "s.json"}
    sensitivity(small, images(1), evaluate=rated("first", 90.0), **options)
    calls.clear()
    with pytest.raises(InputError, match=r"another evaluation.* 90 there and -0.3 here"):
        sensitivity(small, images(1), evaluate=rated("second", -0.3), **options)
    assert calls == ["second"]
    sensitivity(small, images(1), evaluate=rated("first", 90.0), **options)
    assert calls == ["second", "first", "first"]  # two known points, and no other


@pytest.mark.parametrize("answer", [float("nan"), RuntimeError("out of luck")])
def test_a_failing_evaluation_is_named_and_the_file_keeps_the_rest(
    small: nn.Module, images: Images, batches: list[Tensor], tmp_path: Path, answer: Any
) -> None:
    def evaluate(model: nn.Module) -> float:
        if hasattr(model, "plan") and integer_layers(model.plan) == ("pointwise",):
            if isinstance(answer, Exception):
                raise answer
            return float(answer)
        return 1.0

    file = tmp_path / "s.json"
    with pytest.raises(EvaluationError, match="pointwise alone at 8 bits"):
        sensitivity(small, images(1), calibration=batches, evaluate=evaluate, file=file)
    assert list(LayerSensitivity.load(file).points) == ["conv1", "depthwise"]


def test_test_data_is_refused_where_it_can_be_seen(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    class Loader(list[Tensor]):
        role = "test"

    loader = Loader(batches)

    def closed(model: nn.Module) -> float:
        return float(sum(model(x).sum() for x in loader))

    def default(model: nn.Module, data: Any = loader) -> float:
        return 0.0

    class Scorer:
        def __init__(self) -> None:
            self.data = loader

        def __call__(self, model: nn.Module) -> float:
            return 0.0

        def score(self, model: nn.Module) -> float:
            return 0.0

    for evaluate in (closed, default, Scorer(), Scorer().score):
        with pytest.raises(DataError, match="test data"):
            sensitivity(small, images(1), calibration=batches, evaluate=evaluate)
        with pytest.raises(DataError, match="test data"):
            ptq(small, images(1), calibration=batches, limit=Limit(evaluate=evaluate, max_drop=1))


@pytest.mark.parametrize("bits", [(), 9, (8, 1), (4.0,)])
def test_widths_that_cannot_be_are_refused(
    small: nn.Module, images: Images, batches: list[Tensor], bits: Any
) -> None:
    with pytest.raises(InputError, match="bits"):
        sensitivity(small, images(1), calibration=batches, bits=bits)
