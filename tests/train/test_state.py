"""What callbacks, losses and modules keep is in the checkpoint, or an error names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import CheckpointError
from slimkit.tasks.data import ArrayLoader
from slimkit.train import Callback, StepContext, TrainSettings, fit

Make = Callable[[], nn.Sequential]

SETTINGS = TrainSettings(epochs=3, lr=0.05, precision="fp32")


class Counting(Callback):
    """Steps, a history, a tensor: by them the next step is changed."""

    def __init__(self, kill: int | None = None) -> None:
        self.kill, self.steps, self.best = kill, 0, float("inf")
        self.table: dict[str, Any] = {"seen": [], "note": None, "on": True}
        self.mean = torch.zeros(4)

    def on_update(self, context: StepContext) -> None:
        if context.step == self.kill:
            raise KeyboardInterrupt
        self.steps += 1
        self.mean += context.outputs.detach().mean(0)
        self.best = min(self.best, float(self.mean.sum()))
        self.table["seen"].append(context.step)
        with torch.no_grad():
            context.model[7].bias.add_(self.mean, alpha=0.01 / self.steps)

    def state_dict(self) -> dict[str, Any]:
        own = {"steps": self.steps, "best": self.best, "table": self.table}
        return {**own, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.best, self.table = state["steps"], state["best"], state["table"]
        self.mean.copy_(state["mean"])


class Remembering:
    """A loss that keeps how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets) * (1 + self.calls / 50)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class Noted(nn.Conv2d):
    """A layer whose extra state is a plain value."""

    def __init__(self) -> None:
        super().__init__(1, 8, 3, padding=1, bias=False)
        self.note: Any = {"seen": 0}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.note = {"seen": self.note["seen"] + 1}
        return super().forward(x) * (1 + self.note["seen"] / 100)

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def run(make: Make, data: Any, path: Path | None, kill: int | None = None) -> dict[str, Any]:
    network, counting, loss = make(), Counting(kill), Remembering()
    noted = Noted()
    network[0] = noted
    torch.manual_seed(0)
    nn.init.normal_(noted.weight)
    fit(
        network, data, loss_fn=loss, settings=SETTINGS, callbacks=[counting], checkpoint=path,
        progress=False,
    )  # fmt: skip
    plain = {"steps": counting.steps, "best": counting.best, "table": counting.table}
    tensors = {n: t.clone() for n, t in network.state_dict().items() if isinstance(t, Tensor)}
    return {**plain, "calls": loss.calls, "note": noted.note, "mean": counting.mean, **tensors}


@pytest.mark.parametrize("kill", [3, 6, 8, 17])
def test_counters_of_a_killed_run_are_those_of_an_uninterrupted_one(
    make_network: Make, data: ArrayLoader, tmp_path: Path, kill: int
) -> None:
    expected = run(make_network, data, None)
    with pytest.raises(KeyboardInterrupt):
        run(make_network, data, tmp_path / "run.safetensors", kill)
    found = run(make_network, data, tmp_path / "run.safetensors")
    assert found["steps"] == found["calls"] == found["note"]["seen"] == 18
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if isinstance(value, Tensor) else None
        assert value == found[name] if same is None else same, name


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "a set"),
        ((1, 2), "a tuple"),
        (np.zeros(2), "a ndarray"),
        ([torch.zeros(2)], "a list that holds a Tensor"),
        ({3: "x"}, "a dict with the key 3"),
        ({"a": object()}, "a dict that holds a object"),
    ],
)
def test_a_state_that_would_be_lost_is_refused_before_the_run(
    network: nn.Sequential, data: ArrayLoader, tmp_path: Path, value: Any, named: str
) -> None:
    class Odd(Callback):
        steps = 0

        def on_update(self, context: StepContext) -> None:
            self.steps += 1

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.steps, "kept": value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    odd, path = Odd(), tmp_path / "run.safetensors"
    with pytest.raises(CheckpointError, match=rf"Odd: 'kept' in its state is {named}"):
        fit(
            network, data, loss_fn=F.cross_entropy, settings=SETTINGS, callbacks=[odd],
            checkpoint=path, progress=False,
        )  # fmt: skip
    assert odd.steps == 0
    assert not list(tmp_path.iterdir())
    fit(
        network, data, loss_fn=F.cross_entropy, settings=SETTINGS, callbacks=[odd], progress=False
    )  # without a checkpoint there is nothing to lose


def test_a_state_that_nobody_takes_back_is_refused(
    network: nn.Sequential, data: ArrayLoader, tmp_path: Path
) -> None:
    class Forgetful(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"steps": 1}

    with pytest.raises(CheckpointError, match=r"Forgetful: .*load_state_dict"):
        fit(
            network, data, loss_fn=F.cross_entropy, settings=SETTINGS, callbacks=[Forgetful()],
            checkpoint=tmp_path / "run.safetensors", progress=False,
        )  # fmt: skip


def test_an_extra_state_of_a_module_that_is_no_json_is_refused(
    network: nn.Sequential, data: ArrayLoader, tmp_path: Path
) -> None:
    network[0] = Noted()
    network[0].note = {"seen": 0, "kept": {1, 2}}
    with pytest.raises(CheckpointError, match=r"Sequential: '0\._extra_state' .* holds a set"):
        fit(
            network, data, loss_fn=F.cross_entropy, settings=SETTINGS,
            checkpoint=tmp_path / "run.safetensors", progress=False,
        )  # fmt: skip


def test_states_go_to_whom_they_belong(
    make_network: Make, data: ArrayLoader, tmp_path: Path
) -> None:
    class Other(Callback):
        pass

    path = tmp_path / "run.safetensors"
    given: dict[str, Any] = {
        "loss_fn": F.cross_entropy, "settings": SETTINGS, "checkpoint": path, "progress": False
    }  # fmt: skip
    fit(make_network(), data, callbacks=[Counting(), Other()], **given)
    with pytest.raises(CheckpointError, match="the state of Counting, where this one has Other"):
        fit(make_network(), data, callbacks=[Other(), Counting()], **given)


def test_versions_of_modules_are_told_when_a_run_goes_on(
    make_network: Make, data: ArrayLoader, tmp_path: Path
) -> None:
    class Versioned(nn.Conv2d):
        """As in torchvision's MNASNet: what is of no version is taken for the old layout."""

        _version = 2

        def _load_from_state_dict(self, *args: Any) -> None:
            if args[2].get("version") != 2:
                raise ValueError("no version")
            super()._load_from_state_dict(*args)

    def again(kill: int | None) -> nn.Module:
        network = make_network()
        network[0] = Versioned(1, 8, 3, padding=1, bias=False)
        fit(
            network, data, loss_fn=F.cross_entropy, settings=SETTINGS, callbacks=[Counting(kill)],
            checkpoint=tmp_path / "run.safetensors", progress=False,
        )  # fmt: skip
        return network

    with pytest.raises(KeyboardInterrupt):
        again(8)
    assert again(None) is not None
