"""Bad data ends in one error that names the file, the field and what to do."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
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


def _labelled(folder: Path, write: Callable[..., Path], labels: list[object]) -> str:
    """Two images per label in each split, without class names in the metadata."""
    stream = io.BytesIO()
    Image.new("RGB", (12, 12), "gray").save(stream, "PNG")
    for split in ("train", "test"):
        rows = [label for label in labels for _ in range(2)]
        images = [stream.getvalue()] * len(rows)
        write(folder / f"{split}.parquet", images, rows, names=None)
    return f"parquet:{folder}"


def test_labels_that_are_texts_are_classes_by_their_sorted_names(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    source = _labelled(tmp_path, write_parquet, ["owl", "cat", "dog"])
    splits = load_data(DataSettings(source=source, validation=0))
    assert splits.classes == ["cat", "dog", "owl"]
    found = torch.cat([targets for _, targets in splits.test])
    assert found.tolist() == [2, 2, 0, 0, 1, 1]
    whole = _labelled(tmp_path / "floats", write_parquet, [0.0, 1.0])
    assert load_data(DataSettings(source=whole, validation=0)).classes == ["0", "1"]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([0, None], r"row 2 has no label in column 'label'"),
        ([None, None], "row 0 has no label"),
        (["cat", None], "row 2 has no label"),
        ([0.0, 0.5], r"row 2 has the label '0\.5'"),
        ([0.0, float("nan")], "row 2 has the label 'nan'"),
        ([0, 10**12], r"label 1000000000000.*below 100000"),
        ([[0], [1]], r"row 0 has the label '\[0\]'"),
        ([-1, 0], "label -1 is outside"),
    ],
    ids=str,
)
def test_labels_that_are_no_classes_are_named(
    tmp_path: Path, write_parquet: Callable[..., Path], labels: list[object], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        load(_labelled(tmp_path, write_parquet, labels))


def test_a_label_that_training_does_not_have_is_named(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    source = _labelled(tmp_path, write_parquet, ["cat", "dog"])
    _labelled(tmp_path / "other", write_parquet, ["cat", "dgo"])
    (tmp_path / "other" / "test.parquet").replace(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"'dgo'.*did you mean 'dog'"):
        load(source)
    _labelled(tmp_path / "numbers", write_parquet, [0, 1])
    (tmp_path / "numbers" / "train.parquet").replace(tmp_path / "train-2.parquet")
    with pytest.raises(DataError, match="columns are others"):
        load(source)


def test_metadata_that_names_an_absent_column_is_told(parquet_folder: Path) -> None:
    from pyarrow import parquet

    for file in (parquet_folder / "data").glob("*.parquet"):
        table = parquet.read_table(file)
        renamed = table.rename_columns(["image", "kind"])
        parquet.write_table(renamed.replace_schema_metadata(table.schema.metadata), file)
    with pytest.raises(DataError, match=r"names a column 'label' that is not there.*kind"):
        load(f"parquet:{parquet_folder}")


def test_crops_beyond_the_image_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.augment\.crop: expected at most 8, got 9"):
        load("digits", augment={"crop": 9})
