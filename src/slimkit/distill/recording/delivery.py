"""Delivery: the results of a function in one network are replayed in the other network.

Teacher and student then see the same random choices: the same mixed images, the same masked
patches, the same assignment of labels.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimkit.distill.recording.intercepting import ForwardScope, Handler, Interceptor
from slimkit.distill.recording.records import mistake
from slimkit.doors import door
from slimkit.errors import InputError, ModelError, UnknownNameError
from slimkit.registry import import_object

__all__ = ["Deliveries", "Delivery", "Side", "parse_deliveries"]

Side = Literal["student", "teacher"]


@door
class Delivery(BaseModel):
    """One function whose results are replayed, first in, first out.

    Attributes:
        function: ``"package.module:function"`` or ``"package.module:Class.method"``, the place
            where both networks look it up when they call it.
        source: whose results the other one gets. From the ``teacher``, which then runs when
            the student's forward begins; or from the ``student``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: str
    source: Side = "teacher"

    @field_validator("function")
    @classmethod
    def _is_an_import_path(cls, value: str) -> str:
        if ":" not in value:
            raise mistake(f"{value!r} is no import path", "write package.module:function")
        return value


def parse_deliveries(entries: Sequence[Delivery | str | Mapping[str, Any]]) -> list[Delivery]:
    """What a caller passed: settings, names of functions, or what a recipe says.

    Raises:
        InputError: an entry is none of them.
    """
    parsed = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Delivery):
            parsed.append(entry)
            continue
        values = {"function": entry} if isinstance(entry, str) else entry
        try:
            parsed.append(Delivery.model_validate(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ["deliveries", index, *first["loc"]]))
            raise InputError(first["msg"], where=where) from error
    return parsed


class Deliveries:
    """All deliveries between one student and one teacher.

    Args:
        deliveries: what is replayed; empty for none.
        student: the student; gets hooks until :meth:`close`.

    Raises:
        UnknownNameError: a function does not exist.
        InputError: each network waits for the other one.
    """

    def __init__(self, deliveries: Sequence[Delivery], student: nn.Module) -> None:
        if len({delivery.source for delivery in deliveries}) > 1:
            raise InputError(
                "each network waits for the other one's results",
                where="deliveries",
                hint="one source for all deliveries",
            )
        for delivery in deliveries:
            if not callable(import_object(delivery.function, where="deliveries")):
                raise UnknownNameError(f"{delivery.function} cannot be called", where="deliveries")
        self._deliveries = tuple(deliveries)
        self._queues: dict[str, deque[Any]] = {d.function: deque() for d in deliveries}
        sides: tuple[Side, Side] = ("student", "teacher")
        self._interceptors = {side: Interceptor(self._handlers(side)) for side in sides}
        self._scope: ForwardScope | None = None
        if deliveries:
            self._scope = ForwardScope(student, self._enter, self._interceptors["student"].stop)

    def _enter(self, _args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled():  # an evaluation draws for itself
            self._start("student")

    @contextlib.contextmanager
    def teaching(self) -> Iterator[None]:
        """The teacher's forward on the student's batch happens inside."""
        self._start("teacher")
        try:
            yield
        finally:
            self._interceptors["teacher"].stop()

    def _start(self, side: Side) -> None:
        self._interceptors[side].start()
        for delivery in self._deliveries:
            if delivery.source == side:
                self._queues[delivery.function].clear()

    def check_delivered(self) -> None:
        """Make sure that both networks called each function equally often.

        Raises:
            ModelError: something was not asked for.
        """
        for delivery in self._deliveries:
            left = len(self._queues[delivery.function])
            if left:
                receiver = "student" if delivery.source == "teacher" else "teacher"
                raise ModelError(
                    f"the {receiver} called it {left} times less often than the {delivery.source}",
                    where=delivery.function,
                    hint="deliver only what both networks call",
                )

    def close(self) -> None:
        """Remove the hooks, and put the functions back if a forward was cut off."""
        if self._scope is not None:
            self._scope.close()
        for interceptor in self._interceptors.values():
            interceptor.stop(of_any_thread=True)

    def _handlers(self, side: Side) -> dict[str, Handler]:
        return {
            delivery.function: (
                self._keeping(delivery) if delivery.source == side else self._replaying(delivery)
            )
            for delivery in self._deliveries
        }

    def _keeping(self, delivery: Delivery) -> Handler:
        queue = self._queues[delivery.function]

        def answer(call: Callable[[], Any]) -> Any:
            value = call()
            # a copy: the caller may go on to change what it got in place
            queue.append(_on_tensors(value, lambda t: t.detach().clone()))
            return value

        return answer

    def _replaying(self, delivery: Delivery) -> Handler:
        queue = self._queues[delivery.function]

        def answer(_call: Callable[[], Any]) -> Any:
            if not queue:
                raise ModelError(
                    f"it is called more often than the {delivery.source} called it",
                    where=delivery.function,
                    hint="deliver only what both networks call",
                )
            return queue.popleft()

        return answer


def _on_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)
