"""A quantized network stays the planned one, whatever calls its forward makes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import slimkit as sk
from slimkit.errors import AddressError, SlimkitError
from slimkit.plan import Plan
from slimkit.quantize import QuantizedModel, ptq, qat


class CachedGrid(nn.Module):
    """A head as in YOLO: its first forward for a shape makes a ``cat`` more than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.out = nn.Conv1d(8, 2, 1)
        self.shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:
            self.shape, n = x.shape, x.shape[2] * x.shape[3]
            self.grid = torch.cat([torch.arange(float(n))[None], torch.ones(1, n)])
        box = self.out(torch.cat([self.a(x).flatten(2), self.b(x).flatten(2)], 1))
        return torch.cat([(box + self.grid) * 8, box.sigmoid()], 1)


def detector() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), CachedGrid()).eval()


def decibels(exact: Tensor, found: Tensor) -> float:
    return float(10 * (exact.square().sum() / (exact - found).square().sum()).log10())


@pytest.mark.parametrize("batches", [[4], [1, 1, 1, 1]])
@pytest.mark.parametrize("filled", [False, True])
def test_a_cached_grid_does_not_move_quantizers(batches: list[int], filled: bool) -> None:
    net, x = detector(), torch.randn(1, 3, 8, 8)
    if filled:
        net(x)
    q = ptq(net, x, calibration=[torch.randn(n, 3, 8, 8) for n in batches])
    for _ in range(2):
        exact, found = net(x).detach(), q(x).detach()
        assert decibels(exact[:, :2], found[:, :2]) > 35
        assert decibels(exact[:, 2:], found[:, 2:]) > 30


@pytest.mark.parametrize(
    "method", ["equalize", "bias_correction", "adaround", "gptq", "reconstruct", "bias_tuning"]
)
def test_methods_on_a_cached_grid(method: str) -> None:
    net, x = detector(), torch.randn(1, 3, 8, 8)
    net(x)
    q = ptq(net, x, calibration=[torch.randn(4, 3, 8, 8)] * 2, methods=[method])
    exact, found = net(x).detach(), q(x).detach()
    assert decibels(exact[:, :2], found[:, :2]) > 35
    assert decibels(exact[:, 2:], found[:, 2:]) > 30


def test_smoothing_behind_a_cached_mask() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.kept: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] not in self.kept:  # linear#0 of the model is a call on constants
                eye = torch.eye(x.shape[1])
                self.kept[x.shape[1]] = F.linear(eye, eye).softmax(-1)
            x = self.kept[x.shape[1]] @ x
            return x + F.linear(F.relu(self.up(self.norm(x))), self.down.weight)

    net, x = Attention().eval(), torch.randn(2, 6, 8)
    with torch.no_grad():
        net.norm.weight[3] = 40.0
    net(x)
    q = ptq(net, x, calibration=[x, torch.randn(2, 6, 8)], methods=["smoothquant"])
    assert decibels(net(x).detach(), q(x).detach()) > 25


def test_a_cached_grid_is_exported_as_the_network_computes(tmp_path: Path) -> None:
    net, x = detector(), torch.randn(1, 3, 8, 8)
    net(x)
    q = ptq(net, x, calibration=[torch.randn(1, 3, 8, 8) for _ in range(4)])
    sk.export(q, tmp_path / "head.onnx", x)
    y = ort.InferenceSession(tmp_path / "head.onnx").run(None, {"input": x.numpy()})[0]
    assert float((torch.from_numpy(y) - q(x)).abs().max()) < 0.1  # of 500; a step is 2


class InTraining(nn.Module):
    """``extra`` is what it does in training beside the rest."""

    extra: ClassVar[Callable[[Tensor], Tensor] | None] = None

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 8), (8, 8), (8, 8), (8, 4))
        self.a, self.b, self.c, self.o = (nn.Conv2d(i, o, 3, padding=1) for i, o in widths)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.extra is not None:
            x = type(self).extra(x)
        y = F.relu(self.a(x))
        y = y + self.b(y)
        y = F.relu(y) + self.c(y) * 40
        return self.o(y)


def noise(x: Tensor) -> Tensor:
    return x + 0 * torch.randn_like(x)


def mixup(x: Tensor) -> Tensor:
    return 1.0 * x + 0.0 * x.flip(0)


def auxiliary(x: Tensor) -> Tensor:
    F.relu(x + x).mean()
    return x


@pytest.mark.parametrize("extra", [noise, mixup, auxiliary])
def test_what_training_does_beside_moves_no_quantizer(extra, monkeypatch) -> None:
    net, x = InTraining(), torch.randn(8, 3, 8, 8)
    q = qat(net, x, calibration=[x]).train()
    plain = copy.deepcopy(q)(x)
    monkeypatch.setattr(InTraining, "extra", extra)
    assert torch.equal(copy.deepcopy(q)(x), plain)


class Checkpointed(nn.Module):
    way: ClassVar[Callable[..., Tensor] | None] = None

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.a, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.b = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        way = type(self).way
        for _ in range(self.times):
            y = self.b(y) if way is None else way(self.b, y)
        return self.o(y)


def gradients(model: nn.Module, x: Tensor, forwards: int) -> dict[str, Tensor]:
    sum(model(part).pow(2).mean() for part in x.chunk(forwards)).backward()
    buffers = dict(model.named_buffers())
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | buffers


@pytest.mark.parametrize(("observing", "forwards"), [(False, 2), (True, 1)])
@pytest.mark.parametrize(
    ("way", "times"),
    [
        (lambda m, y: checkpoint(m, y, use_reentrant=True), 2),
        (lambda m, y: checkpoint(m, y, use_reentrant=False), 2),
        (lambda m, y: checkpoint_sequential(m, 2, y, use_reentrant=True), 1),
        (lambda m, y: checkpoint_sequential(m, 2, y, use_reentrant=False), 1),
    ],
    ids=["reentrant", "not reentrant", "sequential reentrant", "sequential"],
)
def test_gradients_and_ranges_under_checkpointing_are_those_without(
    way, times, observing, forwards, monkeypatch
) -> None:
    net, x = Checkpointed(times), torch.randn(4, 3, 8, 8)
    q = qat(net, x, calibration=[x], weight_bits=4).train()
    if observing:
        q.observe_for(5)
    expected = gradients(copy.deepcopy(q), x, forwards)
    monkeypatch.setattr(Checkpointed, "way", way)
    found = gradients(copy.deepcopy(q), x, forwards)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_closure_is_refused(reentrant: bool, monkeypatch) -> None:
    class Closure(nn.Module):
        checkpointing = False

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def tail(self, y: Tensor) -> Tensor:
            return F.relu(y + y)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.checkpointing:
                return self.b(checkpoint(self.tail, y, use_reentrant=reentrant))
            return self.b(self.tail(y))

    x = torch.randn(2, 3, 4, 4)
    q = qat(Closure(), x, calibration=[x]).train()
    monkeypatch.setattr(Closure, "checkpointing", True)
    with pytest.raises(AddressError, match="checkpoint a module"):
        q(x)


def test_a_forward_that_cannot_be_aligned_names_the_call() -> None:
    class Loop(nn.Module):
        times = 1

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.conv(x)
            return x

    x = torch.randn(2, 3, 4, 4)
    q = ptq(Loop(), x, calibration=[x])
    q.model.times = 2
    with pytest.raises(AddressError) as error:
        q(x)
    assert error.value.where == "conv:conv2d#0"
    assert isinstance(error.value, SlimkitError)
    q.model.times = 1
    q(x)


class Exits(nn.Module):
    early = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return x if self.early else F.relu(self.b(x))


def test_an_early_exit_runs_but_is_not_exported(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    q = ptq(Exits(), x, calibration=[x])
    sk.export(q, tmp_path / "all.onnx", x)
    q.model.early = True
    assert q(x).shape == (2, 4, 6, 6)
    with pytest.raises(SlimkitError, match=r"relu#1|b:conv2d#0"):
        sk.export(q, tmp_path / "early.onnx", x)
    assert not (tmp_path / "early.onnx").exists()


def test_a_plan_of_an_older_version_counts_calls(tmp_path: Path) -> None:
    net, x = Exits(), torch.randn(2, 3, 8, 8)
    q = ptq(net, x, calibration=[x])
    plan = q.plan
    data = plan.to_json()
    assert type(plan).from_json(data, {}).table == plan.table
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    del data["table"]
    old = sk.apply(copy.deepcopy(net), type(plan).from_json(data, {}))
    assert isinstance(old, QuantizedModel)
    assert old.plan.table is None
    old.load_state_dict(q.state_dict())
    assert torch.equal(old.eval()(x), q.eval()(x))
    sk.export(old, tmp_path / "old.onnx", x)


class Small(nn.Module):
    """One module that runs twice, an inner sum, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.twice(F.relu(self.twice(x)))
        return self.head(x.mean((2, 3)))


def in_threads(count: int, run: Callable[[Tensor], Tensor], images: list[Tensor]) -> list[Tensor]:
    together = threading.Barrier(count)

    def part(first: int) -> list[Tensor]:
        together.wait()
        return [run(image) for image in images[first::count]]

    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(part, range(count)))
    return [parts[i % count][i // count] for i in range(len(images))]


def test_six_threads_in_one_quantized_network_equal_one() -> None:
    x = torch.randn(2, 1, 6, 6)
    q = ptq(Small(), x, calibration=[x]).eval()
    run = torch.no_grad()(q)
    images = [torch.randn(1, 1, 6, 6) for _ in range(100)]
    expected = [run(image) for image in images]
    found = in_threads(6, run, images * 10)
    assert len(found) == 1000
    assert all(map(torch.equal, found, expected * 10))


def test_threads_with_a_quantized_a_training_and_the_float_network_at_once() -> None:
    x = torch.randn(2, 1, 6, 6)
    net = Small().eval()
    q = ptq(net, x, calibration=[x])
    trained = qat(net, x, calibration=[x]).train()
    trained.freeze_observers()
    images = [torch.randn(1, 1, 6, 6) for _ in range(60)]

    def run(image: Tensor) -> Tensor:
        exact, rounded, loss = net(image), q.eval()(image), trained(image)
        return torch.cat([exact, rounded, loss]).detach()

    expected = [run(image) for image in images]
    found = in_threads(4, run, images)
    assert all(map(torch.equal, found, expected))


def test_a_tensor_that_was_changed_in_place_keeps_its_calls() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.a(x), self.b(x)
            F.relu_(y)  # its result is not used
            y[:, :2] = z[:, 2:]
            return z.sigmoid() * (y + z) + y

    x = torch.randn(4, 3, 4, 4)
    net = InPlace().eval()
    q = ptq(net, x, calibration=[x])
    assert decibels(net(x).detach(), q(x).detach()) > 30
    assert torch.isfinite(q.train()(x)).all()


class Stacking(nn.Module):
    """A detector's way: images of any number and size, prepared one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        prepared = [F.pad(x / 2, (0, 8 - x.shape[2], 0, 8 - x.shape[1])) for x in images]
        return self.conv(torch.stack(prepared)).relu()


def test_a_list_may_hold_more_examples_than_at_capture() -> None:
    torch.manual_seed(0)
    images = [torch.rand(3, size, size) for size in (6, 8, 7, 5)]
    quantized = sk.quantize.ptq(Stacking(), (images[:1],), calibration=[sk.Inputs((images,))])
    together = quantized(images)
    alone = torch.cat([quantized([image]) for image in images])
    torch.testing.assert_close(together, alone)
    assert not torch.equal(together, quantized.model(images))
