"""Profile of a network: parameters, MACs, BOPs and bytes, per layer and in total.

One capture of the network (:func:`slimkit.graph.capturing.capture`) tells every operator that
ran and with which parameter; the counting rules are in :mod:`slimkit.measure.macs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimkit.doors import door
from slimkit.graph.capturing import capture
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.measure.macs import OperatorCost, operator_costs, owner_of
from slimkit.measure.tables import human_bytes, human_count, percent, rendered

if TYPE_CHECKING:
    from rich.table import Table

    from slimkit.graph.capturing import Graph

__all__ = ["LayerCost", "Profile", "profile"]


@dataclass(frozen=True)
class LayerCost:
    """The cost of one module that owns parameters or multiplies matrices.

    Attributes:
        name: module path; empty for the network itself.
        type: class name of the module.
        output_shape: of the last operator that ran in it; empty if none did.
        params: parameters that it owns; a shared one counts where it is met first.
        nonzero_params: those that are not zero.
        macs: multiply-accumulate operations for the whole example input.
        bops: bit operations: MACs × weight bits × activation bits.
        bytes: parameters and saved buffers at their bit width.
    """

    name: str
    type: str
    output_shape: tuple[int, ...]
    params: int
    nonzero_params: int
    macs: int
    bops: int
    bytes: int


@dataclass(frozen=True)
class Profile:
    """The cost of a network for one example input; print it for a table.

    Attributes:
        model: class name of the network.
        params: parameters, shared ones once.
        nonzero_params: parameters that are not zero.
        macs: multiply-accumulate operations for the whole example input: give a batch of
            one to get the usual figure.
        bops: bit operations, MACs × weight bits × activation bits.
        bytes: parameters and saved buffers at their bit width.
        layers: one row per module that owns parameters or multiplies matrices.
        input_shapes: of the tensors in the example input.
    """

    model: str
    params: int
    nonzero_params: int
    macs: int
    bops: int
    bytes: int
    layers: tuple[LayerCost, ...]
    input_shapes: tuple[tuple[int, ...], ...]

    @property
    def sparsity(self) -> float:
        """Fraction of the parameters that are zero."""
        return 1.0 - self.nonzero_params / self.params if self.params else 0.0

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON-able values."""
        return asdict(self)

    def table(self, *, depth: int | None = None) -> Table:
        """A rich table of the layers, with sums for the modules that hold them.

        Args:
            depth: fold what lies deeper than so many levels into its parent.
        """
        from rich.markup import escape
        from rich.table import Table

        sparse = self.sparsity >= 0.01
        table = Table(title=self._title(), title_justify="left", box=None, pad_edge=False)
        for heading in ("layer", "type"):
            table.add_column(heading, no_wrap=True)
        columns = ["output", "params", *(["non-zero"] if sparse else []), "MACs", "share"]
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for label, row, style in [*_tree(self.layers, depth), ("total", self._total(), "bold")]:
            cells = [_shape_text(row.output_shape), human_count(row.params) if row.params else ""]
            if sparse:
                cells.append(human_count(row.nonzero_params) if row.params else "")
            if row.macs:
                cells += [human_count(row.macs), percent(row.macs, self.macs)]
            table.add_row(escape(label), escape(row.type), *cells, style=style)
        return table

    def summary(self) -> str:
        """The totals in one line."""
        parts = [
            f"{human_count(self.params)} parameters",
            f"{human_count(self.macs)} MACs",
            f"{human_count(self.bops)} BOPs",
            human_bytes(self.bytes),
        ]
        if self.sparsity >= 0.01:
            parts.insert(1, f"{100 * self.sparsity:.1f} % of them zero")
        return ", ".join(parts)

    def __str__(self) -> str:
        return f"{rendered(self.table())}\n{self.summary()}"

    def _title(self) -> str:
        shapes = ", ".join(_shape_text(shape) for shape in self.input_shapes)
        return f"{self.model}, input {shapes}"

    def _total(self) -> LayerCost:
        return LayerCost(
            "", "", (), self.params, self.nonzero_params, self.macs, self.bops, self.bytes
        )


@door
def profile(
    model: nn.Module, example_inputs: ExampleInputs, *, graph: Graph | None = None
) -> Profile:
    """Count what ``model`` costs for ``example_inputs``.

    Args:
        model: any module. If it (a quantized network) has a method ``bit_widths()`` that
            maps module paths to (weight bits, activation bits), those count; otherwise the
            bits of each tensor's dtype do.
        example_inputs: a tensor, a tuple, a dict or :class:`slimkit.Inputs`. MACs are per
            this input, whatever its batch size.
        graph: a capture of the same model on the same inputs, to spare another one.

    Raises:
        InputError: the example inputs are of no accepted kind.
        CaptureError: the model does not run on them; names the module.
    """
    inputs = as_inputs(example_inputs)
    graph = capture(model, inputs) if graph is None else graph
    counted, prefix = _counted_part(model)
    bits = {path.removeprefix(prefix): width for path, width in _bit_widths(model).items()}
    rows = {name: _Row(type(module).__name__) for name, module in counted.named_modules()}
    for op in graph.ops:
        name = op.module.removeprefix(prefix)
        if name in rows and op.outputs:
            rows[name].output_shape = graph.tensors[op.outputs[0]].shape
    for cost in operator_costs(graph):
        name = cost.layer.removeprefix(prefix)
        rows.setdefault(name, _Row("")).add_operator(cost, bits.get(name, cost.bits))
    for name, parameter in counted.named_parameters():
        owner = owner_of(name)[0]
        rows[owner].add_parameter(parameter, bits.get(owner))
    for name, tensor in _saved_buffers(counted):
        rows[owner_of(name)[0]].bytes += tensor.numel() * tensor.dtype.itemsize
    layers = tuple(row.cost(name) for name, row in rows.items() if row.params or row.macs)
    total_bytes = sum(row.bytes for row in rows.values())
    return Profile(
        model=type(counted).__name__,
        params=sum(layer.params for layer in layers),
        nonzero_params=sum(layer.nonzero_params for layer in layers),
        macs=sum(layer.macs for layer in layers),
        bops=sum(layer.bops for layer in layers),
        bytes=total_bytes,
        layers=layers,
        input_shapes=tuple(tuple(tensor.shape) for tensor in inputs.tensors()),
    )


class _Row:
    """The sums of one module while they are being counted."""

    def __init__(self, kind: str) -> None:
        self.type = kind
        self.output_shape: tuple[int, ...] = ()
        self.params = self.nonzero = self.macs = self.bops = self.bytes = 0

    def add_operator(self, cost: OperatorCost, bits: tuple[int, int]) -> None:
        weight_bits, activation_bits = bits
        if cost.weight is None:  # two activations are multiplied
            weight_bits = activation_bits
        self.macs += cost.macs
        self.bops += cost.macs * weight_bits * activation_bits
        self.output_shape = cost.output_shape

    def add_parameter(self, tensor: torch.Tensor, bits: tuple[int, int] | None) -> None:
        self.params += tensor.numel()
        self.nonzero += int(torch.count_nonzero(_dense(tensor)))
        # A quantized layer stores its weight in few bits; its bias stays 32 bits wide.
        quantized = bits is not None and tensor.dim() > 1
        width = bits[0] if bits is not None and quantized else 8 * tensor.dtype.itemsize
        self.bytes += (tensor.numel() * width + 7) // 8

    def cost(self, name: str) -> LayerCost:
        return LayerCost(
            name=name,
            type=self.type,
            output_shape=self.output_shape,
            params=self.params,
            nonzero_params=self.nonzero,
            macs=self.macs,
            bops=self.bops,
            bytes=self.bytes,
        )


def _counted_part(model: nn.Module) -> tuple[nn.Module, str]:
    """The network inside a quantization wrapper and its path, or the model itself."""
    inner = getattr(model, "model", None)
    if callable(getattr(model, "bit_widths", None)) and isinstance(inner, nn.Module):
        return inner, "model."
    return model, ""


def _bit_widths(model: nn.Module) -> Mapping[str, tuple[int, int]]:
    widths = getattr(model, "bit_widths", None)
    found: Mapping[str, tuple[int, int]] = widths() if callable(widths) else {}
    return found


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a state dict holds, shared ones once."""
    skipped = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return ((name, tensor) for name, tensor in model.named_buffers() if name not in skipped)


def _shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(str(size) for size in shape)


def _tree(
    layers: Sequence[LayerCost], depth: int | None, prefix: str = "", level: int = 0
) -> Iterator[tuple[str, LayerCost, str | None]]:
    """Rows to print: (indented name, cost, style), each parent with its sum before its children."""
    if depth is not None and level >= depth:
        return
    children: dict[str, list[LayerCost]] = {}
    for layer in layers:
        children.setdefault(layer.name.removeprefix(prefix).partition(".")[0], []).append(layer)
    for child, inside in children.items():
        label, path = child, prefix + child
        own = next((layer for layer in inside if layer.name == path), None)
        while own is None:  # a module that only holds one other gets no line of its own
            inner = {layer.name[len(path) + 1 :].partition(".")[0] for layer in inside}
            if len(inner) > 1:
                break
            label, path = f"{label}.{min(inner)}", f"{path}.{min(inner)}"
            own = next((layer for layer in inside if layer.name == path), None)
        below = [layer for layer in inside if layer is not own]
        hidden = below if own is not None and depth is not None and level + 1 >= depth else []
        row = own if own is not None and not hidden else _sum(inside, path, own)
        yield "  " * level + (label or "(itself)"), row, None if own else "dim"
        yield from _tree(below, depth, path + ".", level + 1) if below else ()


def _sum(layers: Sequence[LayerCost], name: str, own: LayerCost | None) -> LayerCost:
    """One row for all ``layers``, with the type and shape of the module that holds them."""
    params, nonzero, macs, bops, size = (
        sum(column)
        for column in zip(
            *((c.params, c.nonzero_params, c.macs, c.bops, c.bytes) for c in layers), strict=True
        )
    )
    kind, shape = (own.type, own.output_shape) if own else ("", ())
    return LayerCost(name, kind, shape, params, nonzero, macs, bops, size)
