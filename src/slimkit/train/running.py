"""A training run: its epochs, its optimizer steps, its state."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.artifact import content_hash
from slimkit.errors import DataError, TrainingError
from slimkit.inputs import Batch
from slimkit.outside import called, iterated, signalled
from slimkit.runtime.surroundings import multiplies_bf16
from slimkit.train.batch_norm import frozen_batch_norm, reestimate_batch_norm
from slimkit.train.budget import Budget, ProcessorShare
from slimkit.train.callbacks import Callback, EpochContext
from slimkit.train.checkpointing import RunState, check_state, restore, save_run
from slimkit.train.devices import Device
from slimkit.train.ema import WeightAverage
from slimkit.train.history import History, finite_metrics
from slimkit.train.optimisation import build_optimizer, learning_rate
from slimkit.train.precision import choose_precision
from slimkit.train.progress import Scalars, TrainingDisplay
from slimkit.train.resizing import resized
from slimkit.train.settings import TrainSettings
from slimkit.train.stepping import Objective, StepTools, Term

__all__ = ["EvaluateMetrics", "TrainingRun"]

EvaluateMetrics = Callable[[nn.Module], Mapping[str, float]]


@dataclass
class _Sums:
    """Of the steps of an epoch."""

    loss: Tensor
    steps: int = 0
    images: int = 0
    rate: float = 0.0
    scalars: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    share: ProcessorShare = field(default_factory=ProcessorShare)

    def add(self, loss: Tensor, images: int, scalars: Mapping[str, Tensor]) -> None:
        self.loss += loss
        self.steps += 1
        self.images += images
        for name, value in scalars.items():
            total, count = self.scalars.get(name, (torch.zeros_like(value), 0))
            self.scalars[name] = (total + value, count + 1)

    def means(self) -> dict[str, float]:
        """Of what was logged, over the steps that logged it."""
        return {name: float(total) / count for name, (total, count) in self.scalars.items()}


class TrainingRun:
    """The state of one call of :func:`slimkit.train.fit`.

    Args:
        model, loader, settings, callbacks, seed, max_steps: see there.
        objective: what is minimised.
        device: where.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        objective: Objective,
        settings: TrainSettings,
        callbacks: Sequence[Callback],
        seed: int,
        max_steps: int | None,
        device: Device,
    ) -> None:
        self.model, self.loader, self.settings, self.device = model, loader, settings, device
        self.objective, self.callbacks, self.seed = objective, callbacks, seed
        self.batches_per_epoch = len(loader)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / settings.accumulate)
        self.total = max(1, round(settings.epochs * self.steps_per_epoch))
        if max_steps is not None:
            self.total = min(self.total, max_steps)
        self.budget = Budget(settings.minutes, self.steps_per_epoch, self.total)
        forward = device.place(model, in_parts=objective.step is not None)
        self.extra = _parameters_of(objective.terms, device.device)
        self.optimizer = build_optimizer(model, settings, self.extra)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.tools = StepTools(model, forward, objective, device, self.optimizer)
        self.tools.names_of = getattr(loader, "names_of", None)
        self.average = WeightAverage(model, settings.ema) if settings.ema else None
        self.history = History()
        self.step = 0
        self.checkpoint: Path | None = None
        self._undecided = False
        self._trial_seconds = 0.0

    def restore_or_start(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, or begin a new run."""
        self.checkpoint = checkpoint
        if checkpoint is not None:
            state = self._state({})
            check_state(state)
            if restore(checkpoint, state):
                self.step = state.header.pop("step")
                self.history = History(**state.header)
                self.tools.bf16 = self.history.precision == "bf16"
                self._fit_budget()
                return
        precision = self.settings.precision
        if precision == "auto":
            self._undecided = True  # until there is a batch to time it on
            return
        if precision == "bf16" and not multiplies_bf16(self.device.device):
            warnings.warn(
                "this processor has no bf16 instructions: training in bf16 takes many times as "
                "long as in fp32 here; precision: auto chooses what is faster",
                stacklevel=3,
            )
        self.history.precision = self.device.agreed(precision)
        self.tools.bf16 = self.history.precision == "bf16"

    def epoch(
        self, evaluate: EvaluateMetrics | None, show: TrainingDisplay, scalars: Scalars
    ) -> None:
        """Train one epoch, or what is left of the run, then evaluate and save.

        Raises:
            DataError: the loader yields nothing.
            TrainingError: a metric is not finite; the checkpoint of the epoch before is kept.
        """
        number = self.step // self.steps_per_epoch
        torch.manual_seed(mixed_seed(self.seed, number))
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(number)
        start = time.perf_counter()
        with frozen_batch_norm(self.model.train(), self.settings.freeze_batch_norm):
            sums = self._steps(number, show, scalars)
        start += self._trial_seconds
        self._trial_seconds = 0.0
        seconds = time.perf_counter() - start
        if not sums.steps:
            raise DataError("the loader has a length, but yields no batch", where="loader")
        metrics = self._metrics(number, evaluate)
        record = {
            "epoch": number,
            "loss": float(sums.loss) / sums.steps,
            "lr": sums.rate,
            "seconds": round(seconds, 3),
            "images_per_second": round(sums.images / seconds, 1),
            "metrics": metrics,
        }
        if sums.scalars:
            record["scalars"] = sums.means()
        if sums.share.known:
            record["cpu_share"] = round(sums.share.value, 3)
        self.history.epochs.append(record)
        self.history.steps = self.step
        self.history.seconds += time.perf_counter() - start
        self._fit_budget(show)
        scalars.add({f"metrics/{name}": value for name, value in metrics.items()}, self.step)
        for callback in self.callbacks:
            context = EpochContext(self.model, self.optimizer, number, self.step, record)
            signalled(callback.on_epoch_end, TrainingError, _named(callback), context)
        show.epoch(record, self.total / self.steps_per_epoch)
        if self.checkpoint is not None and self.device.is_main:
            save_run(self.checkpoint, self._state({"step": self.step, **self.history.to_json()}))

    def _fit_budget(self, show: TrainingDisplay | None = None) -> None:
        """Lay the run out over the epochs that fit into its minutes, by those that were trained."""
        if not self.budget.seconds:
            return
        history = self.history
        self._lay_out(
            self.budget.after_epochs(len(history.epochs), history.seconds, self.total), show
        )
        epochs = self.total / self.steps_per_epoch
        history.budget = {
            "minutes": self.budget.seconds / 60,
            "epochs": round(epochs, 3),
            "of": round(self.budget.most / self.steps_per_epoch, 3),
        }

    def _lay_out(self, total: int, show: TrainingDisplay | None) -> None:
        if total != self.total:
            self.total = max(total, self.step)
            if show is not None:
                show.fitted(self.total)

    def _metrics(self, epoch: int, evaluate: EvaluateMetrics | None) -> dict[str, float]:
        """Of the averaged weights, if it is the time for it."""
        if self.average is not None:
            self.average.keep_zeros()
        last = self.step >= self.total
        if evaluate is None or not (last or (epoch + 1) % self.settings.evaluate_every == 0):
            return {}
        with self.average.applied() if self.average else contextlib.nullcontext():
            return finite_metrics(self._evaluated(evaluate), f"after epoch {epoch + 1}")

    def _evaluated(self, evaluate: EvaluateMetrics) -> Any:
        return called(evaluate, TrainingError, "evaluate", self.model)

    def _steps(self, epoch: int, show: TrainingDisplay, scalars: Scalars) -> _Sums:
        """The optimizer steps of an epoch, or what is left of the run."""
        settings, cpu = self.settings, self.device.device.type == "cpu"
        steps = min(self.steps_per_epoch, self.total - self.step)
        sums = _Sums(torch.zeros((), device=self.device.device))
        batches = self._prepared() if not cpu else sums.share.without_waiting(self._prepared())
        start = time.perf_counter()
        for index in range(steps):
            logged = index % settings.log_every == 0 or index == steps - 1
            count = min(settings.accumulate, self.batches_per_epoch - index * settings.accumulate)
            sums.rate = self._set_rate()
            # elsewhere than on a CPU, looking at the loss would wait for it
            images = self._step(itertools.islice(batches, count), count, epoch, logged or cpu)
            if images is None:
                break  # the loader is shorter than it said
            loss, values = self.tools.results()
            sums.add(loss, images, values)
            spent = time.perf_counter() - start - self._trial_seconds
            if not self.history.epochs and self.budget.may_judge(spent, sums.steps):
                self._lay_out(self.budget.after_steps(sums.steps, spent), show)
            if cpu and sums.share.slow():
                show.warn(sums.share.warning())
            if logged or show.due():
                speed = sums.images / max(spent, 1e-9)
                show.batch(self.step, float(loss), speed)
                named = {f"train/{name}": float(value) for name, value in values.items()}
                named |= {"train/loss": float(loss), "train/lr": sums.rate}
                scalars.add(named, self.step)
            if self.step >= self.total:
                break  # the minutes are over
        return sums

    def _step(self, batches: Iterable[Batch], count: int, epoch: int, looks: bool) -> int | None:
        """One optimizer step over so many batches → images seen, None without any batch."""
        tools, images = self.tools, None
        tools.begin(self.step, epoch, self.total)
        for batch in batches:
            if images is None:
                images, context = 0, tools.context(batch)
                for callback in self.callbacks:
                    signalled(callback.on_step_begin, TrainingError, _named(callback), context)
            context = tools.context(batch, tools.take(batch, 1 / count, looks))
            images += (batch.size or 1) * self.device.processes
        if images is None:
            return None
        self.device.share_gradients(self.extra)
        if self.settings.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.settings.clip_grad_norm)
        self.optimizer.step()
        self.step += 1
        for callback in self.callbacks:
            signalled(callback.on_update, TrainingError, _named(callback), context)
        for callback in self.callbacks:
            signalled(callback.on_step_end, TrainingError, _named(callback), context)
        if self.average is not None:
            self.average.update()
        return images

    def _set_rate(self) -> float:
        rate = learning_rate(self.settings, self.step, self.total, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _prepared(self) -> Iterator[Batch]:
        """One epoch on the device; on the first batch of a run the precision is decided."""
        for item in self._batches():
            batch = resized(self.device.moved(item), self.settings.image_size)
            if self._undecided:
                start = time.perf_counter()
                self._choose_precision(batch)
                self._trial_seconds = time.perf_counter() - start
            yield batch

    def _choose_precision(self, batch: Batch) -> None:
        batch_loss = self.objective.batch_loss
        owner = getattr(batch_loss, "__self__", batch_loss)  # of a method
        chosen, self.history.precision_ms = choose_precision(
            lambda bf16: self.tools.trial(batch, bf16), [self.model, owner], self.device.device
        )
        self.history.precision = self.device.agreed(chosen)
        self.tools.bf16 = self.history.precision == "bf16"
        self._undecided = False

    def _batches(self) -> Iterable[Any]:
        """One epoch, with the numbers of the samples where the loader knows them.

        Terms may ask for them, and an error says which samples it was.
        """
        with_ids = getattr(self.loader, "with_ids", None)
        return iterated(self.loader if with_ids is None else with_ids(), where="loader")

    def finish(self, evaluate: EvaluateMetrics | None) -> History:
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
            moved = (self.device.moved(item) for item in self.loader)
            used = reestimate_batch_norm(self.model, itertools.islice(moved, batches))
            if used and evaluate is not None:
                when = "after batch norm was measured anew"
                self.history.final = finite_metrics(self._evaluated(evaluate), when)
        return self.history

    def _state(self, header: dict[str, Any]) -> RunState:
        without = {"log_every", "device"} | ({"minutes"} if not self.settings.minutes else set())
        settings = self.settings.model_dump(mode="json", exclude=without)
        objective = self.objective
        shapes = {
            name: list(value.shape) if isinstance(value, Tensor) else None
            for name, value in self.model.state_dict().items()
        }
        identity = {
            **settings,
            "seed": self.seed,
            "steps": self.budget.most,
            "steps_per_epoch": self.steps_per_epoch,
            "model": content_hash(shapes),
            "losses": len(objective.terms),
        }
        whole = (objective.loss_fn, objective.batch_loss, objective.step)
        extras = [*objective.terms, *self.callbacks, *whole]
        return RunState(
            self.model, self.optimizer, self.average, extras, self.extra, identity, header
        )


def _named(callback: Callback) -> str:
    return f"callbacks: {type(callback).__name__}"


def _parameters_of(losses: Sequence[Term], device: torch.device) -> list[nn.Parameter]:
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


def mixed_seed(seed: int, epoch: int) -> int:
    """One seed from two numbers."""
    return (seed * 1_000_003 + epoch * 7_919 + 1) % (2**63)
