"""A small teacher over the digits, and what is needed to talk to it."""

from __future__ import annotations

import pytest
from knowledge_helpers import digits_splits, network

from slimkit.distill.knowledge import NetworkTeacher
from slimkit.tasks.data import ImageSplits
from slimkit.tasks.data.samples import training_samples


@pytest.fixture
def splits() -> ImageSplits:
    return digits_splits()


@pytest.fixture
def teacher() -> NetworkTeacher:
    samples = training_samples(digits_splits(), seed=3)
    return NetworkTeacher(network(1), samples, batch_size=24, precision="fp32")
