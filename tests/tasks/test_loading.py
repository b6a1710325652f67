"""Every source gives the same kind of splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slimkit.errors import DataError
from slimkit.tasks.data import AugmentSettings, DataSettings, ImageSplits, load_data, synthetic_data


def raw(loader: object, splits: ImageSplits) -> torch.Tensor:
    """All images of a loader as numbers 0 … 255, (N, C, H, W)."""
    mean = torch.tensor(splits.preprocessing["mean"]).view(1, -1, 1, 1)
    std = torch.tensor(splits.preprocessing["std"]).view(1, -1, 1, 1)
    images = torch.cat([images for images, _ in loader])  # type: ignore[attr-defined]
    return (images * std + mean) * 255


def test_digits_are_split_as_documented() -> None:
    splits = load_data(DataSettings(image_size=16, validation=0.1))
    assert splits.shape == (1, 16, 16)
    assert splits.test.samples == 540
    assert splits.train.samples + splits.validation.samples == 1257
    assert splits.validation.samples == 126
    assert splits.calibration.samples == splits.train.samples
    assert [splits.train.role, splits.calibration.role] == ["train", "train"]
    assert [splits.validation.role, splits.test.role] == ["validation", "test"]
    shares = torch.bincount(splits.test.labels).float() / 540
    assert shares == pytest.approx(torch.full((10,), 0.1), abs=0.005)


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    splits = load_data(DataSettings(validation=0, mean=(0,), std=(1,)))
    ours = torch.cat([raw(splits.calibration, splits), raw(splits.test, splits)])
    theirs = torch.from_numpy(load_digits().images) * 255 / 16
    assert ours.sum(dim=(1, 2, 3)).sort().values == pytest.approx(
        theirs.round().sum(dim=(1, 2)).sort().values.float(), rel=1e-4
    )
    assert splits.validation is None


def test_splits_do_not_overlap_and_are_stable() -> None:
    first, second = (load_data(DataSettings(validation=200)) for _ in range(2))
    parts = [first.train.indices, first.validation.indices]
    assert len(torch.cat(parts).unique()) == sum(len(part) for part in parts)
    assert torch.equal(first.validation.indices, second.validation.indices)
    assert first.fingerprint == second.fingerprint


def test_statistics_are_those_of_the_training_images() -> None:
    splits = load_data(DataSettings())
    images = torch.cat([images for images, _ in splits.calibration])
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)
    assert splits.preprocessing["mean"] == [round(m, 4) for m in splits.preprocessing["mean"]]


def test_given_statistics_are_used_and_repeated_over_channels() -> None:
    splits = load_data(DataSettings(channels=3, mean=(0.5,), std=(0.25,)))
    assert splits.shape == (3, 8, 8)
    assert splits.preprocessing["mean"] == [0.5] * 3
    images, _ = next(iter(splits.test))
    assert images.min().item() == pytest.approx(-2)


def test_parquet_files_are_joined_and_classes_named(parquet_folder: Path) -> None:
    splits = load_data(DataSettings(source=f"parquet:{parquet_folder}", validation=3, batch_size=4))
    assert splits.classes == ["cat", "dog", "owl"]
    assert (splits.train.samples, splits.validation.samples, splits.test.samples) == (21, 3, 12)
    assert torch.bincount(splits.validation.labels).tolist() == [1, 1, 1]
    means = raw(splits.test, splits).mean(dim=(1, 2, 3))
    assert torch.equal(means.div(60).floor().long(), splits.test.labels)  # image and label match


def test_folder_and_parquet_give_equal_pixels(image_folder: Path, parquet_folder: Path) -> None:
    from_folder = load_data(DataSettings(source=f"imagefolder:{image_folder}", validation=0))
    from_parquet = load_data(DataSettings(source=f"parquet:{parquet_folder}", validation=0))
    theirs, ours = (raw(s.calibration, s).flatten(1).mean(1) for s in (from_folder, from_parquet))
    assert ours.sort().values == pytest.approx(theirs.sort().values, abs=0.05)


def test_validation_folder_is_the_test_split_when_there_is_no_other(image_folder: Path) -> None:
    splits = load_data(DataSettings(source=f"imagefolder:{image_folder}", validation=0.25))
    assert (splits.train.samples, splits.validation.samples, splits.test.samples) == (18, 6, 12)
    (image_folder / "val").rename(image_folder / "test")
    (image_folder / "train").rename(image_folder / "val")
    (image_folder / "test" / "cat").parent.joinpath("x").mkdir()
    with pytest.raises(DataError, match="no train folder"):
        load_data(DataSettings(source=f"imagefolder:{image_folder}"))


def test_own_validation_split_is_used(image_folder: Path) -> None:
    (image_folder / "test" / "owl").mkdir(parents=True)
    Image.new("RGB", (12, 12)).save(image_folder / "test" / "owl" / "a.png")
    splits = load_data(DataSettings(source=f"imagefolder:{image_folder}"))
    assert (splits.train.samples, splits.validation.samples, splits.test.samples) == (24, 12, 1)
    assert splits.test.labels.tolist() == [2]


def test_files_and_memory_give_equal_batches(image_folder: Path) -> None:
    settings = DataSettings(
        source=f"imagefolder:{image_folder}",
        image_size=8,
        batch_size=5,
        augment=AugmentSettings(crop=1, flip=True),
        cache="memory",
    )
    in_memory = load_data(settings)
    in_files = load_data(settings.model_copy(update={"cache": "files"}))
    assert in_memory.fingerprint == in_files.fingerprint
    batches = list(zip(in_memory.train, in_files.train, strict=True))
    assert len(batches) == 4
    for (images, labels), (others, other_labels) in batches:
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_images_are_resized_by_the_short_side_and_cropped(image_folder: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the middle third is what a centre crop keeps
    Image.fromarray(wide).save(image_folder / "val" / "cat" / "0.png")
    splits = load_data(DataSettings(source=f"imagefolder:{image_folder}", image_size=10))
    assert splits.shape == (3, 10, 10)
    first = raw(splits.test, splits)[0]
    assert first == pytest.approx(torch.full((3, 10, 10), 200.0), abs=0.1)


def test_crop_fraction_cuts_the_margin(image_folder: Path) -> None:
    framed = np.full((16, 16, 3), 255, np.uint8)
    framed[4:12, 4:12] = 10
    Image.fromarray(framed).save(image_folder / "val" / "cat" / "0.png")
    settings = DataSettings(
        source=f"imagefolder:{image_folder}", image_size=8, crop_fraction=0.5, channels=1
    )
    splits = load_data(settings)
    assert raw(splits.test, splits)[0] == pytest.approx(torch.full((1, 8, 8), 10.0), abs=0.1)


def test_limit_takes_a_share_of_each_class() -> None:
    splits = load_data(DataSettings(limit=100, validation=0.2))
    assert (splits.train.samples, splits.validation.samples, splits.test.samples) == (80, 20, 100)
    assert torch.bincount(splits.test.labels).min() >= 9


def test_fingerprint_follows_content_and_settings(
    parquet_folder: Path, write_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    settings = DataSettings(source=f"parquet:{parquet_folder}", validation=0)
    first = load_data(settings).fingerprint
    assert load_data(settings.model_copy(update={"eval_batch_size": 7})).fingerprint == first
    assert load_data(settings.model_copy(update={"image_size": 16})).fingerprint != first
    parquet_folder.rename(tmp_path / "elsewhere")
    moved = settings.model_copy(update={"source": f"parquet:{tmp_path / 'elsewhere'}"})
    assert load_data(moved).fingerprint == first
    (tmp_path / "elsewhere" / "data" / "train-1.parquet").unlink()
    assert load_data(moved).fingerprint != first


def test_relative_folders_are_looked_for_under_slimkit_data(
    parquet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMKIT_DATA", str(parquet_folder.parent))
    assert load_data(DataSettings(source=f"parquet:{parquet_folder.name}")).shape == (3, 12, 12)


def test_torchvision_data_sets_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    class Spots(datasets.VisionDataset):
        classes = ("even", "odd")

        def __init__(self, root: str, train: bool = True) -> None:
            super().__init__(root)
            self.count = 20 if train else 6

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index >= self.count:
                raise IndexError
            return Image.new("L", (9, 9), 10 * (index % 2)), index % 2

    monkeypatch.setattr(datasets, "Spots", Spots, raising=False)
    monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, "Spots"))
    splits = load_data(DataSettings(source="torchvision:Spots", validation=4))
    assert splits.shape == (1, 9, 9)
    assert splits.classes == ["even", "odd"]
    assert (splits.train.samples, splits.validation.samples, splits.test.samples) == (16, 4, 6)


def test_synthetic_data_has_the_layout_of_the_settings() -> None:
    settings = DataSettings(
        source="imagefolder:/nowhere", image_size=24, batch_size=6, eval_batch_size=5
    )
    splits = synthetic_data(settings, classes=7, batches=2)
    assert splits.shape == (3, 24, 24)
    assert len(splits.classes) == 7
    batches = list(splits.train)
    assert [tuple(images.shape) for images, _ in batches] == [(6, 3, 24, 24)] * 2
    assert [len(s) for s in (splits.calibration, splits.validation, splits.test)] == [3, 1, 1]
