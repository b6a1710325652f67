"""Distillation from stored or served outputs: the same losses, no teacher in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from slimkit.distill.knowledge.format.schema import LOGITS
from slimkit.distill.knowledge.mixing import Knowledge
from slimkit.distill.loss_terms import Given, NetworkComparison
from slimkit.distill.losses.interface import DistillLoss, parse_losses, unique_names
from slimkit.distill.recording.recorder import Recorder, main_tensor, probing, run
from slimkit.distill.recording.records import OUTPUT
from slimkit.errors import CheckpointError, DataError, InputError
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.plan import load_weights

if TYPE_CHECKING:
    from slimkit.train.callbacks import StepContext

__all__ = ["KnowledgeDistiller", "LayerSkeleton", "NumberedLoader"]


class NumberedLoader(Protocol):
    """A loader whose samples have numbers; :class:`slimkit.tasks.data.ArrayLoader` is one.

    Attributes:
        ids: numbers of the samples in the batch that it yielded last.
    """

    ids: Tensor

    def fix_changes(self, seed: int | None, passes: int | None = None) -> None:
        """Draw the random changes of a sample from the seed and the pass alone; None ends it."""

    def epoch_ids(self, epoch: int) -> list[Tensor]:
        """Numbers of the samples in every batch of an epoch."""


class KnowledgeDistiller:
    """Distillation losses from knowledge, as a term of :func:`slimkit.train.fit`.

    ::

        with Knowledge(["file:knowledge"]) as knowledge:
            term = KnowledgeDistiller(student, knowledge, [KD()], splits.train)
            fit(student, splits.train, losses=[term], ...)

    Args:
        student: the model in training; listened to through forward hooks until :meth:`close`.
        knowledge: what the teachers say.
        losses: as of :class:`slimkit.distill.Distiller`; a loss on a layer reads the key that
            is called like the teacher's layer.
        loader: what the student trains on; until :meth:`close` its random changes are fixed as
            the teachers' are.
        example_inputs: one small batch, for losses with connectors and to check shapes early.
        audit: keep a hash over all (sample, knowledge) in the order of use.

    Attributes:
        connectors: trainable modules between student's and teachers' features.
        last: name of a loss → its weighted value in the latest step.

    Raises:
        InputError: no losses.
        DataError: no teacher knows what a loss needs.
        UnknownNameError: the student, or what the teachers know, has no such layer.
        ModelError: student and teachers differ in their classes or features.
    """

    def __init__(
        self,
        student: nn.Module,
        knowledge: Knowledge,
        losses: Sequence[DistillLoss | Mapping[str, Any]],
        loader: NumberedLoader,
        *,
        example_inputs: ExampleInputs | None = None,
        audit: bool = False,
    ) -> None:
        self.losses = parse_losses(losses, where="losses")
        if not self.losses:
            raise InputError("there is nothing to distil", where="losses", hint="pass [KD()]")
        self._names = unique_names(self.losses)
        self.knowledge = knowledge
        outline = LayerSkeleton(name for name in knowledge.names if name != LOGITS)
        self._comparison = NetworkComparison(list(enumerate(self.losses)), student, outline)
        taps = sorted(self._comparison.taps("teacher"), key=lambda tap: tap.key)
        self._keys = {tap.key: tap.key or LOGITS for tap in taps}
        for key in self._keys.values():
            knowledge.shape(key)
        self._loader = loader
        loader.fix_changes(knowledge.seed, knowledge.passes)
        self._recorder = Recorder(student, [OUTPUT, *self._comparison.taps("student")])
        self.connectors = self._comparison.modules
        self.last: dict[str, Tensor] = {}
        self._epoch = -1
        self._stream: Iterator[tuple[np.ndarray[Any, Any], dict[str, Tensor]]] = iter(())
        self._digest: bytes | None = bytes(32) if audit else None
        try:
            self._connect(student, outline, example_inputs)
        except BaseException:
            self.close()
            raise

    @property
    def digest(self) -> str | None:
        """SHA-256 (hex) over all samples and knowledge so far, with ``audit``."""
        return None if self._digest is None else self._digest.hex()

    def needs(self, argument: str) -> bool:
        """Whether a loss must be given ``labels`` or ``ids``."""
        return self._comparison.needs(argument)

    def __call__(self, context: StepContext) -> Tensor:
        """The weighted sum of the losses for a step; a float32 scalar with gradient."""
        ours = dict(self._recorder.records)
        self._recorder.clear()
        ours[OUTPUT] = main_tensor(context.outputs, where="student")
        device = ours[OUTPUT].device
        answers = self.take(context.epoch)
        theirs = {
            tap: answers[key].to(device, non_blocking=True).float()
            for tap, key in self._keys.items()
        }
        for tap in self._comparison.taps("student"):
            if tap.key not in ours:
                raise InputError(tap.absent, where="student")
        if not self._comparison.checked:
            self._comparison.check(ours, theirs)
        factors = [
            loss.weight * loss.factor_at(context.epoch, context.progress, index)
            for index, loss in enumerate(self.losses)
        ]
        active = {index for index, factor in enumerate(factors) if factor}
        given = Given(context.targets, context.ids, context.inputs)
        with torch.autocast(device.type, enabled=False):
            values = self._comparison(ours, theirs, given, active)
            terms = [
                factor * values[index] if index in values else torch.zeros((), device=device)
                for index, factor in enumerate(factors)
            ]
            self.last = {n: t.detach() for n, t in zip(self._names, terms, strict=True)}
            return torch.stack(terms).sum()

    def take(self, epoch: int) -> dict[str, Tensor]:
        """Knowledge about the batch that the loader yielded last; each batch once, in order.

        Raises:
            DataError: the loader yields other samples than it announced.
            TeacherError: a teacher is gone.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            batches = [ids.numpy() for ids in self._loader.epoch_ids(epoch)]
            wanted = tuple(dict.fromkeys(self._keys.values()))
            self._stream = self.knowledge.stream(batches, epoch, wanted)
        found = next(self._stream, None)
        seen = self._loader.ids.numpy()
        if found is None or not _subset(seen, found[0]):
            raise DataError(
                f"the loader yields other samples than it announced for epoch {epoch}",
                where="loader",
            )
        asked, answers = found
        if len(seen) < len(asked):  # unreadable images were left out of the batch
            kept = torch.from_numpy(np.flatnonzero(np.isin(asked, seen)))
            answers = {name: rows[kept] for name, rows in answers.items()}
        if self._digest is not None:
            self._digest = _digest_of(self._digest, seen, answers)
        return answers

    def parameters(self) -> Iterator[nn.Parameter]:
        """The connectors' parameters, to be given to the optimizer."""
        return self.connectors.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the connectors' weights, and the audit's hash."""
        state: dict[str, Tensor] = self.connectors.state_dict(prefix="connectors.")
        if self._digest is not None:
            state = {**state, "digest": torch.tensor(list(self._digest), dtype=torch.uint8)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the state is another distiller's.
        """
        weights = dict(state)
        digest = weights.pop("digest", None)
        if (digest is None) != (self._digest is None):
            raise CheckpointError("it was written with another audit", where="distiller")
        if digest is not None:
            self._digest = bytes(digest.tolist())
        own = {key.removeprefix("connectors."): value for key, value in weights.items()}
        load_weights(self.connectors, own, where="distiller")

    def close(self) -> None:
        """Leave student and loader as they were; the knowledge stays open."""
        self._recorder.close()
        self._loader.fix_changes(None)
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _connect(
        self, student: nn.Module, outline: nn.Module, example_inputs: ExampleInputs | None
    ) -> None:
        """Build the connectors and compare shapes, when there are example inputs."""
        if example_inputs is None:
            for loss in self.losses:
                loss.check_shapes_known()
            return
        inputs = as_inputs(example_inputs)
        parameter = next(student.parameters(), None)
        if parameter is not None:
            inputs = inputs.to(parameter.device)
        with probing(student):
            run(student, inputs, who="student")
        ours = dict(self._recorder.records)
        self._recorder.clear()
        output = ours[OUTPUT]
        theirs = {
            tap: output.new_zeros((len(output), *self.knowledge.shape(key)), dtype=torch.float32)
            for tap, key in self._keys.items()
        }
        self._comparison.connect(ours, theirs, student, outline)


class LayerSkeleton(nn.Module):
    """Empty modules at the paths of a teacher's layers, for losses that name these layers."""

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        for path in paths:
            node: nn.Module = self
            for part in path.split("."):
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)


def _subset(seen: np.ndarray[Any, Any], asked: np.ndarray[Any, Any]) -> bool:
    """Whether ``seen`` is ``asked``, perhaps with gaps, in the same order."""
    if len(seen) == len(asked):
        return bool(np.array_equal(seen, asked))
    return bool(len(seen)) and bool(np.array_equal(asked[np.isin(asked, seen)], seen))


def _digest_of(before: bytes, ids: np.ndarray[Any, Any], answers: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256(before)
    digest.update(np.ascontiguousarray(ids).tobytes())
    for name in sorted(answers):
        digest.update(name.encode())
        digest.update(answers[name].contiguous().numpy().tobytes())
    return digest.digest()
