"""What a recipe says about training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimkit.doors import door

__all__ = ["MOST_EPOCHS", "MOST_RATE", "TrainSettings"]

MOST_EPOCHS = 100_000
"""More is a slip of the pen: the longest published schedules have some thousand epochs."""
MOST_MINUTES = 525_600
"""A year."""
MOST_RATE = 1_000.0
"""Of a learning rate or a weight decay, likewise."""


@door
class TrainSettings(BaseModel):
    """How :func:`slimkit.train.fit` trains.

    Attributes:
        epochs: passes over the training data, at most 100,000; a fraction ends within the last
            one.
        minutes: budget of the training with its evaluations: as many whole epochs, up to
            ``epochs``, as fit into it here, and the schedule is laid out over these. What comes
            out depends on the speed of the machine; the history says how many epochs it were.
        lr: highest learning rate.
        optimizer: ``"sgd"`` (with ``momentum``, ``nesterov``) or ``"adamw"``.
        weight_decay: L2 penalty (sgd) or decoupled decay (adamw).
        decay_norms: apply it also to one-dimensional parameters, that is to norms and biases.
        schedule: learning rate over the run: ``"cosine"`` to zero (Loshchilov & Hutter 2017,
            equation 5, without restarts), ``"one_cycle"`` up from ``lr / 25`` and down to
            nearly zero (Smith & Topin 2019), ``"linear"`` to zero, or ``"constant"``.
        warmup_epochs: rise linearly from zero first; for one_cycle the length of its rise
            (0 means 30 % of the run).
        label_smoothing: for the task's loss, 0 … 1.
        loss_weight: of the task's loss beside the extra losses; 0 trains on those alone.
        ema: decay of the moving average of weights that is evaluated and kept, such as 0.999;
            ``None`` keeps the last weights.
        clip_grad_norm: scale gradients down to this norm.
        accumulate: batches of the loader per optimizer step, whose gradients are averaged; the
            last step of an epoch takes what is left.
        precision: ``"fp32"``, ``"bf16"`` (autocast), or ``"auto"``: whichever takes a training
            step faster here, measured on the model itself.
        channels_last: memory layout of images and weights; ``"auto"`` when there are
            two-dimensional convolutions.
        freeze_batch_norm: keep running statistics and use them, as in evaluation.
        batch_norm_reestimation: measure batch-norm statistics anew at the end, over so many
            training batches; 0 does not.
        image_size: train on images of so many rows and columns, while evaluation sees them as
            they are: a first part of the training on smaller images takes less time. Not for
            targets that hold positions, such as boxes.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        log_every: steps between updates of the progress bar and of TensorBoard.
        device: ``"auto"`` takes an accelerator where there is one; ``"cpu"`` does not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[float, Field(gt=0, le=MOST_EPOCHS)] = 10
    minutes: Annotated[float, Field(gt=0, le=MOST_MINUTES)] | None = None
    lr: Annotated[float, Field(gt=0, le=MOST_RATE)] = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0, le=MOST_RATE)] = 5e-4
    decay_norms: bool = True
    schedule: Literal["cosine", "one_cycle", "linear", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0, le=MOST_EPOCHS)] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0
    loss_weight: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_grad_norm: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    accumulate: Annotated[int, Field(ge=1, le=65_536)] = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    freeze_batch_norm: bool = False
    batch_norm_reestimation: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    evaluate_every: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    log_every: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    device: Literal["auto", "cpu"] = "auto"
