"""Distillation without data: a generator invents the images, a teacher judges them.

In a loop, the batches take the place of a loader; where the loop saves callbacks, they are one
too, so that the generator is part of the checkpoint::

    batches = GeneratedBatches(
        student, teacher, DAFL(), shape=(3, 32, 32), batch_size=256, steps=100
    )
    with Distiller(student, teacher, [KD()]) as distiller:
        fit(student, batches, loss_fn=F.cross_entropy, settings=settings,
            losses=[distiller], callbacks=[batches])
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from slimkit import losses
from slimkit.distill.losses.projection import seeded
from slimkit.distill.recording.recorder import Recorder, main_tensor
from slimkit.distill.recording.records import Record, RecordPath, find_taps
from slimkit.doors import door
from slimkit.errors import CheckpointError, InputError, ModelError
from slimkit.modules import copy_module, evaluation
from slimkit.registry import Registry
from slimkit.train.callbacks import Callback

__all__ = ["DAFL", "DFAD", "GENERATION", "ZSKT", "GeneratedBatches", "Generation", "ImageGenerator"]

GENERATION: Registry[type[Generation]] = Registry("data-free method")
"""Name in a recipe → settings class."""


@door
class Generation(BaseModel, ABC):
    """Base of all ways to train a generator against a teacher.

    Attributes:
        type: the name in :data:`GENERATION`; subclasses narrow it to a ``Literal``.
        latent: random numbers that an image is made of.
        width: channels of the generator's last hidden layer; the ones before have twice as many.
        lr: of the generator's Adam.
        steps: of the generator before each step of the student.
        student_steps: of the student on fresh images for every turn of the generator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    asks_student: ClassVar[bool] = False
    """Whether the objective looks at the student's answers."""

    type: str
    latent: int = Field(default=100, ge=1, le=65_536)
    width: int = Field(default=64, ge=1, le=65_536)
    lr: float = Field(default=1e-3, gt=0, le=1e6, allow_inf_nan=False)
    steps: int = Field(default=1, ge=1, le=1_000_000)
    student_steps: int = Field(default=1, ge=1, le=1_000_000)

    @abstractmethod
    def objective(self, student: Tensor | None, teacher: Tensor, features: Tensor) -> Tensor:
        """What the generator lowers.

        Args:
            student: logits (N, C) in eval mode, where :attr:`asks_student`.
            teacher: logits (N, C).
            features: of the teacher, what goes into its last linear layer unless named.
        """


@GENERATION.register("dafl")
class DAFL(Generation):
    """Images that the teacher is sure of, of all classes (Chen et al. 2019, arXiv 1904.01186).

    Attributes:
        one_hot: weight of :func:`slimkit.losses.dafl_one_hot`.
        entropy: weight of :func:`slimkit.losses.dafl_entropy`.
        activation: weight of :func:`slimkit.losses.dafl_activation`.
        features: the teacher's layer whose activation counts; None for what goes into its last
            linear layer.
    """

    type: Literal["dafl"] = "dafl"
    one_hot: float = Field(default=0.05, ge=0, le=1e6, allow_inf_nan=False)
    entropy: float = Field(default=5.0, ge=0, le=1e6, allow_inf_nan=False)
    activation: float = Field(default=0.01, ge=0, le=1e6, allow_inf_nan=False)
    features: RecordPath | None = None

    def objective(self, student: Tensor | None, teacher: Tensor, features: Tensor) -> Tensor:
        """See the base class."""
        return (
            self.one_hot * losses.dafl_one_hot(teacher)
            + self.entropy * losses.dafl_entropy(teacher)
            + self.activation * losses.dafl_activation(features)
        )


@GENERATION.register("zskt")
class ZSKT(Generation):
    """Images on which the student's probabilities are wrong (Micaelli and Storkey 2019).

    The student's own losses in the paper are ``kd`` and, weighted 250, ``attention_transfer``.

    Attributes:
        temperature: τ > 0.
    """

    asks_student: ClassVar[bool] = True
    type: Literal["zskt"] = "zskt"
    student_steps: int = Field(default=10, ge=1, le=1_000_000)
    temperature: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)

    def objective(self, student: Tensor | None, teacher: Tensor, features: Tensor) -> Tensor:
        """See the base class."""
        assert student is not None
        return losses.zskt_gap(student, teacher, self.temperature)


@GENERATION.register("dfad")
class DFAD(Generation):
    """Images on which the student's scores are wrong (Fang et al. 2019, arXiv 1912.11006).

    The student's own loss in the paper is ``l1``.
    """

    asks_student: ClassVar[bool] = True
    type: Literal["dfad"] = "dfad"
    student_steps: int = Field(default=5, ge=1, le=1_000_000)

    def objective(self, student: Tensor | None, teacher: Tensor, features: Tensor) -> Tensor:
        """See the base class."""
        assert student is not None
        return losses.dfad_gap(student, teacher)


class ImageGenerator(nn.Module):
    """Random numbers to images: a linear layer, then twice upsampling and convolution.

    The images end in a batch norm without scale, so they are normalised like those that a
    network was trained on.

    Args:
        latent: random numbers per image.
        shape: of an image, (C, H, W).
        width: channels of the last hidden layer.
    """

    def __init__(self, latent: int, shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, height, width_px = shape
        self.size = (height, width_px)
        self.start = (2 * width, math.ceil(height / 4), math.ceil(width_px / 4))
        with seeded():
            self.project = nn.Linear(latent, math.prod(self.start))
            self.norm = nn.BatchNorm2d(2 * width)
            self.first = _block(2 * width, 2 * width)
            self.second = _block(2 * width, width)
            self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.standardise = nn.BatchNorm2d(channels, affine=False)

    def forward(self, latent: Tensor) -> Tensor:
        """(N, latent) → (N, C, H, W)."""
        maps = self.norm(self.project(latent).view(-1, *self.start))
        maps = self.first(F.interpolate(maps, scale_factor=2))
        maps = self.second(F.interpolate(maps, self.size))
        return torch.as_tensor(self.standardise(self.last(maps).tanh()))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)
    )


@door
class GeneratedBatches(Callback):
    """Batches ``(images, labels)`` that a generator invents; the labels are the teacher's.

    Each iteration trains the generator first. Nothing but the generator changes: the student is
    looked at in eval mode, and the teacher is a frozen copy.

    Args:
        student: in training on these batches.
        teacher: what it shall learn.
        settings: how the generator is trained.
        shape: of an image, (C, H, W).
        batch_size: images per batch.
        steps: batches per epoch.
        generator: (N, latent) → (N, C, H, W); an :class:`ImageGenerator` by default.

    Raises:
        UnknownNameError: the layer for features does not exist.
        InputError: the teacher has no linear layer, and no layer for features is named.
    """

    role = "train"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        settings: Generation,
        *,
        shape: tuple[int, int, int],
        batch_size: int,
        steps: int,
        generator: nn.Module | None = None,
    ) -> None:
        self.student, self.settings = student, settings
        self.batch_size, self.steps = batch_size, steps
        self.teacher = copy_module(teacher, where="teacher").eval().requires_grad_(False)
        self.generator = generator or ImageGenerator(settings.latent, shape, settings.width)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=settings.lr)
        self.objectives: list[float] = []
        (self._tap, *_) = find_taps(_features(settings, self.teacher), self.teacher, who="teacher")
        self._recorder = Recorder(self.teacher, [self._tap])

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(self.student.parameters()).device
        self.generator.to(device)
        self.teacher.to(device)
        self.objectives.clear()
        for step in range(self.steps):
            if step % self.settings.student_steps == 0:
                for _ in range(self.settings.steps):
                    self.objectives.append(self._train_generator(device))
            with torch.no_grad():
                images = self.generator.train()(self._latent(device))
                labels = main_tensor(self.teacher(images), where="teacher").argmax(dim=1)
            yield images, labels

    def state_dict(self) -> dict[str, Tensor]:
        """The generator and its optimizer, for a checkpoint."""
        state = {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the state is of another generator.
        """
        prefix = "generator."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        try:
            self.generator.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"it does not fit: {error}", where="generator") from error
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def _latent(self, device: torch.device) -> Tensor:
        return torch.randn(self.batch_size, self.settings.latent, device=device)

    def _train_generator(self, device: torch.device) -> float:
        """One step; the gradients of the two networks are not touched."""
        images = self.generator.train()(self._latent(device))
        answer = main_tensor(self.teacher(images), where="teacher")
        features = self._recorder.records.pop(self._tap.key)
        student = _answer(self.student, images) if self.settings.asks_student else None
        loss = self.settings.objective(student, answer, features)
        if not loss.isfinite():
            raise ModelError(f"the generator's loss is {loss.item()}", where="generator",
                             hint="a lower lr")  # fmt: skip
        parameters = list(self.generator.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def _answer(student: nn.Module, images: Tensor) -> Tensor:
    """The student's logits in eval mode, with gradient into the images."""
    with evaluation(student):
        return main_tensor(student(images), where="student")


def _features(settings: Generation, teacher: nn.Module) -> str | Record:
    named: Any = getattr(settings, "features", None)
    if isinstance(named, str | Record):
        return named
    linear = [name for name, m in teacher.named_modules() if isinstance(m, nn.Linear) and name]
    if linear:
        return Record(module=linear[-1], part="input")
    if not getattr(settings, "activation", 0):
        return ""  # not looked at
    raise InputError(
        "the teacher has no linear layer whose input could be its features",
        where="features",
        hint="name a layer of the teacher",
    )
