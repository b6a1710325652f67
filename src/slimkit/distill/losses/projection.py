"""The usual connector: a linear projection of channels, then a resize, to a teacher's shape."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.errors import ModelError

__all__ = ["Connector", "Shape", "build_connector", "projection", "seeded"]

Shape = tuple[int, ...]
"""Sizes of a record: (N, C, H, W), (N, L, C) or (N, C)."""

_INIT_SEED = 0
"""A connector starts with the same weights in every run, and takes nothing from the global RNG."""


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Layers built inside start the same in every run; the global random state is put back."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(_INIT_SEED)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Connector(nn.Module):
    """A 1×1 convolution (or linear layer), then a resize, from one feature shape to another.

    Args:
        project: maps the channels, or None when the widths agree.
        size: height and width to bring the maps to, or None when they agree.
    """

    def __init__(self, project: nn.Module | None, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.project = project
        self.size = size

    def forward(self, features: Tensor) -> Tensor:
        """(N, C_student, H, W) → (N, C_teacher, H', W'); other ranks keep their middle sizes."""
        if self.project is not None:
            features = self.project(features)
        if self.size is None:
            return features
        height, width = features.shape[-2:]
        if height >= self.size[0] and width >= self.size[1]:
            return F.adaptive_avg_pool2d(features, self.size)
        return F.interpolate(features, self.size, mode="bilinear", align_corners=False)


def build_connector(
    student: Shape, teacher: Shape, *, always: bool = False, where: str
) -> Connector | None:
    """The connector between two feature shapes, None when they agree.

    Args:
        student: (N, C, H, W), (N, L, C) or (N, C).
        teacher: a shape of the same rank; for (N, L, C) with the same length L.
        always: add the projection even where the shapes agree.
        where: the student's layer, for the error.

    Raises:
        ModelError: the ranks differ, or are none of the above.
    """
    rank = len(student)
    channels = 1 if rank == 4 else rank - 1
    fits = rank == len(teacher) and rank in (2, 3, 4)
    if not fits or (rank == 3 and student[1] != teacher[1]):
        raise ModelError(
            f"no connector joins the student's features {student} and the teacher's {teacher}",
            where=where,
            hint="record layers whose outputs are both (N, C, H, W), (N, L, C) or (N, C)",
        )
    project: nn.Module | None = None
    if always or student[channels] != teacher[channels]:
        project = projection(rank, student[channels], teacher[channels])
    size = None
    if rank == 4 and student[2:] != teacher[2:]:
        size = (teacher[2], teacher[3])
    return Connector(project, size) if project is not None or size is not None else None


def projection(rank: int, inputs: int, outputs: int) -> nn.Module:
    """A linear map over channels with variance-preserving weights and zero bias.

    Args:
        rank: of what goes in; 4 for maps (N, C, H, W), else channels come last.
        inputs: channels of it.
        outputs: channels of what comes out.
    """
    # built on the meta device, so that the default initialisation draws no random numbers
    project: nn.Module = (
        nn.Conv2d(inputs, outputs, 1, device="meta")
        if rank == 4
        else nn.Linear(inputs, outputs, device="meta")
    ).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(_INIT_SEED)
    with torch.no_grad():
        for name, parameter in project.named_parameters():
            if name == "bias":
                parameter.zero_()
            else:
                parameter.normal_(0, 1 / math.sqrt(inputs), generator=generator)
    return project
