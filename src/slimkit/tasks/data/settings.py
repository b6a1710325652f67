"""What a recipe says about its data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimkit.doors import door

__all__ = ["AugmentSettings", "DataSettings"]

_Unit = Annotated[float, Field(gt=0, le=1)]


@door
class AugmentSettings(BaseModel):
    """Random changes of training images, drawn per image and epoch.

    Attributes:
        crop: pad every side by so many black pixels and cut the original size out at random.
        flip: mirror left to right with probability ½.
        scale: cut out a random part of at least this fraction of the area (and an aspect ratio
            of ¾ to 4/3) and enlarge it to the full size; ``None`` does not.
        cutout: black out a square of so many pixels at a random place (DeVries & Taylor 2017).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop: int = Field(0, ge=0, le=4096)
    flip: bool = False
    scale: _Unit | None = None
    cutout: int = Field(0, ge=0, le=4096)


@door
class DataSettings(BaseModel):
    """Where images come from and how batches are made of them.

    Attributes:
        source: ``"digits"``, ``"parquet:DIR"``, ``"imagefolder:DIR"``, ``"torchvision:NAME"``,
            ``"images:DIR"`` (without labels, for calibration), or ``"package.module:function"``
            that returns data sets of one's own. A relative folder is looked for here, then under
            ``$SLIMKIT_DATA``.
        image_size: height and width in pixels; the short side is resized to it and the centre
            cut out. ``None`` keeps the size of the images, which must then all be equal.
        channels: 1 (grey) or 3 (RGB); ``None`` takes what the source has.
        crop_fraction: part of the resized image that the centre crop keeps per side
            (0.875 is usual for ImageNet: resize to 256, cut out 224).
        batch_size: images per training step and process.
        eval_batch_size: images per batch of calibration, validation and test.
        validation: images taken from the training split to select by, as a fraction or a
            number; drawn in proportion to the classes, always the same ones. Not used when the
            source brings its own validation split beside a test split.
        augment: random changes of training images.
        mean, std: per channel, of images in [0, 1]; ``None`` measures the training split.
        limit: use at most so many images of each split (a quick look); ``None`` uses all.
        on_bad_image: an unreadable image is an ``"error"``, or is ``"skip"``-ped and counted.
        cache: keep decoded images in ``"memory"``, read ``"files"`` again each epoch, or
            decide by the memory that is free (``"auto"``). Only ``imagefolder:`` can leave
            them in files; other sources are always decoded into memory.
        seed: of the validation split and of ``limit``; not of training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "digits"
    image_size: int | None = Field(None, ge=4, le=4096)
    channels: Literal[1, 3] | None = None
    crop_fraction: _Unit = 1.0
    batch_size: int = Field(128, ge=1, le=65_536)
    eval_batch_size: int = Field(256, ge=1, le=65_536)
    validation: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0, lt=2**31)] = 0.1
    augment: AugmentSettings = AugmentSettings()
    mean: tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...] | None = None
    std: tuple[Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)], ...] | None = None
    limit: int | None = Field(None, ge=1, lt=2**31)
    on_bad_image: Literal["error", "skip"] = "error"
    cache: Literal["auto", "memory", "files"] = "auto"
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _mean_with_std(self) -> DataSettings:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means but {len(self.std)} standard deviations")
        return self
