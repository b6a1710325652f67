"""An evaluation that is NaN or infinite ends a training with what and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from slimkit.errors import TrainingError
from slimkit.train import TrainSettings, fit

BATCHES = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_the_error_says_which_metric_and_when_and_the_last_checkpoint_stays(
    value: float, tmp_path: Path
) -> None:
    checkpoint, contents = tmp_path / "run.safetensors", []

    def evaluate(_: nn.Module) -> dict[str, float]:
        contents.append(checkpoint.read_bytes() if checkpoint.exists() else b"")
        return {"accuracy": 50.0, "loss": 1.0 if len(contents) < 3 else value}

    settings = TrainSettings(epochs=5, lr=0.1, precision="fp32")
    with pytest.raises(TrainingError, match=rf"after epoch 3 is not finite: loss is {value:g}"):
        fit(
            nn.Linear(4, 2),
            BATCHES,
            loss_fn=nn.functional.cross_entropy,
            settings=settings,
            evaluate=evaluate,
            checkpoint=checkpoint,
            progress=False,
        )
    assert checkpoint.read_bytes() == contents[2]


def test_after_batch_norm_was_measured_anew_it_is_looked_at_too() -> None:
    scores = iter([1.0, float("nan")])
    settings = TrainSettings(epochs=1, batch_norm_reestimation=1, precision="fp32")
    with pytest.raises(TrainingError, match="batch norm was measured anew is not finite: score"):
        fit(
            nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)),
            BATCHES,
            loss_fn=nn.functional.cross_entropy,
            settings=settings,
            evaluate=lambda _: {"score": next(scores)},
            progress=False,
        )
