"""Where the loop runs: one device, or one process per device under ``accelerate launch``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from slimkit.errors import InputError, TrainingError
from slimkit.inputs import Batch, as_batch
from slimkit.train.settings import TrainSettings

__all__ = ["Device"]


class Device:
    """A thin layer over Accelerate: placement, autocast, gradients across processes.

    Args:
        settings: ``device`` and ``channels_last``.

    Attributes:
        device: where tensors go.
        is_main: this process writes files and shows progress.
        processes: how many train together.
    """

    def __init__(self, settings: TrainSettings) -> None:
        from accelerate.state import is_initialized

        self._found_state: bool = is_initialized()
        self._accelerator = _accelerator(cpu=settings.device == "cpu")
        self._wanted_layout = settings.channels_last
        self._layout = torch.contiguous_format
        self.device: torch.device = self._accelerator.device
        self.is_main: bool = self._accelerator.is_main_process
        self.processes: int = self._accelerator.num_processes

    @property
    def random_devices(self) -> list[torch.device]:
        """Whose random state is to be kept beside the CPU's."""
        return [self.device] if self.device.type == "cuda" else []

    def place(self, model: nn.Module, *, in_parts: bool = False) -> nn.Module:
        """Move ``model`` here and into its layout; returns what is to be called (DDP or it).

        Args:
            model: changed in place.
            in_parts: a forward may leave parameters out, as in a supernet; across processes
                those must then be looked for.
        """
        convolutional = any(isinstance(m, nn.Conv2d) for m in model.modules())
        if self._wanted_layout is True or (self._wanted_layout == "auto" and convolutional):
            self._layout = torch.channels_last
        _to(model, self.device, self._layout)
        if self.processes == 1:  # Accelerate would look for sharded tensors: seconds of imports
            return model
        if in_parts:
            from accelerate import DistributedDataParallelKwargs

            self._accelerator.ddp_handler = DistributedDataParallelKwargs(
                find_unused_parameters=True
            )
        return cast("nn.Module", self._accelerator.prepare_model(model))

    def put_back(self, model: nn.Module, device: torch.device) -> None:
        """Undo :meth:`place`: what comes after must not depend on where training ran.

        Accelerate's state is forgotten too if this loop was the first to set it up, so that
        the user's own ``Accelerator`` or ``Trainer`` starts from nothing.
        """
        _to(model, device, torch.contiguous_format)
        if not self._found_state:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=self.processes == 1)

    def moved(self, item: Any) -> Batch:
        """What a loader yields, on the device, images in the model's layout.

        Raises:
            InputError: it is no batch; see :func:`slimkit.inputs.as_batch`.
        """
        return as_batch(item).to(self.device, layout=self._layout)

    def autocast(self, bf16: bool) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged over processes."""
        self._accelerator.backward(loss)

    def share_gradients(self, extra: Sequence[nn.Parameter]) -> None:
        """Average the gradients of ``extra`` over processes, which DDP does not know."""
        if self.processes > 1:
            for parameter in extra:
                if parameter.grad is not None:
                    parameter.grad = self._accelerator.reduce(parameter.grad, "mean")

    def agreed(self, precision: Literal["fp32", "bf16"]) -> Literal["fp32", "bf16"]:
        """The first process's choice, for all."""
        if self.processes == 1:
            return precision
        from accelerate.utils import broadcast_object_list

        choice = [precision]
        broadcast_object_list(choice)
        return choice[0]

    @contextlib.contextmanager
    def sharded(self, loader: Any) -> Iterator[None]:
        """Each process sees its part of the data.

        Raises:
            InputError: there are several processes and the loader cannot be shared out.
        """
        if self.processes == 1:
            yield
            return
        if not hasattr(loader, "shard"):
            raise InputError(
                "the loader has no shard(rank, world_size), so its data cannot be shared out "
                f"to {self.processes} processes",
                where="loader",
            )
        loader.shard(self._accelerator.process_index, self.processes)
        try:
            yield
        finally:
            loader.shard(0, 1)


def _to(model: nn.Module, device: torch.device, layout: torch.memory_format) -> None:
    """Move a model; what has four dimensions into the layout, which no other tensor can have."""
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=layout)


def _accelerator(*, cpu: bool) -> Any:
    """An ``Accelerator`` without mixed precision of its own.

    Accelerate keeps one state per process. Where an earlier user left another one behind, it
    is replaced, unless processes already talk to each other through it.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    try:
        return Accelerator(cpu=cpu, mixed_precision="no")
    except ValueError as error:
        if PartialState().num_processes > 1:
            raise TrainingError(
                f"Accelerate was set up in another way before: {error}", where="device"
            ) from error
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=cpu, mixed_precision="no")
