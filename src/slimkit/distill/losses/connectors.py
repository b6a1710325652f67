"""Connectors: the modules between a student's record and a teacher's, named in a recipe.

``connector: auto`` adds what the shapes need and nothing where they agree; ``none`` adds nothing;
a name, ``{type: NAME, …}`` or a list of them builds those, one behind the other::

    connector: {type: conv_bn_act, kernel: 3}
    connector: [conv1x1, {type: normalize, kind: batch_norm}]
    connector: {type: module, module: "torch.nn:MaxPool2d", args: {kernel_size: 2}}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema
from torch import Tensor, nn

from slimkit.distill.losses.projection import Connector, Shape, build_connector, seeded
from slimkit.distill.recording.records import mistake
from slimkit.doors import door
from slimkit.errors import ModelError, SlimkitError, UnknownNameError, nearest
from slimkit.registry import Registry, import_object

__all__ = [
    "CONNECTORS",
    "ConnectorField",
    "ConnectorSettings",
    "ConvBNAct",
    "FunctionConnector",
    "LinearConnector",
    "ModuleConnector",
    "Normalize",
    "Resize",
    "connect",
]

CONNECTORS: Registry[type[ConnectorSettings]] = Registry("connector")
"""Name in a recipe → settings class."""


@door
class ConnectorSettings(BaseModel, ABC):
    """Base of all connectors.

    Attributes:
        type: the name in :data:`CONNECTORS`; subclasses narrow it to a ``Literal``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str

    @abstractmethod
    def build(self, student: Shape, teacher: Shape, *, where: str) -> nn.Module:
        """The module, for records of these shapes.

        Args:
            student: of what goes in, (N, C, …).
            teacher: of the record that it shall be compared with.
            where: the student's layer, for the error.

        Raises:
            ModelError: it cannot join them.
        """


@CONNECTORS.register("conv1x1")
class Conv1x1(ConnectorSettings):
    """A 1×1 convolution (a linear layer for vectors and tokens), and a resize where needed."""

    type: Literal["conv1x1"] = "conv1x1"

    def build(self, student: Shape, teacher: Shape, *, where: str) -> nn.Module:
        """See the base class."""
        connector = build_connector(student, teacher, always=True, where=where)
        assert connector is not None
        return connector


@CONNECTORS.register("conv_bn_act")
class ConvBNAct(ConnectorSettings):
    """Convolution, batch norm, activation, and a resize where the maps differ.

    Attributes:
        kernel: pixels a side, odd.
        norm: with a batch norm behind the convolution.
        act: what comes last.
    """

    type: Literal["conv_bn_act"] = "conv_bn_act"
    kernel: int = Field(default=1, ge=1, le=99)
    norm: bool = True
    act: Literal["relu", "gelu", "none"] = "relu"

    def build(self, student: Shape, teacher: Shape, *, where: str) -> nn.Module:
        """See the base class."""
        _expect_maps(student, teacher, where)
        if self.kernel % 2 == 0:
            raise ModelError(f"kernel {self.kernel} is even", where=where, hint="3")
        with seeded():
            layers: list[nn.Module] = [
                nn.Conv2d(
                    student[1], teacher[1], self.kernel, padding=self.kernel // 2,
                    bias=not self.norm,
                )
            ]  # fmt: skip
        if self.norm:
            layers.append(nn.BatchNorm2d(teacher[1]))
        if self.act != "none":
            layers.append(nn.ReLU() if self.act == "relu" else nn.GELU())
        size = (teacher[2], teacher[3]) if student[2:] != teacher[2:] else None
        return Connector(nn.Sequential(*layers), size)


class _Pooled(nn.Module):
    """(N, C, …) → (N, C): the mean over positions."""

    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(2).mean(2) if features.dim() > 2 else features


@CONNECTORS.register("linear")
class LinearConnector(ConnectorSettings):
    """The mean over positions, then a linear layer to the teacher's width.

    The teacher's record is a vector, (N, C).
    """

    type: Literal["linear"] = "linear"

    def build(self, student: Shape, teacher: Shape, *, where: str) -> nn.Module:
        """See the base class."""
        if len(teacher) != 2:
            raise ModelError(
                f"a linear connector leads to vectors (N, C), the teacher's record is {teacher}",
                where=where,
                hint="conv1x1 joins maps and tokens",
            )
        with seeded():
            return nn.Sequential(_Pooled(), nn.Linear(student[1], teacher[1]))


@CONNECTORS.register("resize")
class Resize(ConnectorSettings):
    """Brings maps to the teacher's height and width: means on the way down, bilinear up."""

    type: Literal["resize"] = "resize"

    def build(self, student: Shape, teacher: Shape, *, where: str) -> nn.Module:
        """See the base class."""
        _expect_maps(student, teacher, where)
        return Connector(None, (teacher[2], teacher[3]))


class _L2(nn.Module):
    """Each position's channel vector divided by its norm."""

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1)


class _Standardized(nn.Module):
    """Each channel with mean 0 and variance 1 over the batch and all positions."""

    def forward(self, features: Tensor) -> Tensor:
        dims = [0, *range(2, features.dim())]
        centred = features - features.mean(dims, keepdim=True)
        return centred / (centred.square().mean(dims, keepdim=True) + 1e-6).sqrt()


@CONNECTORS.register("normalize")
class Normalize(ConnectorSettings):
    """Normalised features.

    Attributes:
        kind: ``l2``: channel vectors of length 1; ``standardize``: channels of mean 0 and
            variance 1 in the batch; ``batch_norm``: the same with a trained scale and shift.
    """

    type: Literal["normalize"] = "normalize"
    kind: Literal["l2", "standardize", "batch_norm"] = "l2"

    def build(self, student: Shape, teacher: Shape, *, where: str) -> nn.Module:
        """See the base class."""
        if self.kind == "batch_norm":
            return (nn.BatchNorm2d if len(student) == 4 else nn.BatchNorm1d)(student[1])
        return _L2() if self.kind == "l2" else _Standardized()


@CONNECTORS.register("module")
class ModuleConnector(ConnectorSettings):
    """Any layer by name.

    Attributes:
        module: ``"torch.nn:MaxPool2d"``, or any ``"package.module:Class"``.
        args: keyword arguments of its constructor.
    """

    type: Literal["module"] = "module"
    module: str
    args: Mapping[str, Any] = {}

    def build(self, student: Shape, teacher: Shape, *, where: str) -> nn.Module:
        """See the base class."""
        factory = _imported(self.module, "torch.nn", where)
        try:
            with seeded():
                built = factory(**self.args)
        except Exception as error:  # a user's constructor may raise anything
            raise ModelError(f"{self.module} cannot be built: {error}", where=where) from error
        if not isinstance(built, nn.Module):
            raise ModelError(f"{self.module} is no module", where=where)
        return built


class _Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.arguments = function, dict(arguments)

    def forward(self, features: Tensor) -> Any:
        return self.function(features, **self.arguments)


@CONNECTORS.register("function")
class FunctionConnector(ConnectorSettings):
    """Any function of one tensor by name.

    Attributes:
        function: ``"torch:flatten"``, ``"torch.nn.functional:relu"``, or any import path.
        args: further arguments, by keyword.
    """

    type: Literal["function"] = "function"
    function: str
    args: Mapping[str, Any] = {}

    def build(self, student: Shape, teacher: Shape, *, where: str) -> nn.Module:
        """See the base class."""
        return _Applied(_imported(self.function, "torch", where), self.args)


def connect(
    choice: ConnectorChoice, student: Shape, teacher: Shape, *, where: str
) -> nn.Module | None:
    """The module that a recipe's ``connector`` means for records of these shapes.

    Args:
        choice: ``"auto"``, ``"none"``, a registered name, settings, or several of them.
        student: (N, C, …).
        teacher: the same.
        where: the student's layer, for the error.

    Raises:
        ModelError: it cannot join them.
    """
    if choice == "none":
        return None
    if choice == "auto":
        return build_connector(student, teacher, where=where)
    chain = choice if isinstance(choice, tuple) else (choice,)
    modules: list[nn.Module] = []
    for link in chain:
        settings = CONNECTORS.get(link).model_validate({}) if isinstance(link, str) else link
        module = settings.build(student, teacher, where=where)
        modules.append(module)
        if len(chain) > 1:
            student = _shape_behind(module, student, where)
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _shape_behind(module: nn.Module, shape: Shape, where: str) -> Shape:
    module.eval()
    try:
        with torch.no_grad():
            return tuple(module(torch.zeros(shape)).shape)
    except Exception as error:  # a user's module may raise anything
        raise ModelError(f"a connector fails on {shape}: {error}", where=where) from error
    finally:
        module.train()


def _expect_maps(student: Shape, teacher: Shape, where: str) -> None:
    if len(student) != 4 or len(teacher) != 4:
        raise ModelError(
            f"this connector joins maps (N, C, H, W), not {student} and {teacher}", where=where
        )


def _imported(name: str, home: str, where: str) -> Any:
    found = import_object(name if ":" in name else f"{home}:{name}", where=where)
    if not callable(found):
        raise UnknownNameError(f"{name} cannot be called", where=where)
    return found


ConnectorChoice = str | ConnectorSettings | tuple[str | ConnectorSettings, ...]


class ConnectorField:
    """The type of a settings field that holds a connector: see :func:`connect`."""

    def settings_class(self, name: str) -> type[BaseModel] | None:
        """The class that reads a mapping whose ``type`` is ``name``, if there is one."""
        return CONNECTORS.get(name) if name in CONNECTORS else None

    def _read(self, value: Any) -> ConnectorChoice:
        if isinstance(value, list | tuple):
            if not value:
                raise mistake("there is no connector in it", "write none")
            return tuple(self._entry(number, link) for number, link in enumerate(value))
        return self._link(value, alone=True)

    def _entry(self, number: int, link: Any) -> str | ConnectorSettings:
        """One of several, with its number in the path of its mistakes."""
        try:
            return self._link(link, alone=False)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(map(str, [number, *first["loc"]]))
            if first["type"] == "extra_forbidden":
                known = CONNECTORS.get(link["type"]).model_fields
                key = str(first["loc"][-1])
                raise mistake(f"unknown key {key!r}", nearest(key, known), path) from error
            raise mistake(f"{first['msg']}, got {first['input']!r}", "", path) from error

    def _link(self, value: Any, *, alone: bool) -> str | ConnectorSettings:
        if isinstance(value, ConnectorSettings):
            return value
        if isinstance(value, str):
            return value if alone and value in {"auto", "none"} else self._complete(value)
        if not isinstance(value, Mapping):
            raise mistake(f"expected a connector, got {value!r}", "write a name, or {type: NAME}")
        name = self._known(str(value.get("type", "")), "type")
        return CONNECTORS.get(name).model_validate({**value, "type": name})

    def _complete(self, name: str) -> str:
        """A name without settings, where none are required."""
        fields = CONNECTORS.get(self._known(name)).model_fields
        required = [key for key, field in fields.items() if field.is_required()]
        if required:
            raise mistake(
                f"{name} needs {required[0]}", f"write {{type: {name}, {required[0]}: …}}"
            )
        return name

    def _known(self, name: str, path: str = "") -> str:
        if name in CONNECTORS:
            return name
        try:
            CONNECTORS.get(name)
        except SlimkitError as error:
            hint = nearest(name, [*CONNECTORS, *(() if path else ("auto", "none"))])
            raise mistake(error.message, hint, path) from error
        raise mistake(f"{name} is not registered as a connector", "register it", path)

    def _write(self, value: ConnectorChoice) -> Any:
        if isinstance(value, tuple):
            return [self._write(link) for link in value]
        return value if isinstance(value, str) else value.model_dump(mode="json")

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(self._write),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        settings: list[JsonSchemaValue] = []
        for name in CONNECTORS.names():
            reference = handler(CONNECTORS.get(name).__pydantic_core_schema__)
            written = handler.resolve_ref_schema(reference)
            written["required"] = sorted({*written.get("required", ()), "type"})
            settings.append(reference)
        names: JsonSchemaValue = {"enum": CONNECTORS.names()}
        link = [names, *settings]
        several: JsonSchemaValue = {"type": "array", "items": {"anyOf": link}, "minItems": 1}
        return {"anyOf": [{"enum": ["auto", "none"]}, *link, several]}
