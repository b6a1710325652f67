"""Time of a training: how much of it fits into a budget, and whether others take it away."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TypeVar

import torch

__all__ = ["Budget", "ProcessorShare"]

Item = TypeVar("Item")

EVALUATION = 1.1
"""Of an epoch's steps: what it takes with its evaluation, before one has been seen."""
FIRST_STEPS, FIRST_SECONDS = 10, 5.0
"""The speed is judged after so many steps and seconds; or, of steps that take long, twice these."""
CRAWL_SECONDS = 10.0
"""Of steps, before it is said that the processor is shared: short bursts of others are usual."""
CRAWL_SHARE = 0.7
"""Part of the time: a training that is alone has its processor for more than 0.95 of it."""


class Budget:
    """How many steps fit into a number of minutes.

    Args:
        minutes: None for no limit.
        steps_per_epoch: of the run.
        most: steps of the run without a limit.
    """

    def __init__(self, minutes: float | None, steps_per_epoch: int, most: int) -> None:
        self.seconds = 60 * (minutes or 0.0)
        self.steps_per_epoch, self.most = steps_per_epoch, most
        self._judged = False

    def may_judge(self, seconds: float, steps: int) -> bool:
        """Whether the speed of a first epoch can be told now; true once."""
        enough = steps >= FIRST_STEPS and seconds >= min(FIRST_SECONDS, self.seconds / 50)
        if self._judged or not self.seconds or not (enough or seconds >= 2 * FIRST_SECONDS):
            return False
        self._judged = True
        return True

    def after_steps(self, steps: int, seconds: float) -> int:
        """Steps that fit, judged by the first ones: whole epochs, or a part of one."""
        epoch = EVALUATION * seconds / steps * self.steps_per_epoch
        whole = int(self.seconds / epoch)
        if not whole:
            return max(steps, min(self.most, int(self.seconds / epoch * self.steps_per_epoch)))
        return min(self.most, whole * self.steps_per_epoch)

    def after_epochs(self, epochs: int, seconds: float, total: int) -> int:
        """Steps that fit, judged by the epochs that were trained.

        In the second half of a run they only become fewer: a schedule that has begun to fall is
        not stretched.

        Args:
            epochs: that were trained.
            seconds: that they took.
            total: steps that were planned.
        """
        if not epochs:
            return total
        done = epochs * self.steps_per_epoch
        more = max(0, int((self.seconds - seconds) / (seconds / epochs)))
        fits = min(self.most, done + more * self.steps_per_epoch)
        return fits if done <= total / 2 or fits < total else total


class ProcessorShare:
    """CPU time against wall time of the thread that trains, without its waiting for data.

    It computes, or waits for threads that compute for it: where it had no processor, others had.
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()
        self._waited = self._used = 0.0
        self._told = False

    def without_waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; what it takes to get them does not count."""
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - wall
                self._used += time.thread_time() - cpu
            yield item

    @property
    def seconds(self) -> float:
        """Of steps so far."""
        return time.perf_counter() - self._wall - self._waited

    @property
    def value(self) -> float:
        """The part of these in which the thread had a processor."""
        cpu = time.thread_time() - self._cpu - self._used
        return min(1.0, cpu / max(self.seconds, 1e-9))

    @property
    def known(self) -> bool:
        """Whether it is long enough to mean something."""
        return self._used > 0 and self.seconds >= 1.0

    def slow(self) -> bool:
        """Whether others take the processor; true once."""
        if self._told or self.seconds < CRAWL_SECONDS or self.value >= CRAWL_SHARE:
            return False
        self._told = True
        return True

    def warning(self) -> str:
        """What to say then."""
        return (
            f"other processes take the processor: training has it for {self.value:.0%} of the "
            f"time, with {torch.get_num_threads()} threads on {os.cpu_count()} cores; it is faster "
            "alone, or with fewer threads (threads: in a recipe)"
        )
