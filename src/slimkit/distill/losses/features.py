"""Settings of losses on features, element by element: mimic, L1, CWD, PKD, AB, OFD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from slimkit import losses
from slimkit.distill.losses.connectors import ConnectorChoice, ConnectorField, connect
from slimkit.distill.losses.interface import DISTILL_LOSSES, DistillLoss
from slimkit.distill.losses.modules import MarginReLU
from slimkit.distill.losses.projection import Shape
from slimkit.distill.recording.records import RecordPath

__all__ = [
    "CWD",
    "L1",
    "OFD",
    "PKD",
    "ActivationBoundary",
    "FeatureLoss",
    "Mimic",
    "OptionalLayerLoss",
]


class OptionalLayerLoss(DistillLoss):
    """Base of losses on a layer or on the outputs.

    Attributes:
        connector: between layers whose shapes differ; the outputs of the networks are compared
            as they are. ``"auto"`` adds a 1×1 convolution only where the widths differ and
            resizes only where the maps differ; ``"none"`` adds nothing; a name, a mapping or a
            list builds what it says, see :mod:`slimkit.distill.losses.connectors`.
    """

    connector: Annotated[ConnectorChoice, ConnectorField()] = "auto"

    @property
    def needs_shapes(self) -> bool:
        """See the base class."""
        return self.student is not None and self.connector != "none"

    def connect(self, student: Shape, teacher: Shape) -> nn.Module | None:
        """See the base class."""
        if self.student is None:
            return None
        return connect(self.connector, student, teacher, where=str(self.student))


class FeatureLoss(OptionalLayerLoss):
    """Base of losses on a layer.

    Attributes:
        student: path of the student's layer (required).
    """

    student: RecordPath


@DISTILL_LOSSES.register("mimic")
class Mimic(FeatureLoss):
    """Features of a layer, through a 1×1 connector (FitNets); see :func:`slimkit.losses.mimic`.

    Attributes:
        normalize: compare directions of the channel vectors instead of values.
    """

    type: Literal["mimic"] = "mimic"
    normalize: bool = False

    def compute(
        self, student: Tensor, teacher: Tensor, sample_weights: Tensor | None = None
    ) -> Tensor:
        """See the base class."""
        return losses.mimic(student, teacher, self.normalize, sample_weights)


@DISTILL_LOSSES.register("l1")
class L1(OptionalLayerLoss):
    """Absolute distance of features, or of class scores; see :func:`slimkit.losses.l1`."""

    type: Literal["l1"] = "l1"

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.l1(student, teacher)


@DISTILL_LOSSES.register("cwd")
class CWD(FeatureLoss):
    """Where each channel is active (Shu et al. 2021); see :func:`slimkit.losses.cwd`.

    Attributes:
        temperature: τ > 0.
    """

    type: Literal["cwd"] = "cwd"
    temperature: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.cwd(student, teacher, self.temperature)


@DISTILL_LOSSES.register("pkd")
class PKD(FeatureLoss):
    """Correlation of feature maps (Cao et al. 2022); see :func:`slimkit.losses.pkd`."""

    type: Literal["pkd"] = "pkd"

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.pkd(student, teacher)


@DISTILL_LOSSES.register("activation_boundary")
class ActivationBoundary(FeatureLoss):
    """Which neurons fire (Heo et al. 2019); see :func:`slimkit.losses.activation_boundary`.

    Layers in front of the activation function have a boundary to learn: a batch norm.

    Attributes:
        margin: > 0.
    """

    type: Literal["activation_boundary"] = "activation_boundary"
    margin: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.activation_boundary(student, teacher, self.margin)


@DISTILL_LOSSES.register("ofd")
class OFD(FeatureLoss):
    """Features in front of the ReLU, with a margin (Heo et al. 2019); :func:`slimkit.losses.ofd`.

    The teacher's layer is the batch norm in front of the activation function: the margin of
    each channel follows from its scale and shift.
    """

    type: Literal["ofd"] = "ofd"

    @property
    def needs_shapes(self) -> bool:
        """See the base class."""
        return True

    def parts(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """See the base class."""
        margin = MarginReLU.of(layers.get("teacher"), where=str(self.teacher_layer))
        return {**super().parts(shapes, layers), "teacher": margin}

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.ofd(student, teacher)
