"""The training loop.

It is deterministic where the device is: the order of the data, augmentation and dropout of an
epoch depend on (seed, epoch) only. A checkpoint is written at the end of each epoch, so a
killed run that is started again repeats the interrupted epoch and ends with the same weights
as a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimkit.artifact import PathLike, content_hash
from slimkit.errors import DataError, InputError, TrainingError
from slimkit.runtime.surroundings import multiplies_bf16
from slimkit.train.batch_norm import frozen_batch_norm, reestimate_batch_norm
from slimkit.train.callbacks import Callback, EpochContext, StepContext
from slimkit.train.checkpointing import RunState, restore, save_run
from slimkit.train.devices import Device
from slimkit.train.ema import WeightAverage
from slimkit.train.optimisation import build_optimizer, learning_rate
from slimkit.train.precision import choose_precision
from slimkit.train.progress import Scalars, TrainingDisplay
from slimkit.train.resizing import resized
from slimkit.train.settings import TrainSettings
from slimkit.train.strided import at_stride_one

__all__ = ["History", "fit"]

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass
class History:
    """What happened during a run.

    Attributes:
        epochs: per epoch ``epoch``, ``loss`` (mean over its steps), ``lr`` (of the last step),
            ``seconds``, ``images_per_second`` and ``metrics`` (what ``evaluate`` returned).
        final: metrics of the weights that the run ended with (averaged, batch norm measured
            anew), or nothing without ``evaluate``.
        precision: what was trained in.
        precision_ms: milliseconds per step of each precision, when it was chosen by timing.
        steps: optimizer steps.
        seconds: of all epochs and their evaluations.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    precision: Literal["fp32", "bf16"] = "fp32"
    precision_ms: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of all attributes."""
        return {
            "epochs": self.epochs,
            "final": self.final,
            "precision": self.precision,
            "precision_ms": self.precision_ms,
            "steps": self.steps,
            "seconds": self.seconds,
        }


def fit(
    model: nn.Module,
    loader: Any,
    *,
    loss_fn: Callable[[Any, Tensor], Tensor],
    settings: TrainSettings,
    evaluate: Evaluate | None = None,
    losses: Sequence[Callable[[StepContext], Tensor]] = (),
    callbacks: Sequence[Callback] = (),
    checkpoint: PathLike | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    progress: bool = True,
    label: str = "train",
    tensorboard: PathLike | None = None,
) -> History:
    """Train ``model`` in place; it ends in eval mode, with averaged weights if ``ema`` is set.

    Args:
        model: any module; inputs that are tuples or mappings are passed as arguments.
        loader: has a length and yields ``(inputs, targets)``; where it has ``set_seed`` and
            ``set_epoch`` they are called, so that its order can be repeated. A third entry is
            the numbers of the samples; they may also come from a method ``with_ids()`` that
            yields such batches, which is called when a term needs them.
        loss_fn: ``loss_fn(outputs, targets)`` → scalar.
        settings: how to train.
        evaluate: metrics of a model, in the order of importance.
        losses: further terms, each from a :class:`StepContext`; what ``.parameters()`` of a
            term returns is trained too, and its ``state_dict()`` is checkpointed. A term with
            ``needs("ids")`` true gets the numbers of the samples.
        callbacks: called after steps and epochs.
        checkpoint: file for the state of the run; if it exists, the run goes on from there.
        seed: of the data's order, augmentation and dropout.
        max_steps: stop after so many steps (the schedule is fitted to them).
        progress: show progress on standard error.
        label: what the progress bar says.
        tensorboard: folder for TensorBoard scalars.

    Raises:
        DataError: the loader belongs to the validation or test split.
        InputError: the loader is empty or has no length.
        TrainingError: the loss is not finite, or nothing requires gradients.
        CheckpointError: the checkpoint is of a run with other settings.
        ArtifactError: the checkpoint cannot be read or written.
    """
    _check_loader(loader)
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
            run = _Run(model, loader, loss_fn, settings, losses, callbacks, seed, max_steps, device)
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


class _Run:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        loss_fn: Callable[[Any, Tensor], Tensor],
        settings: TrainSettings,
        losses: Sequence[Callable[[StepContext], Tensor]],
        callbacks: Sequence[Callback],
        seed: int,
        max_steps: int | None,
        device: Device,
    ) -> None:
        self.model, self.loader, self.settings, self.device = model, loader, settings, device
        self.loss_fn, self.losses, self.callbacks, self.seed = loss_fn, losses, callbacks, seed
        self.steps_per_epoch = len(loader)
        self.total = max(1, round(settings.epochs * self.steps_per_epoch))
        if max_steps is not None:
            self.total = min(self.total, max_steps)
        self.forward = device.place(model)
        self.extra = _parameters_of(losses, device.device)
        self.optimizer = build_optimizer(model, settings, self.extra)
        self.average = WeightAverage(model, settings.ema) if settings.ema else None
        self.history = History()
        self.step = 0
        self.checkpoint: Path | None = None

    def restore_or_start(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, or choose the precision of a new run."""
        self.checkpoint = checkpoint
        state = self._state({})
        if checkpoint is not None and restore(checkpoint, state):
            self.step = state.header.pop("step")
            self.history = History(**state.header)
            return
        precision = self.settings.precision
        if precision == "auto":
            precision, self.history.precision_ms = self._timed_precision()
        elif precision == "bf16" and not multiplies_bf16(self.device.device):
            warnings.warn(
                "this processor has no bf16 instructions: training in bf16 takes many times as "
                "long as in fp32 here; precision: auto chooses what is faster",
                stacklevel=4,
            )
        self.history.precision = self.device.agreed(precision)

    def _timed_precision(self) -> tuple[Literal["fp32", "bf16"], dict[str, float]]:
        inputs, targets = self.device.moved(next(iter(self.loader)))
        inputs = resized(inputs, self.settings.image_size)
        self.model.train()

        def one_step(bf16: bool) -> Tensor:
            with self.device.autocast(bf16):
                return self.loss_fn(as_float(call(self.forward, inputs)), targets)

        return choose_precision(one_step, self.model, self.device.device)

    def epoch(self, evaluate: Evaluate | None, show: TrainingDisplay, scalars: Scalars) -> None:
        """Train one epoch, or what is left of the run, then evaluate and save."""
        number = self.step // self.steps_per_epoch
        torch.manual_seed(mixed_seed(self.seed, number))
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(number)
        start = time.perf_counter()
        steps = min(self.steps_per_epoch, self.total - self.step)
        with frozen_batch_norm(self.model.train(), self.settings.freeze_batch_norm):
            loss, rate, images = self._steps(number, steps, show, scalars)
        seconds = time.perf_counter() - start
        last = self.step >= self.total
        metrics: dict[str, float] = {}
        if evaluate is not None and (last or (number + 1) % self.settings.evaluate_every == 0):
            with self.average.applied() if self.average else contextlib.nullcontext():
                metrics = dict(evaluate(self.model))
        record = {
            "epoch": number,
            "loss": loss,
            "lr": rate,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 1),
            "metrics": metrics,
        }
        self.history.epochs.append(record)
        self.history.steps = self.step
        self.history.seconds += time.perf_counter() - start
        scalars.add({f"metrics/{name}": value for name, value in metrics.items()}, self.step)
        for callback in self.callbacks:
            callback.on_epoch_end(
                EpochContext(self.model, self.optimizer, number, self.step, record)
            )
        show.epoch(record, self.total / self.steps_per_epoch)
        if self.checkpoint is not None and self.device.is_main:
            save_run(self.checkpoint, self._state({"step": self.step, **self.history.to_json()}))

    def _steps(
        self, epoch: int, steps: int, show: TrainingDisplay, scalars: Scalars
    ) -> tuple[float, float, int]:
        """Train so many steps → mean loss, last learning rate, images seen."""
        settings, device = self.settings, self.device
        bf16 = self.history.precision == "bf16"
        total_loss = torch.zeros((), device=device.device)
        images, rate, start = 0, settings.lr, time.perf_counter()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, batch in enumerate(itertools.islice(self._batches(), steps)):
            inputs, targets = device.moved(batch)
            inputs = resized(inputs, settings.image_size)
            rate = learning_rate(settings, self.step, self.total, self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with device.autocast(bf16):
                outputs = as_float(call(self.forward, inputs))
                context = StepContext(
                    self.model, inputs, targets, outputs, self.step, epoch,
                    self.step / self.total, device.ids(batch),
                )  # fmt: skip
                loss = self._loss(context)
            detached = loss.detach()
            logged = index % settings.log_every == 0 or index == steps - 1
            if logged or device.device.type == "cpu":  # elsewhere looking would wait for it
                self._check_finite(detached, rate)
            self.optimizer.zero_grad(set_to_none=True)
            device.backward(loss, self.extra)
            if settings.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self.step += 1
            total_loss += detached
            images += len(targets) * device.processes
            for callback in self.callbacks:
                callback.on_step_end(context)
            if logged:
                speed = images / (time.perf_counter() - start)
                show.batch(self.step, float(detached), speed)
                scalars.add({"train/loss": float(detached), "train/lr": rate}, self.step)
        return float(total_loss) / steps, rate, images

    def _batches(self) -> Iterable[Any]:
        """One epoch, with the numbers of the samples if a term asks for them."""
        asked = any(hasattr(term, "needs") and term.needs("ids") for term in self.losses)
        with_ids = getattr(self.loader, "with_ids", None) if asked else None
        batches: Iterable[Any] = self.loader if with_ids is None else with_ids()
        return batches

    def _loss(self, context: StepContext) -> Tensor:
        weight = self.settings.loss_weight
        terms = [term(context) for term in self.losses]
        if weight or not terms:
            terms.append(weight * self.loss_fn(context.outputs, context.targets))
        return torch.stack([term.float() for term in terms]).sum() if len(terms) > 1 else terms[0]

    def _check_finite(self, loss: Tensor, rate: float) -> None:
        if not math.isfinite(float(loss)):
            raise TrainingError(
                f"the loss is {float(loss)} at step {self.step} of {self.total}",
                where="loss",
                hint=f"the learning rate is {rate:.3g}: try a lower lr, "
                "warmup_epochs or clip_grad_norm",
            )

    def finish(self, evaluate: Evaluate | None) -> History:
        """Average the weights, measure batch norm anew, evaluate what came out."""
        if self.average is not None:
            self.average.copy_to_model()
        batches = self.settings.batch_norm_reestimation
        if self.history.epochs:
            self.history.final = dict(self.history.epochs[-1]["metrics"])
        if batches:
            number = math.ceil(self.total / self.steps_per_epoch)
            torch.manual_seed(mixed_seed(self.seed, number))
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(number)
            moved = (self.device.moved(batch) for batch in self.loader)
            used = reestimate_batch_norm(self.model, itertools.islice(moved, batches))
            if used and evaluate is not None:
                self.history.final = dict(evaluate(self.model))
        return self.history

    def _state(self, header: dict[str, Any]) -> RunState:
        settings = self.settings.model_dump(mode="json", exclude={"log_every", "device"})
        shapes = {name: list(t.shape) for name, t in self.model.state_dict().items()}
        identity = {
            **settings,
            "seed": self.seed,
            "steps": self.total,
            "steps_per_epoch": self.steps_per_epoch,
            "model": content_hash(shapes),
            "losses": len(self.losses),
        }
        extras = [*self.losses, *self.callbacks]
        return RunState(
            self.model, self.optimizer, self.average, extras, self.extra, identity, header
        )


def _parameters_of(
    losses: Sequence[Callable[[StepContext], Tensor]], device: torch.device
) -> list[nn.Parameter]:
    """What the losses train beside the model, moved to its device."""
    found: list[nn.Parameter] = []
    for term in losses:
        if isinstance(term, nn.Module):
            term.to(device)
        getter = getattr(term, "parameters", None)
        if getter is not None:
            found.extend(p for p in getter() if p.requires_grad)
    for parameter in found:
        parameter.data = parameter.data.to(device)
    return found


def call(model: nn.Module, inputs: Any) -> Any:
    """Call with one tensor, a tuple of arguments or a mapping of keywords."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def as_float(outputs: Any) -> Any:
    """bf16 outputs as float32: losses need the digits."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs

    def on_leaf(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(on_leaf, outputs)


def mixed_seed(seed: int, epoch: int) -> int:
    """One seed from two numbers."""
    return (seed * 1_000_003 + epoch * 7_919 + 1) % (2**63)
