"""The distiller on small networks."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.distill import DIST, KD, Distiller, Mimic
from slimkit.errors import InputError, ModelError, SlimkitError, UnknownNameError
from slimkit.losses import kd, mimic


class Net(nn.Module):
    """Convolution, batch norm, in-place ReLU, pooling, head."""

    def __init__(self, width: int = 8, classes: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=stride, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.bn(self.conv(images))).mean((2, 3)))


def warmed(net: Net) -> Net:
    """With batch-norm statistics that differ from the initial ones."""
    with torch.no_grad():
        net.bn.running_mean.uniform_(-1, 1)
        net.bn.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_weighted_sum_of_the_formulas(images: Tensor) -> None:
    student, teacher = Net(), warmed(Net(16)).eval()
    losses = [KD(temperature=2, weight=0.5), DIST(weight=2)]
    with Distiller(student, teacher, losses, precision="fp32") as distiller:
        outputs = student(images)
        total = distiller.loss(images, outputs)
    expected = 0.5 * kd(outputs, teacher(images), 2)
    assert close(distiller.last["kd"], expected)
    assert close(sum(distiller.last.values(), torch.tensor(0.0)), total)
    assert set(distiller.last) == {"kd", "dist"}


def test_outputs_are_recorded_when_not_given(images: Tensor) -> None:
    student, teacher = Net(), Net(16)
    with Distiller(student, teacher, [KD()], precision="fp32") as distiller:
        outputs = student(images)
        recorded = distiller.loss(images)
        student(images)
        given = distiller.loss(images, outputs)
    assert close(recorded, given)


def test_it_plugs_into_a_step_of_the_training_loop(images: Tensor) -> None:
    student, teacher = Net(), Net(16)
    with Distiller(student, teacher, [KD()], precision="fp32") as distiller:
        outputs = student(images)
        context: Any = SimpleNamespace(inputs=images, outputs=outputs)
        value = distiller(context)
    value.backward()
    assert student.conv.weight.grad is not None


def test_a_teacher_in_train_mode_is_left_alone(images: Tensor) -> None:
    student, teacher = Net(), warmed(Net(16)).train()
    before = copy.deepcopy(teacher.state_dict())
    reference = copy.deepcopy(teacher).eval()
    with Distiller(student, teacher, [KD(temperature=1)], precision="fp32") as distiller:
        outputs = student(images)
        loss = distiller.loss(images, outputs)
    loss.backward()
    assert close(loss, kd(outputs, reference(images), 1))
    assert teacher.training
    assert teacher.conv.weight.requires_grad
    assert teacher.conv.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("layer", ["conv", "bn", "relu"])
def test_records_are_what_the_layer_put_out(layer: str, images: Tensor) -> None:
    """Although an in-place ReLU follows the batch norm and the teacher's is folded."""
    student, teacher = warmed(Net()), warmed(Net())

    def feature(net: Net) -> Tensor:
        convolved = net.conv(images)
        normed = F.batch_norm(
            convolved, net.bn.running_mean, net.bn.running_var, net.bn.weight, net.bn.bias
        )
        return {"conv": convolved, "bn": normed, "relu": normed.relu()}[layer]

    student.eval()
    losses = [Mimic(student=layer, connector="none")]
    with Distiller(student, teacher, losses, precision="fp32") as distiller:
        student(images)
        loss = distiller.loss(images)
        assert close(loss, mimic(feature(student), feature(teacher)))
        loss.backward()
    assert student.conv.weight.grad is not None


def test_a_connector_joins_other_widths_and_sizes(images: Tensor) -> None:
    student, teacher = Net(4), Net(16, stride=2)
    losses = [KD(), Mimic(student="relu", weight=3)]
    with Distiller(student, teacher, losses, example_inputs=images[:2]) as distiller:
        parameters = list(distiller.parameters())
        assert [tuple(p.shape) for p in parameters] == [(16, 4, 1, 1), (16,)]
        optimizer = torch.optim.SGD([*student.parameters(), *parameters], lr=0.1)
        values = []
        for _ in range(30):
            optimizer.zero_grad()
            student(images)
            distiller.loss(images).backward()
            optimizer.step()
            values.append({name: value.item() for name, value in distiller.last.items()})
    assert set(values[0]) == {"kd", "mimic:relu"}
    assert values[-1]["kd"] < values[0]["kd"]
    assert values[-1]["mimic:relu"] < 0.7 * values[0]["mimic:relu"]


def test_connectors_are_only_where_they_are_needed(images: Tensor) -> None:
    for connector, count in (("auto", 0), ("conv1x1", 2), ("none", 0)):
        losses = [{"type": "mimic", "student": "relu", "connector": connector}]
        with Distiller(Net(), Net(), losses, example_inputs=images[:2]) as distiller:
            assert len(list(distiller.parameters())) == count


def test_connectors_start_equal_and_leave_the_random_state_alone(images: Tensor) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        student, teacher = Net(4), Net(16)
        before = torch.get_rng_state()
        with Distiller(
            student, teacher, [Mimic(student="relu")], example_inputs=images[:2]
        ) as distiller:
            states.append(distiller.state_dict())
        assert torch.equal(before, torch.get_rng_state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_probe_leaves_the_student_as_it_was(images: Tensor) -> None:
    student = Net().train()
    student.bn.eval()
    before = copy.deepcopy(student.state_dict())
    with Distiller(student, Net(), [Mimic(student="bn")], example_inputs=images):
        pass
    assert student.training
    assert not student.bn.training
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert not student._forward_hooks
    assert not student.bn._forward_hooks


def test_copies_of_the_student_are_not_recorded(images: Tensor) -> None:
    """An EMA copy that is evaluated between forward and loss must not replace the record."""
    student, teacher = Net(), Net()
    with Distiller(student, teacher, [KD()], precision="fp32") as distiller:
        average = copy.deepcopy(student)
        outputs = student(images)
        average(images[:3] * 0)
        assert close(distiller.loss(images), kd(outputs, teacher.eval()(images), 4))


def test_a_closed_distiller_frees_the_student(images: Tensor) -> None:
    student = Net()
    distiller = Distiller(student, Net(), [KD()])
    student(images)
    distiller.loss(images)
    distiller.close()
    gone = weakref.ref(distiller)
    del distiller
    gc.collect()
    assert gone() is None
    assert not student._forward_hooks


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "autocast"])
def test_every_precision_of_the_teacher_gives_nearly_the_same_loss(
    precision: Any, images: Tensor
) -> None:
    student, teacher = Net(), warmed(Net(32))
    with Distiller(student, teacher, [KD(), Mimic(student="relu")], precision=precision,
                   example_inputs=images[:2]) as distiller:  # fmt: skip
        outputs = student(images)
        loss = distiller.loss(images, outputs)
        assert loss.dtype == torch.float32
        assert distiller.precision in {"fp32", "bf16", "autocast"}
        if precision != "auto":
            assert distiller.precision == precision
    assert distiller.last["kd"].item() == pytest.approx(
        kd(outputs, teacher.eval()(images), 4).item(), rel=0.05, abs=0.01
    )


def test_the_student_may_train_under_autocast(images: Tensor) -> None:
    student, teacher = Net(4), Net(16)
    losses = [KD(), Mimic(student="relu")]
    with Distiller(student, teacher, losses, example_inputs=images[:2]) as distiller:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = student(images)
            loss = distiller.loss(images, outputs)
        loss.backward()
    assert loss.dtype == torch.float32
    assert student.conv.weight.grad is not None


def test_the_student_may_be_a_bf16_network(images: Tensor) -> None:
    student, teacher = Net(4).bfloat16(), Net(16)
    losses = [KD(), Mimic(student="relu")]
    batch = images.bfloat16()
    with Distiller(
        student, teacher, losses, example_inputs=batch[:2], precision="fp32"
    ) as distiller:
        outputs = student(batch)
        loss = distiller.loss(batch, outputs)
        loss.backward()
    assert close(distiller.last["kd"], kd(outputs, teacher.eval()(batch.float()), 4))
    assert student.conv.weight.grad is not None


def test_outputs_may_be_wrapped_in_a_mapping(images: Tensor) -> None:
    class Wrapped(Net):
        def forward(self, pixel_values: Tensor) -> Any:
            return {"loss": None, "logits": super().forward(pixel_values)}

    student, teacher = Wrapped(), Wrapped(16)
    with Distiller(student, teacher, [KD()], precision="fp32") as distiller:
        outputs = student(images)
        loss = distiller.loss({"pixel_values": images}, outputs)
    assert close(loss, kd(outputs["logits"], teacher.eval()(images)["logits"], 4))


def test_a_teacher_that_cannot_be_followed_is_run_as_it_is(images: Tensor) -> None:
    class Numpy(Net):
        def forward(self, images: Tensor) -> Tensor:
            out = super().forward(images)
            return torch.from_numpy(out.float().numpy().copy()).to(out.dtype)

    teacher = warmed(Numpy(16)).requires_grad_(False)
    student = Net()
    with Distiller(student, teacher, [KD()], precision="fp32") as distiller:
        outputs = student(images)
        loss = distiller.loss(images, outputs)
    assert close(loss, kd(outputs, teacher.eval()(images), 4))


def test_distillation_brings_the_student_to_the_teacher(images: Tensor) -> None:
    student, teacher = Net(), warmed(Net(16)).eval()
    teacher.fc.weight.data *= 10
    with Distiller(student, teacher, [KD(temperature=2)]) as distiller:
        optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
        values = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = distiller.loss(images, student(images))
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    assert values[-1] < 0.3 * values[0]


MISTAKES: dict[str, Any] = {
    "classes": lambda x: Distiller(Net(), Net(classes=7), [KD()], example_inputs=x),
    "classes on the first batch": lambda x: Distiller(
        student := Net(), Net(classes=7), [KD()]
    ).loss(x, student(x)),
    "student layer": lambda x: Distiller(Net(), Net(), [Mimic(student="rellu")], example_inputs=x),
    "teacher layer": lambda x: Distiller(
        Net(), Net(), [Mimic(student="relu", teacher="layer")], example_inputs=x
    ),
    "type": lambda x: Distiller(Net(), Net(), [{"type": "dits"}]),
    "nothing": lambda x: Distiller(Net(), Net(), []),
    "no example inputs": lambda x: Distiller(Net(), Net(), [Mimic(student="relu")]),
    "no connector joins": lambda x: Distiller(
        Net(), Net(), [Mimic(student="relu", teacher="fc")], example_inputs=x
    ),
    "shapes without connector": lambda x: Distiller(
        Net(), Net(16), [Mimic(student="relu", connector="none")], example_inputs=x
    ),
    "precision": lambda x: Distiller(Net(), Net(), [KD()], precision=cast("Any", "bf8")),
    "precision of nobody": lambda x: Distiller(
        Net(), {"big": Net(), "wide": Net()}, [KD()], precision={"bgi": "fp32"}
    ),
    "inputs that do not fit": lambda x: Distiller(Net(), Net(), [KD()], example_inputs=x[:, :2]),
    "loss before forward": lambda x: Distiller(Net(), Net(), [KD()]).loss(x),
}


@pytest.mark.parametrize(
    ("name", "error", "parts"),
    [
        ("classes", ModelError, ["4 classes", "7"]),
        ("classes on the first batch", ModelError, ["4 classes", "7"]),
        ("student layer", UnknownNameError, ["student", "'rellu'", "'relu'"]),
        ("teacher layer", UnknownNameError, ["teacher", "'layer'"]),
        ("type", UnknownNameError, ["losses.0.type", "'dist'"]),
        ("nothing", InputError, ["losses"]),
        ("no example inputs", InputError, ["example_inputs", "mimic"]),
        ("no connector joins", ModelError, ["relu", "connector"]),
        ("shapes without connector", ModelError, ["mimic on relu"]),
        ("precision", InputError, ["precision", "'bf16'"]),
        ("precision of nobody", InputError, ["precision.bgi", "'big'"]),
        ("inputs that do not fit", ModelError, ["student", "forward fails"]),
        ("loss before forward", InputError, ["has not run"]),
    ],
)
def test_mistakes_are_typed(name: str, error: type[SlimkitError], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        MISTAKES[name](torch.randn(2, 3, 8, 8))
    for part in parts:
        assert part in str(caught.value)
