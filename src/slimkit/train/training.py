"""The training loop of everything: baselines, recovery, distillation, QAT.

It is deterministic where the device is: the order of the data, augmentation and dropout of an
epoch depend on (seed, epoch) only. A checkpoint is written at the end of each epoch, so a
killed run that is started again repeats the interrupted epoch and ends with the same weights
as a run that nobody disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import DataError, InputError
from slimkit.train.callbacks import Callback
from slimkit.train.devices import Device
from slimkit.train.history import History
from slimkit.train.progress import Scalars, TrainingDisplay
from slimkit.train.running import EvaluateMetrics, TrainingRun
from slimkit.train.settings import TrainSettings
from slimkit.train.stepping import BatchLoss, LossFunction, Objective, Step, Term
from slimkit.train.strided import at_stride_one

__all__ = ["History", "fit"]


@door
def fit(  # noqa: PLR0913 - the verb: every choice is a keyword with a default
    model: nn.Module,
    loader: Any,
    *,
    loss_fn: LossFunction | None = None,
    batch_loss: BatchLoss | None = None,
    step: Step | None = None,
    settings: TrainSettings,
    evaluate: EvaluateMetrics | None = None,
    losses: Sequence[Term] = (),
    callbacks: Sequence[Callback] = (),
    checkpoint: PathLike | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    progress: bool = True,
    label: str = "train",
    tensorboard: PathLike | None = None,
) -> History:
    """Train ``model`` in place; it ends in eval mode, with averaged weights if ``ema`` is set.

    What is minimised is said by ``loss_fn``, or by ``batch_loss`` where the loss is computed
    inside the model, as in torchvision's detectors. A training step is one forward and one
    backward of it, unless ``step`` says otherwise; a step may also compute its own loss, with
    neither of the two.

    Args:
        model: any module.
        loader: has a length and yields ``(inputs, targets)`` or anything else that
            :func:`slimkit.inputs.as_batch` reads: inputs that are tuples or mappings are passed
            as arguments, targets may have any structure. Where it has ``set_seed`` and
            ``set_epoch`` they are called, so that its order can be repeated. A third entry is
            the numbers of the samples; they may also come from a method ``with_ids()`` that
            yields such batches, which is called when a term needs them.
        loss_fn: ``loss_fn(outputs, targets)`` → scalar.
        batch_loss: ``batch_loss(model, batch)`` → (scalar, outputs), with the ``model`` that is
            to be called and a :class:`slimkit.inputs.Batch`; under autocast already.
        step: ``step(tools, batch)`` of one's own, with several forwards and backwards by
            :class:`slimkit.train.StepTools`; what it returns callbacks see as outputs.
        settings: how to train.
        evaluate: metrics of a model, in the order of importance.
        losses: further terms, each from a :class:`StepContext`; what ``.parameters()`` of a
            term returns is trained too. A term with ``needs("ids")`` true gets the numbers of
            the samples.
        callbacks: called before and after steps and after epochs. What a ``state_dict()`` of
            one of them, of a term, of the loss or of the step returns (tensors or JSON by
            name) is part of the checkpoint.
        checkpoint: file for the state of the run; if it exists, the run goes on from there.
        seed: of the data's order, augmentation and dropout.
        max_steps: stop after so many steps (the schedule is fitted to them).
        progress: show progress on standard error.
        label: what the progress bar says.
        tensorboard: folder for TensorBoard scalars.

    Raises:
        DataError: the loader belongs to the validation or test split, or yields nothing.
        InputError: the loader is empty, has no length, or yields something that is no batch;
            nothing says what is minimised, or two things do.
        TrainingError: the loss or a metric is not finite, the loss is no scalar, nothing
            requires gradients, or a function that was given raised; the checkpoint of the epoch
            before is kept. Exceptions of classes of your own pass: they are a way to leave.
        CaptureError: the model's forward raised.
        CheckpointError: the checkpoint is of a run with other settings; a state is to be kept
            in it that is neither tensors nor JSON.
        ArtifactError: the checkpoint cannot be read or written.
    """
    _check_loader(loader)
    objective = Objective(loss_fn, batch_loss, step, losses, settings.loss_weight)
    device = Device(settings)
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with (
            torch.random.fork_rng(devices=device.random_devices),
            device.sharded(loader),
            at_stride_one(model, device.device),
        ):
            if hasattr(loader, "set_seed"):
                loader.set_seed(seed)
            run = TrainingRun(
                model, loader, objective, settings, callbacks, seed, max_steps, device
            )
            run.restore_or_start(None if checkpoint is None else Path(checkpoint))
            show = TrainingDisplay(
                run.total, run.step, label=label, enabled=progress and device.is_main
            )
            folder = Path(tensorboard) if tensorboard is not None and device.is_main else None
            with show, Scalars(folder, run.step) as scalars:
                while run.step < run.total:
                    run.epoch(evaluate, show, scalars)
            return run.finish(evaluate)
    finally:
        model.eval()
        device.put_back(model, home)


def _check_loader(loader: Any) -> None:
    role = getattr(loader, "role", "train")
    if role != "train":
        raise DataError(
            f"the {role} split must not be trained on", where="loader", hint="splits.train"
        )
    try:
        length = len(loader)
    except TypeError as error:
        raise InputError(
            "the loader has no length, so the schedule cannot be laid out", where="loader"
        ) from error
    if not length:
        raise InputError("the loader has no batches", where="loader")
