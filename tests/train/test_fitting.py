"""The loop learns, reports what it did, and refuses what cannot work."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import DataError, InputError, TrainingError
from slimkit.tasks import ClassificationTask
from slimkit.tasks.data import ArrayLoader
from slimkit.train import Callback, EpochContext, StepContext, TrainSettings, fit

FP32 = TrainSettings(epochs=2, lr=0.05, precision="fp32", weight_decay=0)


def train(network: nn.Module, data: Any, settings: TrainSettings = FP32, **kwargs: Any) -> Any:
    kwargs.setdefault("loss_fn", F.cross_entropy)
    return fit(network, data, settings=settings, progress=False, **kwargs)


def test_a_learnable_problem_is_learnt(
    network: nn.Sequential, data: ArrayLoader, device: torch.device
) -> None:
    where = "auto" if device.type == "cuda" else "cpu"
    settings = TrainSettings(epochs=8, lr=0.05, precision="fp32", device=where)
    task = ClassificationTask()
    history = train(network, data, settings, evaluate=lambda m: task.evaluate(m, data))
    assert history.final["accuracy"] == history.epochs[-1]["metrics"]["accuracy"] > 90
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert next(network.parameters()).device.type == "cpu"  # where it came from
    assert not network.training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_steps_are_those_of_a_plain_loop(
    network: nn.Sequential, data: ArrayLoader, optimizer: str, channels_last: bool
) -> None:
    network[5] = nn.Identity()  # dropout would draw other numbers
    plain = copy.deepcopy(network)
    if optimizer == "sgd":
        stepper: torch.optim.Optimizer = torch.optim.SGD(
            plain.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01
        )
    else:
        stepper = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.01)
    settings = TrainSettings(
        epochs=1,
        lr=0.02,
        optimizer=optimizer,  # type: ignore[arg-type]
        weight_decay=0.01,
        schedule="constant",
        precision="fp32",
        channels_last=channels_last,
        clip_grad_norm=0.5,
    )
    train(network, data, settings)
    data.set_epoch(0)
    plain.train()
    for images, labels in data:
        stepper.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        stepper.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_history_is_json_and_complete(network: nn.Sequential, data: ArrayLoader) -> None:
    history = train(network, data, evaluate=lambda _: {"accuracy": 1.0})
    plain = json.loads(json.dumps(history.to_json()))
    assert [entry["epoch"] for entry in plain["epochs"]] == [0, 1]
    keys = {"epoch", "loss", "lr", "seconds", "images_per_second", "metrics"}
    assert set(plain["epochs"][0]) == keys
    assert plain["steps"] == 2 * len(data)
    assert plain["precision"] == "fp32"


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (1.5, 9), (1, 6)])
def test_fractions_of_epochs(
    network: nn.Sequential, data: ArrayLoader, epochs: float, steps: int
) -> None:
    assert train(network, data, FP32.model_copy(update={"epochs": epochs})).steps == steps


def test_max_steps_ends_the_run(network: nn.Sequential, data: ArrayLoader) -> None:
    history = train(network, data, max_steps=2)
    assert history.steps == 2
    assert history.epochs[-1]["lr"] < FP32.lr  # the schedule was fitted to the two steps


def test_the_callers_random_state_is_left_alone(network: nn.Sequential, data: ArrayLoader) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(network, data)
    assert torch.equal(torch.rand(3), expected)


def test_bf16_trains_too(network: nn.Sequential, data: ArrayLoader) -> None:
    dtypes = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        dtypes.append(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    settings = FP32.model_copy(update={"precision": "bf16"})
    seen: list[torch.dtype] = []
    network[0].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is slow on some processors
        history = train(network, data, settings, loss_fn=loss_fn)
    assert set(seen) == {torch.bfloat16}
    assert set(dtypes) == {torch.float32}  # losses get all digits
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert network[0].weight.dtype == torch.float32


def test_bf16_without_instructions_is_warned_of_and_never_chosen(
    make_network: Callable[[], nn.Sequential], data: ArrayLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("running", "precision"):
        monkeypatch.setattr(f"slimkit.train.{module}.multiplies_bf16", lambda device: False)
    auto = FP32.model_copy(update={"precision": "auto", "device": "cpu"})
    chosen = train(make_network(), data, auto)
    assert (chosen.precision, chosen.precision_ms) == ("fp32", {})
    with pytest.warns(UserWarning, match="no bf16 instructions"):
        train(make_network(), data, auto.model_copy(update={"precision": "bf16"}))


def test_choosing_the_precision_leaves_no_trace(
    make_network: Callable[[], nn.Sequential], data: ArrayLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimkit.train.precision.multiplies_bf16", lambda device: True)
    network = make_network()
    chosen = train(network, data, FP32.model_copy(update={"precision": "auto"}), seed=4)
    assert set(chosen.precision_ms) == {"fp32", "bf16"}
    fresh = make_network()
    train(fresh, data, FP32.model_copy(update={"precision": chosen.precision}), seed=4)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_extra_losses_see_the_step_and_train_their_parameters(
    network: nn.Sequential, data: ArrayLoader
) -> None:
    class Term(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.progress: list[float] = []

        def forward(self, context: StepContext) -> Tensor:
            assert context.inputs.shape[0] == context.targets.shape[0] == len(context.outputs)
            self.progress.append(context.progress)
            return self.scale.square()

    term = Term()
    train(network, data, losses=[term])
    assert term.scale.item() < 2
    assert term.progress[0] == 0
    assert term.progress == sorted(term.progress)
    assert term.progress[-1] < 1


def test_task_loss_can_be_left_out(network: nn.Sequential, data: ArrayLoader) -> None:
    def never(outputs: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("the task's loss was computed")

    settings = FP32.model_copy(update={"loss_weight": 0})
    train(network, data, settings, loss_fn=never, losses=[lambda c: c.outputs.square().mean()])


def test_callbacks_hear_of_steps_and_epochs(network: nn.Sequential, data: ArrayLoader) -> None:
    class Counting(Callback):
        steps, records = 0, ()

        def on_step_end(self, context: StepContext) -> None:
            self.steps += 1

        def on_epoch_end(self, context: EpochContext) -> None:
            self.records = (*self.records, context.record["epoch"])

    counting = Counting()
    train(network, data, callbacks=[counting])
    assert counting.steps == 2 * len(data)
    assert counting.records == (0, 1)


def test_frozen_batch_norm_keeps_its_statistics(network: nn.Sequential, data: ArrayLoader) -> None:
    before = network[1].running_mean.clone()
    train(network, data, FP32.model_copy(update={"freeze_batch_norm": True}))
    assert torch.equal(network[1].running_mean, before)
    train(network, data)
    assert not torch.equal(network[1].running_mean, before)


def test_smaller_images_train_and_whole_ones_are_evaluated(data: ArrayLoader) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    network.append(nn.Linear(16, 4))
    seen: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}
    network[0].register_forward_pre_hook(
        lambda module, inputs: seen[module.training].add(tuple(inputs[0].shape[2:]))
    )
    size = next(iter(data))[0].shape[-1]
    settings = FP32.model_copy(update={"image_size": size // 2})
    train(network, data, settings, evaluate=lambda m: ClassificationTask().evaluate(m, data))
    assert seen == {True: {(size // 2, size // 2)}, False: {(size, size)}}


def test_tuples_and_mappings_are_arguments() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    a, b, labels = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 2
    for inputs in ((a, b), {"a": a, "b": b}):
        history = train(Adding(), [(inputs, labels)])
        assert history.steps == 2


def test_infinite_loss_names_step_and_rate(network: nn.Sequential, data: ArrayLoader) -> None:
    calls = []

    def exploding(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        return outputs.sum() * (float("inf") if len(calls) == 3 else 1e-6)

    with pytest.raises(TrainingError, match=r"step 2 of 12.*learning rate"):
        train(network, data, loss_fn=exploding)


def test_nothing_to_train_is_an_error(network: nn.Sequential, data: ArrayLoader) -> None:
    with pytest.raises(TrainingError, match="requires_grad_"):
        train(network.requires_grad_(False), data)


@pytest.mark.parametrize("role", ["validation", "test"])
def test_other_splits_must_not_be_trained_on(network: nn.Sequential, role: Any) -> None:
    images = torch.zeros(4, 8, 8, 1, dtype=torch.uint8)
    wrong = ArrayLoader(images, torch.zeros(4), batch_size=2, role=role)
    with pytest.raises(DataError, match=role):
        train(network, wrong)


def test_loaders_without_length_or_batches_are_refused(network: nn.Sequential) -> None:
    def endless() -> Iterator[Any]:
        yield from ()

    with pytest.raises(InputError, match="length"):
        train(network, endless())
    with pytest.raises(InputError, match="no batches"):
        train(network, [])


def test_the_users_own_accelerator_is_not_disturbed(
    network: nn.Sequential, data: ArrayLoader
) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's trainer made one
    train(network, data, max_steps=1)
    try:
        own = Accelerator(mixed_precision="bf16", cpu=True)  # after fit, in another way
        train(network, data, max_steps=1)  # and fit again beside it
        assert own.device.type == "cpu"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_tensorboard_scalars_are_written(
    network: nn.Sequential, data: ArrayLoader, tmp_path: Any
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(network, data, tensorboard=tmp_path / "logs", evaluate=lambda _: {"accuracy": 50.0})
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"train/loss", "train/lr", "metrics/accuracy"} <= set(events.Tags()["scalars"])


def test_one_line_per_epoch_outside_of_a_terminal(
    network: nn.Sequential, data: ArrayLoader, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(network, data, loss_fn=F.cross_entropy, settings=FP32, label="baseline")
    lines = capfd.readouterr().err.strip().splitlines()
    assert [line.split(" loss")[0] for line in lines] == [
        "baseline epoch 1/2",
        "baseline epoch 2/2",
    ]
