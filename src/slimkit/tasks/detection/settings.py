"""What a recipe says about the data of a detector."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["BoxAugmentSettings", "DetectionDataSettings"]

_Share = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=32, le=4096)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of RGB in [0, 1]; what almost every published backbone was trained with."""


class BoxAugmentSettings(BaseModel):
    """Random changes of training images and their boxes, drawn per image and epoch.

    Attributes:
        flip: share of images mirrored left to right.
        vertical_flip: share mirrored top to bottom (cells and satellites have no up).
        scale: a part of this size relative to the image, from … to, is cut out at a random place
            and brought to the input's size; above 1 the image shrinks on a grey ground. ``None``
            does not.
        aspect: the part's aspect ratio changes by up to this factor, either way.
        colour: strength of changes of brightness, contrast, saturation and hue, 0 … 1.
        mosaic: share of images joined with three others (Bochkovskiy et al. 2020, YOLOv4).
        mixup: share of images blended with another one, boxes of both (Zhang et al. 2019).
        min_visible: a box of which less than this part is left is taken away.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip: _Share = 0.5
    vertical_flip: _Share = 0.0
    scale: tuple[Annotated[float, Field(ge=0.1, le=4)], Annotated[float, Field(ge=0.1, le=4)]] | (
        None
    ) = (0.6, 1.3)
    aspect: float = Field(1.15, ge=1, le=2)
    colour: _Share = 0.3
    mosaic: _Share = 0.0
    mixup: _Share = 0.0
    min_visible: _Share = 0.3

    @model_validator(mode="after")
    def _in_order(self) -> BoxAugmentSettings:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(f"scale goes from {self.scale[0]} to {self.scale[1]}: swap them")
        return self


class DetectionDataSettings(BaseModel):
    """Where scenes come from and how batches are made of them.

    Attributes:
        source: ``"digit-scenes"``, ``"coco:DIR"``, ``"voc:DIR"`` or ``"yolo:DIR"``. A relative
            folder is looked for here, then under ``$SLIMKIT_DATA``.
        image_size: height and width of the input in pixels, one number for both; ``None`` keeps
            every image's own size (for detectors that take a list of images).
        resize: ``"stretch"`` changes the aspect ratio, ``"letterbox"`` keeps it and pads.
        batch_size: images per training step and process.
        eval_batch_size: images per batch of calibration, validation and test.
        validation: share or number of training scenes to select by, where the source has no
            validation split beside its test split.
        augment: random changes of training images.
        mean, std: per channel, of images in [0, 1].
        limit: use at most so many scenes of each split (a quick look); ``None`` uses all.
        on_bad_annotation: boxes outside of their image, of zero size, of unknown categories,
            missing files: ``"skip"`` leaves them out and counts them in the report.
        workers: processes that read ahead; 0 reads in this one.
        seed: of the validation split and of ``limit``; not of training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "digit-scenes"
    image_size: _Side | tuple[_Side, _Side] | None = None
    resize: Literal["stretch", "letterbox"] = "stretch"
    batch_size: int = Field(16, ge=1, le=4096)
    eval_batch_size: int = Field(16, ge=1, le=4096)
    validation: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0, lt=2**31)] = 0.1
    augment: BoxAugmentSettings = BoxAugmentSettings()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[
        Annotated[float, Field(gt=0, le=1e6)],
        Annotated[float, Field(gt=0, le=1e6)],
        Annotated[float, Field(gt=0, le=1e6)],
    ] = IMAGENET_STD
    limit: int | None = Field(None, ge=1, lt=2**31)
    on_bad_annotation: Literal["error", "skip"] = "skip"
    workers: int = Field(0, ge=0, le=64)
    seed: int = 0

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the input; None keeps every image's own."""
        if self.image_size is None or isinstance(self.image_size, tuple):
            return self.image_size
        return self.image_size, self.image_size
