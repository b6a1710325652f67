"""What a recipe says about the data of a segmenter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["MaskAugmentSettings", "SegmentationDataSettings"]

_Share = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=16, le=4096)]
_Scale = Annotated[float, Field(ge=0.1, le=4)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of RGB in [0, 1]; what almost every published backbone was trained with."""


class MaskAugmentSettings(BaseModel):
    """Random changes of training images together with their masks, drawn per image and epoch.

    Attributes:
        flip: share of images mirrored left to right.
        scale: images are enlarged or shrunk by a factor from … to, then a part of the input's size
            is cut out at a random place; what lies outside is void. ``None`` does not.
        colour: strength of changes of brightness, contrast and saturation, 0 … 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip: _Share = 0.5
    scale: tuple[_Scale, _Scale] | None = (0.75, 1.5)
    colour: _Share = 0.3

    @model_validator(mode="after")
    def _in_order(self) -> MaskAugmentSettings:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(f"scale goes from {self.scale[0]} to {self.scale[1]}: swap them")
        return self


class SegmentationDataSettings(BaseModel):
    """Where images and masks come from and how batches are made of them.

    Attributes:
        source: ``"digit-masks"`` or ``"masks:DIR"`` with ``images/SPLIT`` and ``masks/SPLIT``,
            where SPLIT is ``train`` and ``test`` or ``val``, and perhaps ``classes.txt``. A
            relative folder is looked for here, then under ``$SLIMKIT_DATA``.
        image_size: height and width of the input in pixels, one number for both; ``None`` keeps
            the size of the images, which must then all be equal.
        void: value of pixels in mask files that belong to no class, beside 255; ``None`` for 255
            alone.
        batch_size: images per training step and process.
        eval_batch_size: images per batch of calibration, validation and test.
        validation: share or number of training images to select by, where the source has no
            validation split beside its test split.
        augment: random changes of training images.
        mean, std: per channel, of images in [0, 1].
        limit: use at most so many images of each split (a quick look); ``None`` uses all.
        on_bad_mask: images without a mask, masks of another size, of colours instead of numbers,
            or with numbers beyond the classes: ``"skip"`` leaves them out and counts them in the
            report.
        workers: processes that read ahead; 0 reads in this one.
        seed: of the validation split and of ``limit``; not of training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "digit-masks"
    image_size: _Side | tuple[_Side, _Side] | None = None
    void: int | None = Field(None, ge=0, le=255)
    batch_size: int = Field(16, ge=1, le=4096)
    eval_batch_size: int = Field(16, ge=1, le=4096)
    validation: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)] = 0.1
    augment: MaskAugmentSettings = MaskAugmentSettings()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[
        Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
    ] = IMAGENET_STD
    limit: int | None = Field(None, ge=1, le=10**9)
    on_bad_mask: Literal["error", "skip"] = "error"
    workers: int = Field(0, ge=0, le=64)
    seed: int = Field(0, ge=0, lt=2**31)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the input; None keeps the images' own."""
        if self.image_size is None or isinstance(self.image_size, tuple):
            return self.image_size
        return self.image_size, self.image_size
