"""A run that was killed and started again ends like one that nobody disturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import ArtifactError, CheckpointError
from slimkit.tasks.data import ArrayLoader
from slimkit.train import Callback, History, StepContext, TrainSettings, fit

Make = Callable[[], nn.Sequential]

SETTINGS = {
    "sgd": TrainSettings(
        epochs=3, lr=0.05, precision="fp32", ema=0.9, batch_norm_reestimation=3, warmup_epochs=0.5
    ),
    "adamw": TrainSettings(
        epochs=2.5, lr=0.01, precision="bf16", optimizer="adamw", schedule="one_cycle"
    ),
}


class Kill(Callback):
    """Stop the process, as far as the loop can tell, at one step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, context: StepContext) -> None:
        if context.step == self.step:
            raise KeyboardInterrupt


class Connector(nn.Module):
    """A loss with parameters and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, context: StepContext) -> Tensor:
        self.calls += 1
        return 0.1 * (self.layer(context.outputs) - 1).square().mean() * (1 + self.calls / 100)


def run(
    make: Make, data: ArrayLoader, settings: TrainSettings, path: Path | None, kill: int | None
) -> tuple[dict[str, Tensor], History]:
    network, connector = make(), Connector()
    history = fit(
        network,
        data,
        loss_fn=F.cross_entropy,
        settings=settings,
        losses=[connector],
        callbacks=[Kill(kill)],
        evaluate=lambda m: {"norm": sum(float(p.detach().norm()) for p in m.parameters())},
        checkpoint=path,
        seed=11,
        progress=False,
    )
    state = {**network.state_dict(), **{f"c.{n}": t for n, t in connector.state_dict().items()}}
    return {name: value.clone() for name, value in state.items()}, history


def without_times(history: History) -> dict[str, Any]:
    plain = history.to_json()
    plain.pop("seconds")
    for entry in plain["epochs"]:
        entry.pop("seconds")
        entry.pop("images_per_second")
    return plain


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kill", [2, 5, 6, 13])
def test_killed_and_resumed_equals_uninterrupted(
    make_network: Make, data: ArrayLoader, tmp_path: Path, name: str, kill: int
) -> None:
    settings = SETTINGS[name]
    expected, expected_history = run(make_network, data, settings, None, None)
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(make_network, data, settings, path, kill)
    weights, history = run(make_network, data, settings, path, None)
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key
    assert without_times(history) == without_times(expected_history)


def test_a_finished_run_is_not_trained_again(
    make_network: Make, data: ArrayLoader, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    expected, first = run(make_network, data, SETTINGS["sgd"], path, None)
    weights, second = run(make_network, data, SETTINGS["sgd"], path, 0)  # would be killed at once
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert second.to_json() == first.to_json()


def test_the_chosen_precision_is_remembered(
    make_network: Make, data: ArrayLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    settings = TrainSettings(epochs=2, lr=0.05, precision="auto")
    monkeypatch.setattr(
        "slimkit.train.running.choose_precision", lambda *_: ("bf16", {"fp32": 2.0, "bf16": 1.0})
    )
    with pytest.raises(KeyboardInterrupt):
        run(make_network, data, settings, path, 8)

    def again(*_: object) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("slimkit.train.running.choose_precision", again)
    _, history = run(make_network, data, settings, path, None)
    assert history.precision == "bf16"


def test_checkpoint_of_other_settings_is_refused(
    make_network: Make, data: ArrayLoader, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    run(make_network, data, SETTINGS["sgd"], path, None)
    other = SETTINGS["sgd"].model_copy(update={"lr": 0.06})
    with pytest.raises(CheckpointError, match=r"lr differ.*delete it"):
        run(make_network, data, other, path, None)


def test_file_that_is_no_checkpoint_is_refused(
    make_network: Make, data: ArrayLoader, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"not tensors")
    with pytest.raises(ArtifactError, match="not a checkpoint"):
        run(make_network, data, SETTINGS["sgd"], path, None)


def test_unwritable_place_is_an_artifact_error_and_leaves_nothing(
    make_network: Make, data: ArrayLoader, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="write"):
        run(make_network, data, SETTINGS["sgd"], tmp_path / "file" / "run.safetensors", None)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_seeds_differ(make_network: Make, data: ArrayLoader) -> None:
    settings = SETTINGS["sgd"]
    networks = [make_network(), make_network(), make_network()]
    for network, seed in zip(networks, (0, 1, 0), strict=True):
        fit(network, data, loss_fn=F.cross_entropy, settings=settings, seed=seed, progress=False)
    weights = [network[0].weight for network in networks]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
