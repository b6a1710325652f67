"""What the tests of knowledge share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimkit.distill.knowledge.format.encoding import encode
from slimkit.distill.knowledge.format.schema import KeySpec, KnowledgeSchema
from slimkit.tasks.data import AugmentSettings, DataSettings, ImageSplits, load_data


def digits_splits(**changes: Any) -> ImageSplits:
    settings = {
        "source": "digits",
        "limit": 100,
        "batch_size": 16,
        "augment": AugmentSettings(crop=1, flip=True),
        **changes,
    }
    return load_data(DataSettings(**settings))


def network(seed: int, classes: int = 10) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, classes)
    )


class ToyTeacher:
    """Says number · scale + pass about every sample, in as many columns as there are classes."""

    def __init__(
        self,
        *,
        scale: float = 1.0,
        samples: int = 64,
        classes: int = 3,
        batch_size: int = 8,
        key: str = "logits",
        **schema: Any,
    ) -> None:
        keys = (KeySpec(name=key, shape=(classes,), dtype="float32"),)
        values = {"fingerprint": "toy", "samples": samples, "teacher": "toy", **schema}
        self.schema = KnowledgeSchema(keys=keys, **values)
        self.scale, self.batch_size, self.parallel = scale, batch_size, 1
        self.asked: list[NDArray[np.int64]] = []

    def answer(
        self,
        ids: NDArray[np.int64],
        number: int,
        names: Sequence[str],
        inputs: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> pa.RecordBatch:
        self.asked.append(ids)
        record = toy_record(ids, number, self.schema.keys[0].shape[0], self.scale)
        return encode(self.schema, ids, {self.schema.keys[0].name: record})


def toy_record(ids: NDArray[np.int64], number: int, classes: int, scale: float = 1.0) -> Tensor:
    column = torch.from_numpy(ids).float() * scale + number
    return column[:, None].expand(-1, classes).clone()


def batches(samples: int, size: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    order = np.random.default_rng(seed).permutation(samples).astype(np.int64)
    for start in range(0, samples, size):
        yield order[start : start + size]
