"""Loss and metrics against hand-computed numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from slimkit.errors import InputError, ModelError
from slimkit.inputs import Batch, Inputs
from slimkit.tasks import ClassificationTask
from slimkit.train import TrainSettings

TASK = ClassificationTask()


class Echo(nn.Module):
    """Returns its input as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x)


BATCHES = [
    (torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), torch.tensor([0, 1, 1])),
    (torch.tensor([[0.0, 2.0]]), torch.tensor([0])),
]


def test_accuracy_and_loss_over_uneven_batches() -> None:
    model = Echo().train()
    scores = TASK.evaluate(model, BATCHES)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert scores["accuracy"] == 50.0
    assert scores["loss"] == pytest.approx((right + right + wrong + wrong) / 4)
    assert "top5" not in scores
    assert model.training
    assert model.dropout.training


def test_files_are_evaluated_like_modules() -> None:
    def session(inputs: Inputs) -> dict[str, torch.Tensor]:
        (images,) = inputs.args
        return {"logits": images}

    assert TASK.evaluate(session, BATCHES) == TASK.evaluate(Echo(), BATCHES)


def test_top5_counts_the_five_best() -> None:
    outputs = torch.arange(8.0).repeat(3, 1)
    scores = TASK.evaluate(Echo(), [(outputs, torch.tensor([7, 3, 2]))])
    assert scores["accuracy"] == pytest.approx(100 / 3)
    assert scores["top5"] == pytest.approx(200 / 3)


def test_label_smoothing_follows_the_formula() -> None:
    outputs, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    logs = outputs.log_softmax(1)
    expected = -(0.9 * logs[torch.arange(5), targets] + 0.1 * logs.mean(1)).mean()
    smooth = TASK.tuned(TrainSettings(label_smoothing=0.1))
    torch.testing.assert_close(smooth.loss_fn()(outputs, targets), expected)
    loss, answer = smooth.loss(Echo(), Batch(Inputs((outputs,)), targets))
    assert answer.shape == outputs.shape
    torch.testing.assert_close(
        ClassificationTask(label_smoothing=0.1).loss_fn()(answer, targets), loss
    )
    assert TASK.tuned(TrainSettings()) is TASK


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: {"logits": x}, lambda x: [x]])
def test_logits_are_found_in_what_models_return(wrap: object) -> None:
    class Wrapping(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return wrap(x)  # type: ignore[operator]

    assert TASK.evaluate(Wrapping(), BATCHES)["accuracy"] == 50.0


def test_what_is_no_logits_is_refused() -> None:
    with pytest.raises(ModelError, match="expected logits"):
        TASK.loss_fn()(object(), torch.tensor([0]))


def test_no_batches_is_an_error() -> None:
    with pytest.raises(InputError, match="no batch"):
        TASK.evaluate(Echo(), [])


def test_a_predict_script_whose_reader_has_seen_enough_is_quiet(tmp_path: Path) -> None:
    import subprocess
    import sys

    from slimkit.tasks import predict_arrays, predict_images
    from slimkit.tasks.detection import predict_boxes

    for module in (predict_arrays, predict_images, predict_boxes):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        script = tmp_path / "predict.py"
        begin = text.index('if __name__ == "__main__":')
        script.write_text(
            "import os\nimport sys\ndef main():\n    for _ in range(100_000): print('x' * 100)\n"
            + text[begin:]
        )
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} {script} | head -1"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout == "x" * 100 + "\n"
        assert done.stderr == ""
