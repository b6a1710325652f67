"""Image classification: loss, metrics and the checks between a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import InputError, ModelError
from slimkit.modules import evaluation
from slimkit.tasks.data.loading import Splits

__all__ = ["ClassificationTask"]


class ClassificationTask:
    """One label per image.

    Attributes:
        metric: the figure that decides, in percent; higher is better.
    """

    metric = "accuracy"

    def loss_fn(self, label_smoothing: float = 0.0) -> Callable[[Any, Tensor], Tensor]:
        """Cross-entropy of logits (N, classes) and labels (N,).

        Args:
            label_smoothing: share of the target that is spread over all classes, 0 … 1
                (Szegedy et al. 2016, section 7).

        Raises:
            InputError: the share is outside 0 … 1.
        """
        if not 0 <= label_smoothing < 1:
            raise InputError(
                f"must be at least 0 and below 1, got {label_smoothing}", where="label_smoothing"
            )

        def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits(outputs), targets, label_smoothing=label_smoothing)

        return cross_entropy

    def evaluate(
        self,
        model: nn.Module | Callable[[Any], Any],
        loader: Iterable[tuple[Tensor, Tensor]],
    ) -> dict[str, float]:
        """Accuracy and loss over all batches.

        Args:
            model: a module (evaluated in eval mode without gradients, its training flags
                restored), or a function from a float32 array (N, C, H, W) to logits as an
                array, such as a runtime session's.
            loader: batches of images and labels.

        Returns:
            ``accuracy`` and, from more than five classes on, ``top5``, in percent; ``loss``,
            the mean cross-entropy without label smoothing.
        """
        if isinstance(model, nn.Module):
            return _scores(_module_logits(model, loader))
        return _scores(
            (logits(model(images.contiguous().numpy())), labels) for images, labels in loader
        )

    def check_head(self, model: nn.Module, splits: Splits) -> None:
        """Make sure that ``model`` takes the images and has one output per class.

        Raises:
            ModelError: it fails on a batch of two images, or the number of outputs differs.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        images = torch.zeros(2, *splits.shape, device=device)
        try:
            with evaluation(model), torch.no_grad():
                outputs = logits(model(images))
        except (RuntimeError, ValueError, TypeError) as error:
            raise ModelError(
                f"the model cannot take images of shape {splits.shape}: {error}", where="model"
            ) from error
        expected = len(splits.classes)
        if outputs.dim() != 2 or outputs.shape[1] != expected:
            raise ModelError(
                f"the model's output is {tuple(outputs.shape)} for 2 images, "
                f"but the data has {expected} classes",
                where="model",
                hint=f"num_classes={expected}",
            )


def logits(outputs: Any) -> Tensor:
    """The logits in what a model returns: a tensor, an array, or the first of several.

    Raises:
        ModelError: there are none.
    """
    if isinstance(outputs, dict):  # Hugging Face's ModelOutput is one
        outputs = outputs.get("logits", next(iter(outputs.values()), None))
    elif isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    elif hasattr(outputs, "logits"):
        outputs = outputs.logits
    if isinstance(outputs, Tensor):
        return outputs
    try:
        return torch.as_tensor(outputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"expected logits (N, classes), got {type(outputs).__name__}", where="model"
        ) from error


def _module_logits(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]
) -> Iterable[tuple[Tensor, Tensor]]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluation(model):
        for images, labels in loader:
            with torch.no_grad():
                outputs = logits(model(images.to(device, non_blocking=True)))
            yield outputs.float(), labels.to(device, non_blocking=True)


def _scores(batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    count, right, among_five, loss, classes = 0, 0.0, 0.0, 0.0, 0
    for outputs, labels in batches:
        count += len(labels)
        classes = outputs.shape[1]
        loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        if classes > 5:
            best = outputs.topk(5, dim=1).indices == labels[:, None]
            among_five += float(best.any(1).sum())
            right += float(best[:, 0].sum())
        else:
            right += float((outputs.argmax(1) == labels).sum())
    if not count:
        raise InputError("the loader yields no batch", where="loader")
    scores = {"accuracy": 100 * right / count, "loss": loss / count}
    return scores | {"top5": 100 * among_five / count} if classes > 5 else scores
