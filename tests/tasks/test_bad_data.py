"""Bad data ends in one error that names the file, the field and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from slimkit.errors import DataError, ModelError, SlimkitError, UnknownNameError
from slimkit.tasks import ClassificationTask
from slimkit.tasks.data import ArrayLoader, DataSettings, load_data


def load(source: str, **kwargs: object) -> object:
    return load_data(DataSettings(source=source, **kwargs))  # type: ignore[arg-type]


def cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_unknown_source_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"data\.source.*parquet"):
        load("parket:somewhere")
    with pytest.raises(UnknownNameError, match="CIFAR10"):
        load("torchvision:CIFAR11")


def test_digits_take_no_argument() -> None:
    with pytest.raises(DataError, match="takes no argument"):
        load("digits:mnist")


def test_missing_folder_names_every_place_and_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMKIT_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(DataError, match=r"cifar_10 or .*did you mean 'cifar10'.*SLIMKIT_DATA"):
        load("parquet:cifar_10")
    with pytest.raises(DataError, match="needs a folder"):
        load("imagefolder:")


def test_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train split.*train\*\.parquet"):
        load(f"parquet:{tmp_path}")
    with pytest.raises(DataError, match=r"no train folder.*train/CLASS"):
        load(f"imagefolder:{tmp_path}")
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no class folder"):
        load(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="no image in"):
        load(f"imagefolder:{tmp_path}")


def test_class_unknown_in_training_is_named(image_folder: Path) -> None:
    (image_folder / "val" / "dog").rename(image_folder / "val" / "doog")
    with pytest.raises(DataError, match=r"'doog'.*'dog'"):
        load(f"imagefolder:{image_folder}")


@pytest.mark.parametrize("cache", ["memory", "files"])
def test_truncated_image_is_an_error_that_names_it(
    image_folder: Path, cache: Literal["memory", "files"]
) -> None:
    cut_off(image_folder / "train" / "dog" / "3.jpg")
    settings = DataSettings(
        source=f"imagefolder:{image_folder}", image_size=12, mean=(0,), std=(1,), cache=cache
    )
    with pytest.raises(DataError, match=r"3\.jpg.*on_bad_image: skip"):
        [*load_data(settings).train, *load_data(settings).calibration]


def test_truncated_images_are_skipped_and_counted(image_folder: Path) -> None:
    cut_off(image_folder / "train" / "dog" / "3.jpg")
    (image_folder / "val" / "owl" / "0.png").write_text("no image")
    splits = load_data(
        DataSettings(source=f"imagefolder:{image_folder}", on_bad_image="skip", validation=0)
    )
    assert splits.train.samples == 23
    assert splits.test.samples == 11
    assert splits.skipped == {"train": 1, "validation": 0, "test": 1}
    assert torch.bincount(splits.train.labels).tolist() == [8, 7, 8]


def test_truncated_images_in_files_shrink_their_batch(image_folder: Path) -> None:
    cut_off(image_folder / "train" / "dog" / "3.jpg")
    settings = DataSettings(
        source=f"imagefolder:{image_folder}",
        on_bad_image="skip",
        validation=0,
        cache="files",
        image_size=12,
        batch_size=24,
    )
    splits = load_data(settings)
    for epoch in range(2):
        splits.train.set_epoch(epoch)
        ((images, labels),) = splits.train
        assert len(images) == len(labels) == 23
    assert splits.train.store.skipped == 1


def test_bad_row_of_a_parquet_file_is_numbered(
    parquet_folder: Path, write_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    write_parquet(parquet_folder / "data" / "test-0.parquet", [b"broken"], [0])
    with pytest.raises(DataError, match=r"test-0\.parquet row 0"):
        load(f"parquet:{parquet_folder}")
    with pytest.raises(DataError, match="no readable image"):
        load(f"parquet:{parquet_folder}", on_bad_image="skip")


def test_cut_off_parquet_file_is_named(parquet_folder: Path) -> None:
    cut_off(parquet_folder / "data" / "train-1.parquet")
    with pytest.raises(DataError, match=r"train-1\.parquet.*not a complete"):
        load(f"parquet:{parquet_folder}")


def test_missing_column_lists_the_others(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for split in ("train", "test"):
        parquet.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"no column image or img.*text, label"):
        load(f"parquet:{tmp_path}")


def test_label_outside_of_the_classes_is_named(
    parquet_folder: Path, write_parquet: Callable[..., Path]
) -> None:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (12, 12)).save(stream, "PNG")
    write_parquet(parquet_folder / "data" / "test-0.parquet", [stream.getvalue()], [-1])
    with pytest.raises(DataError, match=r"label -1 is outside 0 … 2"):
        load(f"parquet:{parquet_folder}")


def test_different_sizes_need_an_image_size(image_folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (20, 14)).save(image_folder / "train" / "owl" / "1.jpg")
    with pytest.raises(DataError, match="set image_size"):
        load(f"imagefolder:{image_folder}", cache="memory")
    assert load(f"imagefolder:{image_folder}", image_size=12)


def test_more_validation_images_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.validation.*2000 of 1257"):
        load("digits", validation=2000)


def test_wrong_number_of_means_is_refused() -> None:
    with pytest.raises(DataError, match="3 means for images with 1 channel"):
        load("digits", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    with pytest.raises(ValueError, match="together"):
        DataSettings(mean=(0.5,))


def test_images_that_do_not_fit_into_memory_are_refused(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimkit.tasks.data.stores.free_memory", lambda: 1000)
    with pytest.raises(DataError, match="cache: files"):
        load(f"imagefolder:{image_folder}", cache="memory")


def test_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="test split is empty"):
        ArrayLoader(
            torch.zeros(0, 4, 4, 1, dtype=torch.uint8), torch.zeros(0), batch_size=1, role="test"
        )


def test_head_that_does_not_match_the_classes_is_refused() -> None:
    splits = load_data(DataSettings())
    task = ClassificationTask()
    with pytest.raises(ModelError, match=r"\(2, 7\).*10 classes.*num_classes=10"):
        task.check_head(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), splits)
    with pytest.raises(SlimkitError, match=r"\(2, 1, 8, 8\)"):
        task.check_head(nn.Conv2d(3, 10, 3), splits)
    task.check_head(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), splits)
