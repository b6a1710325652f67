"""PicoDet: backbone, neck and head together, and the loss that trains them.

Yu et al. 2021, "PP-PicoDet: A Better Real-Time Object Detector on Mobile Devices"
(https://arxiv.org/abs/2111.00902).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from slimkit.errors import InputError, ModelError, nearest
from slimkit.losses.detection import (
    box_iou_pairs,
    distribution_focal,
    giou,
    simota,
    varifocal,
)
from slimkit.models.cells import Cells, boxes_at, cells_of, distances_to, mean_distances
from slimkit.models.initialisation import initialise
from slimkit.models.picodet.csp_pan import CSPPAN
from slimkit.models.picodet.esnet import ESNet
from slimkit.models.picodet.head import CellPredictions, PicoHead
from slimkit.models.picodet.lcnet import LCNet

__all__ = ["PicoDet", "picodet_l", "picodet_m", "picodet_s"]

_RATIOS_S = (0.875, 0.5, 0.5, 0.5, 0.625, 0.5, 0.625, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
_RATIOS_M = (0.875, 0.5, 1.0, 0.625, 0.5, 0.75, 0.625, 0.625, 0.5, 0.625, 1.0, 0.625, 0.75)
"""Inner widths of ESNet's blocks, which a search found (section 3.1 and the released settings)."""

_LOSS_WEIGHTS = {"varifocal": 1.0, "giou": 2.0, "distribution": 0.25}
"""Section 3.4, equation 1."""


class PicoDet(nn.Module):
    """An anchor-free one-stage detector.

    Args:
        num_classes: of objects.
        scale: width of the backbone.
        ratios: inner widths of its 13 blocks.
        neck: channels of the neck and the head.
        layers: depthwise separable convolutions per level in the head.
        in_channels: of the image.
        backbone: ``"esnet"``, or ``"lcnet"``: fewer and plainer layers, without ``ratios``.

    Attributes:
        image_size: pixels a side that the published networks were trained with; any other works.
        strides: of the four levels, in pixels.
        bins: whole distances that a side is spread over.

    Raises:
        ModelError: a width is impossible.
    """

    image_size: int = 320
    strides: tuple[int, ...] = (8, 16, 32, 64)
    bins: int = 8

    def __init__(
        self,
        num_classes: int = 80,
        scale: float = 1.0,
        ratios: Sequence[float] = _RATIOS_M,
        neck: int = 128,
        layers: int = 4,
        in_channels: int = 3,
        backbone: Literal["esnet", "lcnet"] = "esnet",
    ) -> None:
        super().__init__()
        if backbone not in {"esnet", "lcnet"}:
            hint = nearest(str(backbone), ("esnet", "lcnet"))
            raise ModelError(f"unknown backbone {backbone!r}", where="backbone", hint=hint)
        self.num_classes = num_classes
        self.backbone: ESNet | LCNet = (
            ESNet(scale, ratios, in_channels) if backbone == "esnet" else LCNet(scale, in_channels)
        )
        self.neck = CSPPAN(self.backbone.channels, neck)
        self.head = PicoHead(neck, len(self.strides), num_classes, layers, self.bins)
        initialise(self)
        self.head.initialise()

    def forward(self, images: Tensor) -> CellPredictions:
        """Normalised images (N, in_channels, H, W) → predictions of all cells."""
        predictions: CellPredictions = self.head(self.neck(self.backbone(images)))
        return predictions

    def decode(
        self, predictions: CellPredictions, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Boxes and scores of every cell, before non-maximum suppression.

        Args:
            predictions: of :meth:`forward`.
            image_size: height and width of the images in pixels.

        Returns:
            Boxes x1, y1, x2, y2 in pixels (N, cells, 4), and probabilities (N, cells, classes).
        """
        logits, distances = predictions
        cells = cells_of(image_size, self.strides, device=logits.device)
        return boxes_at(cells, mean_distances(distances)), logits.sigmoid()

    def distillation(self) -> list[dict[str, Any]]:
        """Losses by which a network of the same levels teaches this one, as a recipe says them.

        Features of the neck by correlation, scores of all cells, and the distributions of the
        sides where the teacher sees something.
        """
        logits, distances = ({"module": "head", "index": index} for index in (0, 1))
        levels = range(len(self.strides))
        features: list[dict[str, Any]] = [
            {"type": "pkd", "student": {"module": "neck", "index": level}, "weight": 0.25}
            for level in levels
        ]
        boxes = {"student": distances, "teacher_scores": logits, "bins": self.bins}
        return [
            *features,
            {"type": "quality_kd", "student": logits},
            {"type": "localization_kd", **boxes},
        ]

    def adapted_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a network with another number of classes, as a start for this one.

        The scores of the new classes keep the fresh weights, everything else is taken: backbone,
        neck, the towers of the head, and the distances of the sides.
        """
        adapted = dict(tensors)
        sides = 4 * self.bins
        for name, own in self.state_dict().items():
            given = tensors.get(name)
            if not name.startswith("head.outputs.") or given is None or given.shape == own.shape:
                continue
            if given.shape[1:] == own.shape[1:] and len(given) > sides:
                adapted[name] = torch.cat([own[: self.num_classes], given[-sides:].to(own)])
        return adapted

    def loss(
        self,
        predictions: CellPredictions,
        targets: Sequence[Mapping[str, Any]],
        image_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Varifocal, GIoU and distribution focal loss of cells that SimOTA assigns.

        Args:
            predictions: of :meth:`forward`.
            targets: per image ``boxes``, x1, y1, x2, y2 in pixels (G, 4), and ``labels``, int64
                (G,); both may be empty.
            image_size: height and width in pixels.

        Returns:
            The three terms by name, weighted; their sum is to be minimised.

        Raises:
            InputError: not one target per image, or a label that is no class.
        """
        logits, distances = (part.float() for part in predictions)
        if len(targets) != len(logits):
            raise InputError(f"{len(targets)} targets for {len(logits)} images", where="targets")
        cells = cells_of(image_size, self.strides, device=logits.device)
        chosen = self._assigned(logits, distances, targets, cells)
        positives = max(1, len(chosen.cells))
        quality = torch.zeros_like(logits)
        if not len(chosen.cells):
            # nothing to place: still a term of the graph, so that every weight has a gradient
            losses = {"varifocal": varifocal(logits, quality).sum() / positives}
            return losses | {"giou": distances.sum() * 0, "distribution": distances.sum() * 0}
        # all positives of the batch in one gather: the gradient of each costs a whole tensor
        places = chosen.images, chosen.cells
        here = Cells(cells.centres[chosen.cells], cells.strides[chosen.cells])
        sides = distances[places]
        found = boxes_at(here, mean_distances(sides))
        quality[(*places, chosen.labels)] = box_iou_pairs(found.detach(), chosen.boxes)
        weight = logits.detach()[places].sigmoid().amax(1)
        total = weight.sum().clamp(min=1e-6)
        aims = distances_to(here, chosen.boxes, largest=self.bins - 1 - 0.01)
        losses = {
            "varifocal": varifocal(logits, quality).sum() / positives,
            "giou": (giou(found, chosen.boxes) * weight).sum() / total,
            "distribution": (distribution_focal(sides, aims) * weight).sum() / total,
        }
        return {name: _LOSS_WEIGHTS[name] * value for name, value in losses.items()}

    @torch.no_grad()
    def _assigned(
        self,
        logits: Tensor,
        distances: Tensor,
        targets: Sequence[Mapping[str, Any]],
        cells: Cells,
    ) -> _Positives:
        """SimOTA of every image."""
        boxes = boxes_at(cells, mean_distances(distances))
        parts: list[tuple[Tensor, ...]] = []
        for number, target in enumerate(targets):
            truth, labels = _checked(target, self.num_classes, number)
            objects = simota(
                logits[number], boxes[number], cells.centres, cells.strides, truth, labels
            )
            positive = (objects >= 0).nonzero().flatten()
            wanted = objects[positive]
            image = torch.full_like(positive, number)
            parts.append((image, positive, truth[wanted], labels[wanted]))
        return _Positives(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Positives(NamedTuple):
    """Cells that predict an object, of all images of a batch.

    Attributes:
        images: number of the image of each, int64 (P,).
        cells: number of the cell in it, int64 (P,).
        boxes: of its object, x1, y1, x2, y2 in pixels (P, 4).
        labels: of its object, int64 (P,).
    """

    images: Tensor
    cells: Tensor
    boxes: Tensor
    labels: Tensor


def _checked(target: Mapping[str, Any], num_classes: int, number: int) -> tuple[Tensor, Tensor]:
    boxes: Tensor = target["boxes"].reshape(-1, 4).float()
    labels: Tensor = target["labels"].reshape(-1).long()
    if len(boxes) != len(labels):
        raise InputError(f"{len(boxes)} boxes but {len(labels)} labels", where=f"targets[{number}]")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InputError(
            f"labels {int(labels.min())} … {int(labels.max())}, but the network has "
            f"{num_classes} classes",
            where=f"targets[{number}].labels",
        )
    return boxes, labels


def picodet_s(num_classes: int = 80, in_channels: int = 3) -> PicoDet:
    """PicoDet-S: 0.99 M parameters with 80 classes."""
    return PicoDet(num_classes, 0.75, _RATIOS_S, 96, 2, in_channels)


def picodet_m(num_classes: int = 80, in_channels: int = 3) -> PicoDet:
    """PicoDet-M: 2.15 M parameters with 80 classes."""
    return PicoDet(num_classes, 1.0, _RATIOS_M, 128, 4, in_channels)


def picodet_l(num_classes: int = 80, in_channels: int = 3) -> PicoDet:
    """PicoDet-L: 3.31 M parameters with 80 classes."""
    return PicoDet(num_classes, 1.25, _RATIOS_M, 160, 4, in_channels)
