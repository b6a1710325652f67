"""What differs between kinds of tasks: data, loss, metric, what is deployed and drawn."""

from __future__ import annotations

from slimkit.tasks.classification import ClassificationTask
from slimkit.tasks.interface import TASKS, Answer, Metric, Task
from slimkit.tasks.splits import Loader, SampleLoader, Splits

__all__ = [
    "TASKS",
    "Answer",
    "ClassificationTask",
    "Loader",
    "Metric",
    "SampleLoader",
    "Splits",
    "Task",
]
