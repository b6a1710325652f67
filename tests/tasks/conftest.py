"""Small data sets in each layout."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ["cat", "dog", "owl"]


def picture(label: int, number: int, size: tuple[int, int] = (12, 12)) -> Image.Image:
    generator = np.random.default_rng(100 * label + number)
    pixels = generator.integers(60 * label, 60 * label + 60, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/CLASS/*.jpg (8 each) and val/CLASS/*.png (4 each)."""
    for split, count, suffix in (("train", 8, "jpg"), ("val", 4, "png")):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture(label, number).save(folder / f"{number}.{suffix}", quality=95)
    return tmp_path / "pets"


@pytest.fixture
def write_parquet() -> Callable[..., Path]:
    """Write one split as Hugging Face's ``datasets`` would."""
    import pyarrow as pa
    from pyarrow import parquet

    def write(
        path: Path, images: list[bytes], labels: list[int], *, names: list[str] | None = CLASSES
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(
            {"image": [{"bytes": data, "path": None} for data in images], "label": labels}
        )
        if names is not None:
            features = {
                "image": {"_type": "Image"},
                "label": {"_type": "ClassLabel", "names": names},
            }
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            table = table.replace_schema_metadata(metadata)
        parquet.write_table(table, path)
        return path

    return write


@pytest.fixture
def parquet_folder(tmp_path: Path, write_parquet: Callable[..., Path]) -> Path:
    """Two training files and one test file, three classes."""
    folder = tmp_path / "pets-parquet"
    for file, numbers in (
        ("train-0", range(4)),
        ("train-1", range(4, 8)),
        ("test-0", range(8, 12)),
    ):
        pairs = [(label, number) for number in numbers for label in range(3)]
        images = [encoded(picture(*pair)) for pair in pairs]
        write_parquet(folder / "data" / f"{file}.parquet", images, [label for label, _ in pairs])
    return folder
