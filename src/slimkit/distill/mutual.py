"""Mutual learning: networks that train together and teach each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.distill.loss_terms import Given, NetworkComparison
from slimkit.distill.losses.interface import DistillLoss, parse_losses
from slimkit.distill.recording.recorder import Recorder, main_tensor, probing, run
from slimkit.distill.recording.records import OUTPUT
from slimkit.distill.weighting import Teachers, module_name, named_teachers
from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.plan import load_weights

if TYPE_CHECKING:
    from slimkit.train.callbacks import StepContext

__all__ = ["MutualLearning"]

STUDENT = ""
"""The name of the student among the networks; peers have names of their own."""


@door
class MutualLearning:
    """Deep mutual learning of Zhang et al. 2018 (arXiv 1706.00384).

    Every network learns from the labels, and from what all others say about the same batch:

        ``L_k = CE(k, labels) + 1/(K−1) · Σ_{l≠k} loss(k ← l)``

    The paper's loss is ``KD(temperature=1)``; any other will do. Used like a
    :class:`~slimkit.distill.Distiller`, as a term of a loop that trains the student on its own
    labels. The peers are trained in place, by the same optimizer::

        with MutualLearning(student, peer, [KD(temperature=1)]) as mutual:
            optimizer = SGD([*student.parameters(), *mutual.parameters()], lr=0.1)
            outputs = student(images)
            loss = F.cross_entropy(outputs, labels) + mutual.loss(images, outputs, labels=labels)

    Args:
        student: the network that the loop trains.
        peers: those that train beside it: one, or several by name or as a list.
        losses: as for a distiller. ``student`` names layers of the student, ``teacher`` those of
            the peers, whoever learns.
        example_inputs: one batch; needed by losses with connectors.
        task_loss: ``task_loss(outputs, labels)`` of the peers.
        task_weight: of it.

    Attributes:
        connectors: modules between the networks' features.
        last: as in a distiller; a peer's entries begin with its name.

    Raises:
        InputError, UnknownNameError, ModelError: as a distiller.
    """

    def __init__(
        self,
        student: nn.Module,
        peers: Teachers,
        losses: Sequence[DistillLoss | Mapping[str, Any]],
        *,
        example_inputs: ExampleInputs | None = None,
        task_loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
        task_weight: float = 1.0,
    ) -> None:
        self.losses = parse_losses(losses, where="losses")
        self.peers = named_teachers(peers)
        if not self.losses or not self.peers:
            what, where = ("losses", "losses") if not self.losses else ("peers", "peers")
            raise InputError(f"there are no {what}", where=where)
        for index, loss in enumerate(self.losses):
            if loss.teachers:
                raise InputError(
                    "every network learns from all others",
                    where=f"losses.{index}.teachers",
                    hint="leave it out",
                )
        if any(peer is student for peer in self.peers.values()):
            raise InputError("the student cannot be its own peer", where="peers")
        self.task_loss, self.task_weight = task_loss, task_weight
        networks = {STUDENT: student, **self.peers}
        self._comparisons = {
            (learner, other): NetworkComparison(
                list(enumerate(_from_side(self.losses, learner, other))),
                networks[learner],
                networks[other],
            )
            for learner in networks
            for other in networks
            if learner != other
        }
        self.last: dict[str, Tensor] = {}
        with contextlib.ExitStack() as opened:
            self._recorders: dict[str, Recorder] = {}
            for name, network in networks.items():
                taps = set()
                for (learner, other), comparison in self._comparisons.items():
                    taps |= comparison.taps("student") if learner == name else set()
                    taps |= comparison.taps("teacher") if other == name else set()
                self._recorders[name] = Recorder(network, [OUTPUT, *taps])
                opened.callback(self._recorders[name].close)
            self._connect(networks, example_inputs)
            self._opened = opened.pop_all()
        self.connectors = nn.ModuleDict(
            {
                module_name(f"{learner or 'student'}<{other or 'student'}"): comparison.modules
                for (learner, other), comparison in self._comparisons.items()
            }
        )

    def needs(self, argument: str) -> bool:
        """Whether :meth:`loss` must be given ``labels`` or ``ids``."""
        asked = any(comparison.needs(argument) for comparison in self._comparisons.values())
        return asked or argument == "labels"

    def loss(
        self,
        inputs: ExampleInputs,
        outputs: Any = None,
        *,
        labels: Tensor,
        ids: Tensor | None = None,
        epoch: int | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """What the student learns from its peers, plus all that the peers learn.

        Args:
            inputs: what the student was called with; the peers are run on it, in train mode.
            outputs: what the student returned; None takes what was recorded.
            labels: class numbers (N,).
            ids: numbers of the samples (N,), for losses that remember them.
            epoch: from 0; for weights that follow a schedule, as ``progress``.
            progress: part of the run that is over, 0 … 1.

        Raises:
            InputError: the student has not run since the last call.
        """
        records = {STUDENT: self._taken(STUDENT)}
        if outputs is not None:
            records[STUDENT][OUTPUT] = main_tensor(outputs, where="student")
        if OUTPUT not in records[STUDENT]:
            raise InputError("the network has not run since the last call", where="student")
        factors = [loss.factor_at(epoch, progress, i) for i, loss in enumerate(self.losses)]
        active = {index for index, factor in enumerate(factors) if factor}
        values: dict[str, Tensor] = {}
        answers: dict[str, Any] = {}
        device = records[STUDENT][OUTPUT].device
        for name, peer in self.peers.items():
            if any(buffer.device != device for buffer in peer.buffers()):
                peer.to(device)  # the loop moves parameters, not statistics
            answers[name] = as_inputs(inputs).run(peer.train())
            records[name] = self._taken(name)
        with torch.autocast(device.type, enabled=False):
            for name, answer in answers.items():
                scores = main_tensor(answer, where=name).float()
                values[f"{name}:task"] = self.task_weight * self.task_loss(scores, labels)
            given = Given(labels, ids, inputs.plain if isinstance(inputs, Inputs) else inputs)
            for (learner, other), comparison in self._comparisons.items():
                if not comparison.checked:
                    comparison.check(records[learner], records[other])
                found = comparison(records[learner], records[other], given, active)
                for index, value in found.items():
                    loss = self.losses[index]
                    key = f"{learner}:{loss.type}" if learner else loss.type
                    term = factors[index] * loss.weight * value / len(self.peers)
                    values[key] = values.get(key, torch.zeros((), device=device)) + term
        self.last = {name: value.detach() for name, value in values.items()}
        return torch.stack(list(values.values())).sum()

    def __call__(self, context: StepContext) -> Tensor:
        """:meth:`loss` of a step of :func:`slimkit.train.fit`, for its ``losses=``."""
        return self.loss(
            context.batch.inputs, context.outputs, labels=context.targets, ids=context.ids,
            epoch=context.epoch, progress=context.progress,
        )  # fmt: skip

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the peers and of all connectors, for the optimizer."""
        for peer in self.peers.values():
            yield from peer.parameters()
        yield from self.connectors.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The peers and connectors, for a checkpoint."""
        return dict(self._modules().state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the state does not fit; nothing was loaded.
        """
        load_weights(self._modules(), state, where="mutual learning")

    def close(self) -> None:
        """Remove all hooks; the peers are left in eval mode."""
        self._opened.close()
        for peer in self.peers.values():
            peer.eval()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _modules(self) -> nn.ModuleDict:
        # a name alone could be that of a method of modules
        peers = {f"peer:{module_name(name)}": peer for name, peer in self.peers.items()}
        return nn.ModuleDict({**peers, "connectors": self.connectors})

    def _taken(self, name: str) -> dict[str, Tensor]:
        """A network's records, which are then forgotten."""
        records = dict(self._recorders[name].records)
        self._recorders[name].clear()
        return records

    def _connect(
        self, networks: Mapping[str, nn.Module], example_inputs: ExampleInputs | None
    ) -> None:
        if example_inputs is None:
            for loss in self.losses:
                loss.check_shapes_known()
            return
        records: dict[str, dict[str, Tensor]] = {}
        for name, network in networks.items():
            parameter = next(network.parameters(), None)
            inputs = as_inputs(example_inputs)
            inputs = inputs.to(parameter.device) if parameter is not None else inputs
            with probing(network):
                run(network, inputs, who=name or "student")
            records[name] = self._taken(name)
        for (learner, other), comparison in self._comparisons.items():
            comparison.connect(records[learner], records[other], networks[learner], networks[other])


def _from_side(losses: Sequence[DistillLoss], learner: str, other: str) -> list[DistillLoss]:
    """The losses with each record where its owner is: ``student*`` is always who learns."""
    if learner == STUDENT:
        return list(losses)
    turned = []
    for loss in losses:
        paths: dict[str, Any] = {}
        for name in type(loss).model_fields:
            if not name.startswith("student"):
                continue
            partner = name.replace("student", "teacher", 1)
            own = getattr(loss, partner, None) or getattr(loss, name)
            paths[name] = own
            if partner in type(loss).model_fields:
                paths[partner] = getattr(loss, name) if other == STUDENT else own
        turned.append(loss.model_copy(update=paths))
    return turned
