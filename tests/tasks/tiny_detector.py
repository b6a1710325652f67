"""A detector of four convolutions with PicoDet's loss, for tests that export it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimkit.models.picodet import PicoDet
from slimkit.models.picodet.blocks import ConvNorm
from slimkit.models.picodet.head import CellPredictions, PicoHead


class TinyDetector(PicoDet):
    strides = (8,)

    def __init__(self, num_classes: int = 10) -> None:
        nn.Module.__init__(self)
        self.num_classes = num_classes
        self.body = nn.Sequential(
            ConvNorm(3, 8, 3, 2), ConvNorm(8, 16, 3, 2), ConvNorm(16, 16, 3, 2)
        )
        self.head = PicoHead(16, 1, num_classes, 0, self.bins)
        self.head.initialise()

    def forward(self, images: Tensor) -> CellPredictions:
        predictions: CellPredictions = self.head([self.body(images)])
        return predictions


def tiny_detector(num_classes: int = 10) -> TinyDetector:
    torch.manual_seed(0)
    return TinyDetector(num_classes)
