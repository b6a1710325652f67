"""Which tensors a record names, and that they are the ones that are recorded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from slimkit.distill.recording.recorder import Recorder
from slimkit.distill.recording.records import Record, Tap, find_taps
from slimkit.distill.teacher import FrozenTeacher
from slimkit.errors import ModelError, UnknownNameError
from slimkit.inputs import as_inputs


class Body(nn.Module):
    """Three layers, the middle one used twice, and a head that takes a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True))
        self.layer2 = nn.Linear(6, 6)
        self.layer3 = nn.Linear(6, 6)
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(x)
        x = self.layer2(self.layer2(x))
        x = F.gelu(self.layer3(x))
        return self.head(x, scale=x.new_tensor(2.0))[0]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    @staticmethod
    def rescaled(x: Tensor, scale: Tensor) -> Tensor:
        return x * scale

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.fc(x)
        return self.rescaled(logits, scale), logits


class Scaling(nn.Module):
    """A head with a method and a class method."""

    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    @classmethod
    def made(cls) -> Tensor:
        return torch.full((3,), cls.factor)

    def scaled(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.made()

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        return self.scaled(x), scale


def recorded(model: nn.Module, record: Any, x: Tensor) -> list[Tensor]:
    taps = find_taps(record, model, who="student")
    recorder = Recorder(model, taps)
    try:
        model(x)
        return [recorder.records[tap.key] for tap in taps]
    finally:
        recorder.close()


@pytest.fixture
def model() -> Body:
    return Body()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def test_every_kind_of_record_is_the_tensor_that_flowed(model: Body, x: Tensor) -> None:
    first = model.layer1(x)
    once = model.layer2(first)
    twice = model.layer2(once)
    late = F.gelu(model.layer3(twice))
    logits = model.head.fc(late)
    expected: list[tuple[Any, Tensor]] = [
        (None, 2 * logits),
        ("layer1", first),
        ("layer1.0", model.layer1[0](x)),  # although an in-place ReLU follows
        ({"module": "layer1", "part": "input"}, x),
        ({"part": "input"}, x),
        ("layer2", twice),
        ({"module": "layer2", "call": 0}, once),
        ({"module": "layer2", "call": 1, "part": "input"}, once),
        ({"module": "head", "part": "input"}, late),
        ({"module": "head", "part": "input", "index": "scale"}, torch.tensor(2.0)),
        ({"module": "head", "index": 1}, logits),
        ({"parameter": "head.fc.weight"}, model.head.fc.weight),
        ({"function": "torch.nn.functional:gelu"}, late),
        ({"function": "torch.nn.functional:linear", "call": 1}, once),
        ({"function": f"{__name__}:Head.rescaled"}, 2 * logits),
    ]
    for record, tensor in expected:
        named = Record.model_validate(record) if isinstance(record, dict) else record
        (found,) = recorded(model, named, x)
        assert torch.allclose(found, tensor, atol=1e-6), record


def test_a_parameter_is_recorded_live_so_that_its_gradient_flows(model: Body, x: Tensor) -> None:
    (weight,) = recorded(model, Record(parameter="layer3.weight"), x)
    assert weight is model.layer3.weight


def test_a_pattern_is_all_matches_in_order_between_two_dots(model: Body) -> None:
    assert [tap.name for tap in find_taps("layer*", model, who="student")] == [
        "layer1", "layer2", "layer3",
    ]  # fmt: skip
    names = [tap.name for tap in find_taps(Record(parameter="layer?.*"), model, who="student")]
    assert names == ["layer2.weight", "layer2.bias", "layer3.weight", "layer3.bias"]
    assert [tap.name for tap in find_taps("layer1.[01]", model, who="x")] == [
        "layer1.0", "layer1.1",
    ]  # fmt: skip


def test_functions_and_methods_are_themselves_again(model: Body, x: Tensor) -> None:
    gelu, rescaled = F.gelu, vars(Head)["rescaled"]
    records = [
        Record(function="torch.nn.functional:gelu"),
        Record(function=f"{__name__}:Head.rescaled"),
    ]
    taps = [tap for record in records for tap in find_taps(record, model, who="student")]
    recorder = Recorder(model, taps)
    seen = []
    model.layer3.register_forward_hook(lambda *_: seen.append(F.gelu is not gelu))
    model(x)
    assert seen == [True]  # wrapped inside of the forward
    assert F.gelu is gelu
    assert vars(Head)["rescaled"] is rescaled
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 3))
    assert F.gelu is gelu
    recorder.close()
    model(x)
    assert seen == [True, False]


def test_two_recorders_of_one_function_do_not_see_each_other_off(x: Tensor) -> None:
    """The inner network's forward ends before the outer one's goes on."""
    gelu = F.gelu
    inner = Body()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.inner(x))

    outer = Outer()
    taps = find_taps(Record(function="torch.nn.functional:gelu"), outer, who="student")
    first, second = Recorder(outer, taps), Recorder(inner, taps)
    result = outer(x)
    key = taps[0].key
    assert torch.equal(first.records[key], result)
    assert second.records[key].shape == (5, 6)
    assert F.gelu is gelu


def test_a_function_that_cannot_be_wrapped_is_named_and_the_others_put_back(
    model: Body, x: Tensor
) -> None:
    gelu = F.gelu
    records = [Record(function="torch.nn.functional:gelu"), Record(function="builtins:str.upper")]
    taps = [tap for record in records for tap in find_taps(record, model, who="student")]
    recorder = Recorder(model, taps)
    with pytest.raises(ModelError, match=r"builtins:str\.upper: it cannot be replaced"):
        model(x)
    assert F.gelu is gelu
    recorder.close()
    assert model(x).shape == (5, 3)


def test_class_methods_and_methods_can_be_recorded(model: Body, x: Tensor) -> None:
    model.head = Scaling()
    (scaled,) = recorded(model, Record(function=f"{__name__}:Scaling.scaled"), x)
    (made,) = recorded(model, Record(function=f"{__name__}:Scaling.made"), x)
    logits = model(x)
    assert torch.equal(scaled, logits)
    assert torch.equal(made, torch.full((3,), 2.0))


def test_an_inherited_method_is_not_left_on_the_subclass(x: Tensor) -> None:
    class Child(Head):
        pass

    globals()["Child"] = Child
    model = Body()
    model.head = Child()
    try:
        (found,) = recorded(model, Record(function=f"{__name__}:Child.rescaled"), x)
        assert found.shape == (5, 3)
        assert "rescaled" not in vars(Child)
    finally:
        del globals()["Child"]


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ("layer4", ["no layer 'layer4'", "'layer3'"]),
        ("layers*", ["no layer 'layers*'", "'layer3'"]),
        (Record(parameter="head.fc.wieght"), ["no parameter", "'head.fc.weight'"]),
        (Record(function="torch.nn.functional:gelo"), ["'gelo'", "'gelu'"]),
        (Record(function="torch.nn.funktional:gelu"), ["no module"]),
        (Record(function="torch:float32"), ["cannot be called"]),
    ],
)
def test_names_that_do_not_exist_are_answered_with_the_nearest(
    record: Any, parts: list[str], model: Body
) -> None:
    with pytest.raises(UnknownNameError) as caught:
        find_taps(record, model, who="student")
    assert str(caught.value).startswith("student: ")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"module": "a", "parameter": "b"},
        {"function": "gelu"},
        {"parameter": "a", "part": "input"},
        {"parameter": "a", "call": 1},
        {"modul": "a"},
        {"module": "a", "index": -1},
    ],
)
def test_records_that_make_no_sense_are_refused(record: Any) -> None:
    with pytest.raises(ValidationError):
        Record.model_validate(record)


def test_an_entry_that_is_not_there_is_named(model: Body, x: Tensor) -> None:
    with pytest.raises(ModelError, match=r"head\[7\]|head.*7"):
        recorded(model, Record(module="head", index=7), x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        with torch.no_grad():
            self.bn.running_mean.uniform_(-1, 1)
            self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(
    "tap",
    [
        Tap("module", "bn", "input"),
        Tap("parameter", "conv.weight"),
        Tap("parameter", "bn.weight"),
        Tap("function", "torch.nn.functional:batch_norm"),
        Tap("module", "conv"),
    ],
    ids=lambda tap: tap.key,
)
def test_folding_the_teachers_batch_norm_changes_no_record(tap: Tap) -> None:
    model = Normed().eval()
    with torch.no_grad():
        model.bn.weight.uniform_(0.5, 2)
    images = torch.randn(4, 3, 6, 6)
    convolved = model.conv(images)
    expected = {
        "module": convolved,
        "function": model.bn(convolved),
        "parameter": dict(model.named_parameters()).get(tap.name),
    }[tap.kind]
    records = FrozenTeacher(model, [tap], precision="fp32")(as_inputs(images))
    assert expected is not None
    assert torch.allclose(records[tap.key], expected, atol=1e-5)
    assert not records[tap.key].requires_grad
    assert not math.isnan(records[tap.key].sum().item())
