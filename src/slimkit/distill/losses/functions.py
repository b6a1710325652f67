"""Any function of two tensors as a loss, from the recipe alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from slimkit.distill.losses.features import OptionalLayerLoss
from slimkit.distill.losses.interface import DISTILL_LOSSES
from slimkit.distill.recording.records import mistake
from slimkit.errors import InputError, SlimkitError, nearest
from slimkit.registry import import_object

__all__ = ["FunctionLoss"]

ArgumentSource = Literal["student", "teacher", "labels"]


@DISTILL_LOSSES.register("function")
class FunctionLoss(OptionalLayerLoss):
    """Any function of torch or your own, such as ``torch.nn.functional:smooth_l1_loss``.

    Attributes:
        function: ``"package.module:function"``; what it returns is averaged.
        arguments: argument of the function → what it gets: ``student``, ``teacher``, ``labels``.
        options: its other arguments, by keyword.
    """

    type: Literal["function"] = "function"
    function: str
    arguments: Mapping[str, ArgumentSource] = {"input": "student", "target": "teacher"}
    options: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _fits_the_signature(self) -> Self:
        hint = "write package.module:function"
        if ":" not in self.function:
            raise mistake(f"{self.function!r} is no import path", hint, "function")
        try:
            target = import_object(self.function)
        except SlimkitError as error:
            raise mistake(error.message, error.hint or "", "function") from error
        if not callable(target):
            raise mistake(f"{self.function!r} is no function", hint, "function")
        self._check_arguments(target)
        return self

    def _check_arguments(self, target: Callable[..., Any]) -> None:
        try:
            parameters = inspect.signature(target).parameters
        except ValueError:  # written in C: the call will tell
            return
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return
        for key, names in (("arguments", self.arguments), ("options", self.options)):
            for name in names:
                if name not in parameters:
                    raise mistake(
                        f"{self.function} has no argument {name!r}",
                        nearest(name, parameters),
                        f"{key}.{name}",
                    )
        for name, parameter in parameters.items():
            given = name in self.arguments or name in self.options
            variable = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            if parameter.default is inspect.Parameter.empty and not given and not variable:
                hint = f"arguments: {{{name}: student}}"
                raise mistake(f"{self.function} needs {name!r}", hint, "arguments")

    def compute(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the base class."""
        values = {"student": student, "teacher": teacher, "labels": labels}
        if labels is None and "labels" in self.arguments.values():
            raise InputError(
                f"{self.function} needs labels",
                where="labels",
                hint="pass labels= to distiller.loss",
            )
        function: Any = import_object(self.function)
        given = {name: values[source] for name, source in self.arguments.items()}
        return torch.as_tensor(function(**given, **self.options)).mean()
