"""What differs between kinds of tasks: data, loss, metric."""

from __future__ import annotations

from slimkit.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
