"""Trial steps of ``precision="auto"`` leave nothing behind."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict, deque
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.inputs import Batch
from slimkit.train import Callback, StepContext, TrainSettings, fit
from slimkit.train.snapshot import undone

CPU = torch.device("cpu")
AUTO = TrainSettings(epochs=1, lr=0.05, precision="auto")


class Counter:
    """A plain object with state."""

    def __init__(self) -> None:
        self.calls, self.seen, self.total = 0, [[0]], torch.zeros(2)

    def tick(self, *_: Any) -> None:
        self.calls += 1
        self.seen[0].append(self.calls)


class Stateful(nn.Module):
    """Changes everything that a module can change in a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("late", None)
        self.ready, self.steps = False, 0
        self.history: list[float] = []
        self.named: OrderedDict[str, Any] = OrderedDict(a=[1])
        self.recent: deque[int] = deque([1, 2], maxlen=2)
        self.kinds = {1}
        self.own, self.draws = Counter(), random.Random(3)
        self.generator = torch.Generator().manual_seed(1)
        self.numbers, self.array = np.random.default_rng(1), np.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        if not self.ready:  # as LSQ initialises its scales
            self.scale.data.fill_(float(x.abs().mean()))
            self.ready = True
        self.range.add_(1)
        self.late = x.mean().detach()
        self.history.append(1.0)
        self.named["a"].append(2)
        self.named.move_to_end("a")
        self.named["b"] = x
        self.recent.append(3)
        self.kinds.add(self.steps)
        self.own.tick()
        self.own.total += 1
        self.draws.random()
        torch.rand(1, generator=self.generator)
        self.numbers.random()
        self.array += 1
        random.random()
        np.random.rand()  # noqa: NPY002
        noise = torch.rand(())
        return self.norm(self.layer(x)) * self.scale + noise


def state_of(model: Stateful) -> dict[str, Any]:
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "plain": (model.ready, model.steps, list(model.history), str(dict(model.named))),
        "more": (list(model.recent), set(model.kinds), model.late, model.training),
        "own": (model.own.calls, str(model.own.seen), model.own.total.tolist()),
        "array": model.array.tolist(),
        "random": (
            model.draws.getstate(),
            model.generator.get_state().tolist(),
            model.numbers.bit_generator.state,
            random.getstate(),
            str(np.random.get_state()),  # noqa: NPY002
            torch.get_rng_state().tolist(),
        ),
    }


def equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    tensors, others = one.pop("tensors"), other.pop("tensors")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert one == other


def test_everything_a_module_can_change_is_put_back_in_place() -> None:
    model = Stateful().train()
    model.scale.grad = held = torch.full((1,), 7.0)
    before, history, own = state_of(model), model.history, model.own
    parameters = dict(model.named_parameters())
    with undone([model], CPU):
        for _ in range(3):
            model(torch.randn(4, 6)).sum().backward()
        model.scale = nn.Parameter(torch.zeros(2))  # another object
        model.eval()
    equal(state_of(model), before)
    assert model.history is history
    assert model.own is own
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.scale.grad is held
    assert held.item() == 7.0
    assert model.layer.weight.grad is None


def test_it_is_put_back_after_an_exception_too() -> None:
    model = Stateful().train()
    before = state_of(model)
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), undone([model], CPU):
        model(torch.randn(4, 6))
    equal(state_of(model), before)


def test_who_listens_by_a_hook_is_put_back_too() -> None:
    model, plain, bound = Stateful().train(), Counter(), Counter()
    model.register_forward_hook(plain.tick)
    model.layer.register_forward_hook(partial(bound.tick, "layer"))
    with undone([model], CPU):
        model(torch.randn(4, 6))
    assert (plain.calls, bound.calls) == (0, 0)


@pytest.mark.parametrize("kind", ["expanded", "sparse", "scripted", "meta"])
def test_unusual_tensors_are_no_obstacle(kind: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).train()
    if kind == "expanded":
        model.register_buffer("ones", torch.ones(1).expand(5))
    elif kind == "sparse":
        model.register_buffer("few", torch.eye(3).to_sparse())
    elif kind == "meta":
        model.register_buffer("shape", torch.empty(3, device="meta"))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that scripting is no longer developed
            model = torch.jit.script(model)
    before = {name: t.clone() for name, t in model.state_dict().items() if not t.is_meta}
    with undone([model], CPU):
        model(torch.randn(4, 6)).sum().backward()
    after = model.state_dict()
    assert all(torch.equal(after[n].to_dense(), t.to_dense()) for n, t in before.items())


def numbers() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(4)]


class Told(Callback):
    """What callbacks hear, and a loader that counts how often it is asked."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.asked = 0

    def on_step_begin(self, context: StepContext) -> None:
        self.steps.append(context.step)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        for batch in numbers():
            self.asked += 1
            yield batch


@pytest.mark.parametrize("kind", ["loss_fn", "batch_loss", "step"])
def test_a_run_that_chose_its_precision_equals_one_that_was_told(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("slimkit.train.precision.multiplies_bf16", lambda device: True)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def outputs(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return F.cross_entropy(outputs, targets) * (1 + self.seen / 10)

        def inside(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            outputs = batch.inputs.call(model)
            return self.outputs(outputs, batch.targets), outputs

        def step(self, tools: Any, batch: Batch) -> None:
            tools.backward(self.outputs(tools.forward(batch), batch.targets))

    def run(settings: TrainSettings) -> tuple[Stateful, Loss, Told, Any]:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)
        model, loss, told = Stateful(), Loss(), Told()
        given: dict[str, Any] = {
            kind: {"loss_fn": loss.outputs, "batch_loss": loss.inside}.get(kind, loss.step)
        }
        history = fit(
            model, told, settings=settings, callbacks=[told], progress=False, seed=4, **given
        )
        return model, loss, told, history

    model, loss, told, history = run(AUTO)
    assert set(history.precision_ms) == {"fp32", "bf16"}
    other = run(AUTO.model_copy(update={"precision": history.precision}))
    equal(state_of(model), state_of(other[0]))
    assert loss.calls == other[1].calls == 4
    assert loss.seen == other[1].seen
    assert (told.steps, told.asked) == ([0, 1, 2, 3], 4)
    assert history.epochs[0]["loss"] == other[3].epochs[0]["loss"]


def test_outputs_without_gradients_are_trained_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimkit.train.precision.multiplies_bf16", lambda device: True)

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).detach()

    def step(tools: Any, batch: Batch) -> None:
        tools.backward(F.cross_entropy(tools.model.layer(*batch.inputs.args), batch.targets))

    history = fit(Silent(), numbers(), step=step, settings=AUTO, progress=False)
    assert (history.precision, history.precision_ms) == ("fp32", {})
