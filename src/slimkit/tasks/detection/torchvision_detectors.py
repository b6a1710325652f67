"""Torchvision's detectors: how many classes they have, and one-stage ones without their lists.

SSD, SSDLite, RetinaNet and FCOS answer about a fixed set of anchors, so that images of one size
lead to tensors of one shape; non-maximum suppression follows outside. Faster R-CNN and what is
built on it decide inside of their forward which regions to look at: they have no such form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from slimkit.errors import ModelError
from slimkit.modules import evaluation

__all__ = ["class_count", "is_one_stage", "is_torchvision", "one_stage", "torchvision_distillation"]


def is_torchvision(network: nn.Module) -> bool:
    """Whether it takes a list of images and computes its loss itself."""
    return isinstance(network, (FCOS, SSD, RetinaNet, FasterRCNN))


def is_one_stage(network: nn.Module) -> bool:
    """Whether :func:`one_stage` knows it."""
    return isinstance(network, (FCOS, SSD, RetinaNet))


def class_count(network: Any) -> int:
    """Classes without background.

    Raises:
        ModelError: the head is another one than torchvision's.
    """
    try:
        if isinstance(network, FasterRCNN):
            return int(network.roi_heads.box_predictor.cls_score.out_features) - 1
        head = network.head.classification_head
        return int(head.num_columns if isinstance(network, SSD) else head.num_classes) - 1
    except AttributeError as error:
        raise ModelError(f"the number of its classes is unknown: {error}", where="model") from error


def one_stage(network: Any, images: Tensor) -> dict[str, Tensor]:
    """The forward of a one-stage detector as tensors alone.

    Args:
        network: SSD, RetinaNet or FCOS in evaluation mode.
        images: float (N, 3, H, W) in 0 … 1, as the detector's own list of images.

    Returns:
        ``boxes`` (N, A, 4) in pixels of the images, before suppression, and ``scores``
        (N, A, classes) without background.
    """
    height, width = images.shape[-2:]
    x, size = _transformed(network.transform, images)
    features = network.backbone(x)
    levels = [features] if isinstance(features, Tensor) else list(features.values())
    answers = network.head(levels)
    anchors = network.anchor_generator(ImageList(x[:1], [size]), levels)[0]
    regression = answers["bbox_regression"]
    relative = regression.reshape(-1, 4)
    repeated = anchors.repeat(x.shape[0], 1)
    if isinstance(network, FCOS):
        boxes = network.box_coder.decode(relative, repeated)
        quality = answers["cls_logits"].sigmoid() * answers["bbox_ctrness"].sigmoid()
        scores = quality.sqrt()
    else:
        boxes = network.box_coder.decode_single(relative, repeated)
        logits = answers["cls_logits"]
        scores = logits.softmax(-1) if isinstance(network, SSD) else logits.sigmoid()
    grow = boxes.new_tensor([width / size[1], height / size[0]] * 2)
    return {"boxes": boxes.reshape(regression.shape) * grow, "scores": scores[..., 1:]}


@torch.no_grad()
def torchvision_distillation(network: Any) -> list[dict[str, Any]]:
    """Losses between a detector and its original: features, and scores and boxes of all anchors."""
    smallest = int(min(network.transform.min_size))
    probe = torch.zeros(1, 3, smallest, smallest, device=next(network.parameters()).device)
    with evaluation(network):
        features = network.backbone(probe)
    names = [None] if isinstance(features, Tensor) else list(features)
    losses: list[dict[str, Any]] = [
        {"type": "pkd", "student": {"module": "backbone", "index": name}, "weight": 1 / len(names)}
        for name in names
    ]
    if isinstance(network, (FCOS, RetinaNet)):
        scores = {"module": "head", "index": "cls_logits"}
        sides = {"module": "head", "index": "bbox_regression"}
        losses += [
            {"type": "quality_kd", "student": scores},
            {"type": "localization_kd", "student": sides, "teacher_scores": scores, "bins": 1},
        ]
    return losses


def _transformed(transform: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Normalised, resized and padded as the detector does it; and the size before padding."""
    blank, _ = transform([torch.zeros_like(images[0])])
    size: tuple[int, int] = blank.image_sizes[0]
    rows, columns = blank.tensors.shape[-2:]
    mean = images.new_tensor(transform.image_mean).view(-1, 1, 1)
    std = images.new_tensor(transform.image_std).view(-1, 1, 1)
    x = (images - mean) / std
    if tuple(images.shape[-2:]) != tuple(size):
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return F.pad(x, (0, columns - size[1], 0, rows - size[0])), size
