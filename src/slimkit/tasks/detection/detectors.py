"""Detectors of every kind as one thing: a loss of a batch, and boxes with scores of images.

Two kinds are known. One takes a tensor of images and has the methods ``loss(predictions, targets,
image_size)`` and ``decode(predictions, image_size)``, as :class:`slimkit.models.picodet.PicoDet`.
The other is torchvision's: a list of images in, losses by name in training, detections in
evaluation; its labels count from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from slimkit.errors import ModelError
from slimkit.inputs import Batch, Inputs
from slimkit.quantize.wrapper import QuantizedModel
from slimkit.tasks.deployment import Part
from slimkit.tasks.detection.scoring import Detections
from slimkit.tasks.detection.torchvision_detectors import (
    class_count,
    is_one_stage,
    is_torchvision,
    one_stage,
    torchvision_distillation,
)

__all__ = [
    "Suppression",
    "classes_of",
    "dense",
    "detector_loss",
    "distillation_losses",
    "finder",
    "is_list_detector",
    "network_of",
    "suppressed",
]


@dataclass(frozen=True)
class Suppression:
    """Non-maximum suppression, class by class.

    Attributes:
        score: boxes below it are left out.
        iou: of two boxes of a class that overlap more, the better one stays.
        before: the best so many candidates enter.
        most: boxes per image in the end.
    """

    score: float = 0.025
    iou: float = 0.6
    before: int = 1000
    most: int = 100

    def __call__(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Boxes (A, 4) and scores (A, classes) of one image → its detections."""
        cells, labels = (scores >= self.score).nonzero(as_tuple=True)
        found = scores[cells, labels]
        if len(found) > self.before:
            found, best = found.topk(self.before)
            cells, labels = cells[best], labels[best]
        corners = clip_boxes_to_image(boxes[cells].float(), size)
        kept = batched_nms(corners, found.float(), labels, self.iou)[: self.most]
        return Detections(corners[kept], found[kept], labels[kept])


def network_of(model: nn.Module) -> nn.Module:
    """The network inside of wrappers (quantized, distributed)."""
    while isinstance(model, (QuantizedModel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = model.model if isinstance(model, QuantizedModel) else model.module
        model = inner
    return model


def is_list_detector(model: nn.Module) -> bool:
    """Whether the model is one of torchvision's.

    Raises:
        ModelError: it is neither of the known kinds.
    """
    network = network_of(model)
    if is_torchvision(network):
        return True
    if callable(getattr(network, "decode", None)) and callable(getattr(network, "loss", None)):
        return False
    raise ModelError(
        f"{type(network).__name__} is no known detector",
        where="model",
        hint="give it loss(predictions, targets, image_size) and decode(predictions, image_size), "
        "or take slimkit:picodet_s or one of torchvision's SSD, RetinaNet, FCOS, Faster R-CNN",
    )


def classes_of(model: nn.Module) -> int:
    """Classes of a detector, without background.

    Raises:
        ModelError: it does not say.
    """
    network: Any = network_of(model)
    if is_list_detector(model):
        return class_count(network)
    count = getattr(network, "num_classes", None)
    if not isinstance(count, int):
        raise ModelError(
            f"{type(network).__name__} does not say how many classes it has",
            where="model",
            hint="give it an attribute num_classes",
        )
    return count


def detector_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    """The sum of the detector's losses, and its outputs.

    Raises:
        ModelError: it has none outside of training mode.
    """
    images = batch.inputs.args[0]
    if is_list_detector(model):
        targets = [
            {"boxes": target["boxes"], "labels": target["labels"] + 1} for target in batch.targets
        ]
        losses = model(list(images), targets)
        if not isinstance(losses, Mapping):
            raise ModelError("its loss exists in training mode only", where="model")
        return torch.stack([value.float() for value in losses.values()]).sum(), losses
    predictions = batch.inputs.run(model)
    network: Any = network_of(model)
    terms = network.loss(predictions, batch.targets, tuple(images.shape[-2:]))
    return torch.stack([value.float() for value in terms.values()]).sum(), predictions


def distillation_losses(model: nn.Module) -> list[dict[str, Any]]:
    """Losses by which a detector's own original teaches it: features, scores, boxes.

    A detector with ``decode`` says them by a method ``distillation()``; without one there are
    none. Of torchvision's, the features are those of the backbone's levels; the boxes of SSD, and
    scores and boxes of Faster R-CNN, belong to what each network matched for itself.
    """
    network: Any = network_of(model)
    if not is_list_detector(model):
        own = getattr(network, "distillation", None)
        return list(own()) if callable(own) else []
    return torchvision_distillation(network)


def dense(model: nn.Module) -> Part:
    """``model`` as a function of images (N, C, H, W) to what is found before suppression.

    Returns:
        A module whose forward gives ``boxes`` (N, A, 4) in pixels of the images and ``scores``
        (N, A, classes) by name.

    Raises:
        ModelError: the detector decides on boxes inside of its forward.
    """
    if not is_list_detector(model):
        return Part(model, _decoded)
    network = network_of(model)
    if not is_one_stage(network):
        raise ModelError(
            f"{type(network).__name__} cannot be written into a file: it decides inside of its "
            "forward which regions to look at",
            where="model",
            hint="a one-stage detector can: SSDLite, RetinaNet, FCOS, PicoDet",
        )
    return Part(model, one_stage)


def finder(model: nn.Module, suppression: Suppression) -> Callable[[Inputs], list[Detections]]:
    """What a detector in evaluation mode finds in each image, in pixels of the input."""
    if is_list_detector(model) and not is_one_stage(network_of(model)):
        return lambda inputs: [
            Detections(answer["boxes"], answer["scores"], answer["labels"] - 1)
            for answer in model(list(inputs.args[0]))
        ]
    part = dense(model)

    def found(inputs: Inputs) -> list[Detections]:
        images = inputs.args[0]
        groups = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        return [one for group in groups for one in suppressed(part(group), group, suppression)]

    return found


def suppressed(
    outputs: Mapping[str, Tensor], images: Tensor, suppression: Suppression
) -> list[Detections]:
    """The detections in dense outputs, image by image."""
    size = images.shape[-2], images.shape[-1]
    pairs = zip(outputs["boxes"], outputs["scores"], strict=True)
    return [suppression(boxes, scores, size) for boxes, scores in pairs]


def _decoded(network: Any, images: Tensor) -> dict[str, Tensor]:
    """The forward of a detector with ``decode``."""
    predictions = type(network).forward(network, images)
    boxes, scores = network.decode(predictions, (images.shape[-2], images.shape[-1]))
    return {"boxes": boxes, "scores": scores}
