"""Calibration data on its way through the float and the quantized network, side by side.

A method that repairs layer after layer asks for each of them what reaches it in the quantized
network, where all before it is repaired already, and what it should answer, which the float
network says. Held in memory are the inputs of one block
(:mod:`slimkit.quantize.methods.blocks`), and what later blocks read of earlier ones, on both sides,
for as many images as the method asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.graph.addressing import AddressMode
from slimkit.graph.call_table import CallTable
from slimkit.graph.functions import function_of
from slimkit.inputs import Inputs
from slimkit.quantize.methods.blocks import Arguments, Block, TensorSource, outline, tensors_in
from slimkit.quantize.methods.interface import Work
from slimkit.quantize.methods.layer_calls import SUPPORTED, LayerCall
from slimkit.quantize.methods.sampled_layers import LayerSamples
from slimkit.quantize.specs import QuantizerSpec

__all__ = ["BlockCall", "RoundedLayer", "Streams"]

_MOST_ELEMENTS = 1 << 25
"""float32 numbers of the sampled inputs of one layer that are held at most: 128 MiB."""


@dataclass(frozen=True)
class RoundedLayer:
    """A weight that is rounded, and the calls that use it.

    Attributes:
        weight: of its quantizer.
        addresses: of the calls, in order; several if the module runs several times.
        module: path.
        activation: the activation function that is part of the integer operator.
    """

    weight: QuantizerSpec
    addresses: tuple[str, ...]
    module: str
    activation: Callable[[Tensor], Any]


class Streams:
    """Both networks and what flows through them.

    Args:
        work: what the method got.
        images: use so many calibration examples (whole batches); all by default.
        largest: see :func:`~slimkit.quantize.methods.blocks.outline`.

    Attributes:
        layers: convolutions and linear layers whose weights are rounded, in order of execution.
    """

    def __init__(self, work: Work, images: int | None = None, *, largest: int = 8) -> None:
        quantized, reference = work.quantized, work.reference
        addresses: dict[str, list[str]] = {}
        for decision in quantized.plan.decisions:
            rule, weight = quantized.plan.calls.get(decision.address), decision.weight
            if rule is not None and weight is not None and weight in rule.inputs.values():
                addresses.setdefault(weight, []).append(decision.address)
        calls = {address for used in addresses.values() for address in used}
        self._work, self._images = work, images
        table = quantized.plan.table
        self._outline = outline(reference, work.example, calls, table=table, largest=largest)
        self.layers = [
            self._layer(name, tuple(used))
            for name, used in addresses.items()
            if all(function_of(address) in SUPPORTED for address in used)
        ]
        self._float = _Side(reference, table, nullcontext)
        self._quantized = _Side(quantized.model, table, quantized.attachment)
        self._order = {path: place for place, path in enumerate(self._outline.blocks)}
        self._numbers: dict[int, Mapping[str, Arguments]] = {}
        self._block: Block | None = None

    def calls(self, layer: RoundedLayer) -> Iterator[tuple[LayerCall, LayerCall]]:
        """Its calls in the (quantized, float) network, batch after batch.

        Inputs of the quantized network are rounded, weights are not.
        """
        block = self.around(layer)
        if block is not None:
            self._enter(block)
        for number in self._float.numbers if block else range(len(self._batches())):
            if block is None:
                batch = self._batches()[number]
                rounded = self._quantized.watch(layer.addresses, batch.call)
                exact = self._float.watch(layer.addresses, batch.call)
            else:
                arguments = self._arguments(number)[block.path]
                rounded, exact = (
                    side.watch(layer.addresses, side.caller(block, number, arguments))
                    for side in (self._quantized, self._float)
                )
            for address in layer.addresses:
                if address in rounded and address in exact:
                    call = rounded[address]
                    yield replace(call, x=self._rounded(address, call.x)), exact[address]

    def around(self, layer: RoundedLayer) -> Block | None:
        """The block that the layer runs in."""
        return self._outline.around(set(layer.addresses))

    @torch.no_grad()
    def draw(
        self, layer: RoundedLayer, positions: int, generator: torch.Generator
    ) -> LayerSamples | None:
        """Sample about so many positions, evenly from all batches.

        Returns:
            ``None`` for a layer that no batch has reached.
        """
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        examples: list[Tensor] = []
        bias: Tensor | None = None
        for rounded, exact in self.calls(layer):
            if inputs and rounded.bias is not bias:
                continue  # two layers share a weight but not the bias: the first one counts
            width = rounded.weight[0].numel() * rounded.groups
            wanted = min(positions, _MOST_ELEMENTS // width)
            share = max(1, wanted // (len(self._batches()) * len(layer.addresses)))
            picks = torch.randperm(rounded.positions(), generator=generator)[:share]
            picks = picks.sort().values.to(rounded.x.device)
            inputs.append(rounded.patches(rounded.x, picks))
            targets.append(exact.picked(exact.output(exact.x, exact.weight), picks))
            before = int(examples[-1].max()) + 1 if examples else 0
            examples.append(rounded.examples(picks) + before)
            bias = rounded.bias
        if not inputs:
            return None
        return LayerSamples(torch.cat(inputs, 1), torch.cat(targets), bias, torch.cat(examples))

    def tensors(self, block: Block) -> list[BlockCall]:
        """The calls of a block, batch after batch."""
        self._enter(block)
        return [
            BlockCall(
                self._arguments(number)[block.path],
                self._quantized.inputs(block, number),
                self._float.inputs(block, number),
                self._float.run(block, number, self._arguments(number)[block.path]),
            )
            for number in self._float.numbers
        ]

    def _layer(self, name: str, addresses: tuple[str, ...]) -> RoundedLayer:
        plan = self._work.quantized.plan
        spec = next(spec for spec in plan.quantizers if spec.name == name)
        decisions = [d for d in plan.decisions if d.address in addresses]
        made = {a: rule.outputs.values() for a, rule in plan.calls.items()}
        behind = [next((a for a in made if d.writes in made[a]), d.address) for d in decisions]
        functions = [
            self._outline.functions.get(address, _same) if address != d.address else _same
            for address, d in zip(behind, decisions, strict=True)
        ]
        alike = len({function_of(address) for address in behind}) == 1
        return RoundedLayer(spec, addresses, decisions[0].module, functions[0] if alike else _same)

    def _rounded(self, address: str, x: Tensor) -> Tensor:
        rule = self._work.quantized.plan.calls.get(address)
        if rule is None or 0 not in rule.inputs:
            return x  # rounded where it was made
        rounded: Tensor = self._work.quantized.quantizers[rule.inputs[0]](x)
        return rounded

    def _batches(self) -> list[Inputs]:
        if not hasattr(self, "_read"):
            self._read = list(self._work.inputs(self._images))
        return self._read

    def _arguments(self, number: int) -> Mapping[str, Arguments]:
        """Path of a block → how it is called in one batch."""
        blocks = self._outline.blocks
        if not any(block.arguments.numbers for block in blocks.values()):
            return {path: block.arguments for path, block in blocks.items()}
        if number not in self._numbers:
            found = self._float.arguments(blocks, self._batches()[number])
            known = {path: block.arguments for path, block in blocks.items()}
            self._numbers[number] = {**known, **found}
        return self._numbers[number]

    def _enter(self, block: Block) -> None:
        """Have the inputs of ``block`` on both sides: from blocks before, or from the start."""
        if self._block is not None and self._block.path == block.path:
            return
        way = None
        if self._block is not None and self._order[self._block.path] < self._order[block.path]:
            way = self._outline.way(block, self._float.sources & self._quantized.sources)
        kept = self._outline.read_from(block)
        for side in (self._quantized, self._float):
            if way is None:
                side.values = {
                    number: found
                    for number, batch in enumerate(self._batches())
                    if (found := side.arrive(block, batch)) is not None
                }
            for step in way or ():
                for number in side.numbers:
                    side.go_through(step, number, self._arguments(number)[step.path])
            side.keep(kept)
        both = self._float.values.keys() & self._quantized.values.keys()
        for side in (self._quantized, self._float):
            side.values = {number: side.values[number] for number in sorted(both)}
        self._block = block


@dataclass(frozen=True)
class BlockCall:
    """One call of a block, in one batch.

    Attributes:
        arguments: the call without its tensors.
        rounded: the tensors among its arguments, in the quantized network.
        exact: the same in the float network.
        answer: what the float network makes.
    """

    arguments: Arguments
    rounded: list[Tensor]
    exact: list[Tensor]
    answer: Any


class _Reached(Exception):  # noqa: N818 - no error: the forward has shown what it was run for
    """Ends a forward."""


class _Side:
    """One of the two networks.

    Args:
        model: what runs.
        table: of the capture that addresses are from.
        mode: gives a context in which it computes as it should.

    Attributes:
        values: number of a batch → the tensors at hand in it.
    """

    def __init__(
        self,
        model: nn.Module,
        table: CallTable | None,
        mode: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model, self._table, self._mode = model, table, mode
        self.values: dict[int, dict[TensorSource, Tensor]] = {}

    @property
    def numbers(self) -> list[int]:
        """Of the batches that reach the current block."""
        return list(self.values)

    @property
    def sources(self) -> set[TensorSource]:
        """What is at hand, in every batch."""
        every = [set(found) for found in self.values.values()]
        return set.intersection(*every) if every else set()

    def keep(self, sources: set[TensorSource]) -> None:
        """Forget all other tensors."""
        for number, found in self.values.items():
            self.values[number] = {s: tensor for s, tensor in found.items() if s in sources}

    def inputs(self, block: Block, number: int) -> list[Tensor]:
        """The tensors that a block is given."""
        return [self.values[number][source] for source in block.sources]

    def caller(self, block: Block, number: int, arguments: Arguments) -> Callable[[nn.Module], Any]:
        """Runs the block on copies, which it may change; one tensor given twice stays one."""
        found = self.values[number]
        copies = {source: found[source].clone() for source in set(block.sources)}
        tensors = [copies[source] for source in block.sources]
        return lambda model: arguments.call(model.get_submodule(block.path), tensors)

    @torch.no_grad()
    def run(self, block: Block, number: int, arguments: Arguments) -> Any:
        """What a block makes of its inputs."""
        call = self.caller(block, number, arguments)
        with self._mode():
            return call(self._model)

    def go_through(self, block: Block, number: int, arguments: Arguments) -> None:
        """Run a block, so that what it makes is at hand."""
        for place, tensor in enumerate(tensors_in(self.run(block, number, arguments))):
            self.values[number][TensorSource(block.path, made=True, place=place)] = tensor

    @torch.no_grad()
    def arrive(self, block: Block, batch: Inputs) -> dict[TensorSource, Tensor] | None:
        """What reaches a block, if anything does."""
        found: list[dict[TensorSource, Tensor]] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = tensors_in((args, kwargs))
            if len(tensors) == len(block.sources):
                found.append(dict(zip(block.sources, tensors, strict=True)))
            raise _Reached

        module = self._model.get_submodule(block.path)
        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self._mode():
                batch.call(self._model)
        except _Reached:
            return found[0] if found else None
        finally:
            handle.remove()
        return None

    @torch.no_grad()
    def arguments(self, blocks: Mapping[str, Block], batch: Inputs) -> dict[str, Arguments]:
        """How blocks are called in one batch, by a forward of the whole network."""
        found: dict[str, Arguments] = {}
        with ExitStack() as hooks:
            for path in blocks:

                def note(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                    found[path] = Arguments.of(args, kwargs)

                module = self._model.get_submodule(path)
                handle = module.register_forward_pre_hook(note, with_kwargs=True)
                hooks.callback(handle.remove)
            batch.call(self._model)
        return found

    @torch.no_grad()
    def watch(
        self, addresses: tuple[str, ...], call: Callable[[nn.Module], Any]
    ) -> Mapping[str, LayerCall]:
        """What is called at these addresses when ``call`` runs a block, or all of the network."""
        watch = _Watch(self._model, frozenset(addresses), self._table)
        try:
            with self._mode(), watch:
                call(self._model)
        except _Reached:
            pass
        return watch.seen


class _Watch(AddressMode):
    def __init__(
        self, model: nn.Module, addresses: frozenset[str], table: CallTable | None
    ) -> None:
        super().__init__(model, table, addresses)
        self._wanted = addresses
        self.seen: dict[str, LayerCall] = {}

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if address in self._wanted:
            self.seen[address] = LayerCall.read(args, kwargs)
            if len(self.seen) == len(self._wanted):
                raise _Reached
            args = (args[0].clone(), *args[1:]) if args else args  # the network may change it
        return func(*args, **kwargs)


def _same(x: Tensor) -> Tensor:
    return x
