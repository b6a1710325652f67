"""Modules that some losses train or keep: generators, embeddings, memory banks, early exits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.distill.losses.projection import seeded
from slimkit.errors import InputError, ModelError

__all__ = [
    "EarlyExit",
    "Embedding",
    "MarginReLU",
    "MaskedGenerator",
    "Memory",
    "NonLocal",
    "Paraphraser",
    "Translator",
    "WithRelation",
]


class MarginReLU(nn.Module):
    """``max(x, m_c)``: negative values only down to their mean in each channel (OFD).

    With the absolute scale σ of a batch norm and its shift μ, a channel is taken for normal, and

        ``m = E[x | x < 0] = μ − σ · φ(μ/σ) / Φ(−μ/σ)``

    Args:
        margins: (C,), all ≤ 0.
    """

    margins: Tensor

    def __init__(self, margins: Tensor) -> None:
        super().__init__()
        self.register_buffer("margins", margins)

    @classmethod
    def of(cls, layer: nn.Module | None, *, where: str) -> MarginReLU:
        """For what a batch norm puts out.

        Raises:
            ModelError: the layer is no batch norm with scale and shift.
        """
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if not isinstance(layer, kinds) or layer.weight is None:
            kind = "no module" if layer is None else f"a {type(layer).__name__}"
            raise ModelError(
                f"the margin of ofd follows from a batch norm, this is {kind}",
                where=where,
                hint="name the teacher's batch norm in front of the activation function",
            )
        scale = layer.weight.detach().double().abs().clamp_min(1e-12)
        shift = layer.bias.detach().double()
        ratio = shift / scale
        density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
        below = torch.special.ndtr(-ratio)
        # far above zero hardly anything is negative: the mean of it is then just below zero
        margins = torch.where(
            below > 1e-8, shift - scale * density / below.clamp_min(1e-8), -scale / 100
        )
        return cls(margins.clamp_max(0).float())

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, …) → the same."""
        return torch.maximum(features, self.margins.view(1, -1, *[1] * (features.dim() - 2)))


class MaskedGenerator(nn.Module):
    """Recovers whole features from features with holes (MGD).

    In training a random part of the positions is set to zero, then two 3×3 convolutions fill
    them in.

    Args:
        align: brings the student's features to the teacher's shape, or None.
        channels: of the teacher.
        mask: part of the positions that is hidden, 0 … 1.
    """

    def __init__(self, align: nn.Module | None, channels: int, mask: float) -> None:
        super().__init__()
        self.align, self.mask = align, mask
        with seeded():
            self.generation = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )

    def forward(self, features: Tensor) -> Tensor:
        """(N, C_student, H, W) → (N, C_teacher, H', W')."""
        if self.align is not None:
            features = self.align(features)
        if self.training and self.mask:
            shape = (len(features), 1, *features.shape[2:])
            features = features * (torch.rand(shape, device=features.device) >= self.mask)
        return torch.as_tensor(self.generation(features))


class NonLocal(nn.Module):
    """Relations between all positions of a map, Wang et al. 2018 (arXiv 1711.07971), Gaussian.

    ``x + W · softmax(θ(x)ᵀ φ(x)) g(x)`` with 1×1 convolutions θ, φ, g and W.

    Args:
        channels: of the maps.
        reduction: θ, φ and g have so many times fewer channels.
        pool: φ and g see maps so many times smaller, for memory.
    """

    def __init__(self, channels: int, reduction: int = 2, pool: int = 1) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        with seeded():
            self.theta = nn.Conv2d(channels, inner, 1)
            self.phi = nn.Conv2d(channels, inner, 1)
            self.g = nn.Conv2d(channels, inner, 1)
            self.out = nn.Conv2d(inner, channels, 1)
        self.pool = pool

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) → the same."""
        seen = F.max_pool2d(features, self.pool) if self.pool > 1 else features
        queries = self.theta(features).flatten(2).transpose(1, 2)
        weights = (queries @ self.phi(seen).flatten(2)).softmax(dim=2)
        values = (weights @ self.g(seen).flatten(2).transpose(1, 2)).transpose(1, 2)
        return features + torch.as_tensor(
            self.out(values.reshape(len(features), -1, *features.shape[2:]))
        )


class WithRelation(nn.Module):
    """Features, aligned, and their non-local relations: one record becomes two (FBKD)."""

    def __init__(self, align: nn.Module | None, relation: NonLocal) -> None:
        super().__init__()
        self.align, self.relation = align, relation

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) → aligned features, relations."""
        if self.align is not None:
            features = self.align(features)
        return features, self.relation(features)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1),
    )


class Paraphraser(nn.Module):
    """The teacher's factor, learned by putting its features together again (factor transfer).

    Args:
        channels: of the teacher's features.
        factors: of the factor.
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        with seeded():
            self.encoder = nn.Sequential(_block(channels, channels), _block(channels, factors))
            self.decoder = nn.Sequential(_block(factors, channels), _block(channels, channels))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) → factor (N, F, H, W), mean squared error of the reconstruction."""
        factor = self.encoder(features)
        return factor, F.mse_loss(self.decoder(factor), features)


class Translator(nn.Module):
    """The student's factor, of the teacher's shape (factor transfer).

    Args:
        channels: of the student's features.
        factors: of the teacher's factor.
        size: height and width of the teacher's features.
    """

    def __init__(self, channels: int, factors: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        with seeded():
            self.body = nn.Sequential(_block(channels, factors), _block(factors, factors))

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H', W') → (N, F, H, W)."""
        return torch.as_tensor(self.body(F.adaptive_avg_pool2d(features, self.size)))


class Embedding(nn.Module):
    """A linear embedding of length 1 (CRD).

    Args:
        features: of a sample, flattened.
        size: of the embedding.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        with seeded():
            self.linear = nn.Linear(features, size)

    def forward(self, features: Tensor) -> Tensor:
        """(N, …) → (N, size)."""
        return F.normalize(self.linear(features.flatten(1)), dim=1)


class Memory(nn.Module):
    """The latest embedding of every training sample, for both networks (CRD).

    Args:
        samples: training samples; their ids are 0 … samples − 1.
        size: of the embeddings.
        negatives: other samples that each sample is told from.
        temperature: τ > 0 of the critic.
        momentum: part of the old embedding that stays, 0 … 1.
    """

    student: Tensor
    teacher: Tensor
    constants: Tensor

    def __init__(
        self, samples: int, size: int, negatives: int, temperature: float, momentum: float
    ) -> None:
        super().__init__()
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        bound = math.sqrt(3 / size)
        generator = torch.Generator().manual_seed(0)
        for name in ("student", "teacher"):
            values = (torch.rand(samples, size, generator=generator) * 2 - 1) * bound
            self.register_buffer(name, values)
        # of the two critics; 0 until the first batch has set them
        self.register_buffer("constants", torch.zeros(2))

    def forward(self, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) of samples ``ids`` → scores (N, 1 + K) of both against the memory.

        The memory then takes the embeddings in.

        Raises:
            InputError: an id is not below the number of samples.
        """
        samples = len(self.student)
        ids = ids.to(student.device)
        if int(ids.max()) >= samples or int(ids.min()) < 0:
            raise InputError(
                f"the memory of crd has room for {samples} samples, got the id {int(ids.max())}",
                where="samples",
                hint="the number of training samples",
            )
        others = torch.randint(samples, (len(ids), self.negatives), device=ids.device)
        chosen = torch.cat([ids[:, None], others], dim=1)
        scores = (
            self._scores(student, self.teacher[chosen], 0),
            self._scores(teacher, self.student[chosen], 1),
        )
        self._remember("student", student, ids)
        self._remember("teacher", teacher, ids)
        return scores

    def _scores(self, embedding: Tensor, memory: Tensor, critic: int) -> Tensor:
        scores = ((memory @ embedding[:, :, None])[:, :, 0] / self.temperature).exp()
        if not self.constants[critic]:  # Z is what makes the first scores sum to 1 over samples
            self.constants[critic] = scores.detach().mean() * len(self.student)
        return scores / self.constants[critic].clone()

    @torch.no_grad()
    def _remember(self, name: str, embedding: Tensor, ids: Tensor) -> None:
        memory = getattr(self, name)
        mixed = self.momentum * memory[ids] + (1 - self.momentum) * embedding.detach()
        memory[ids] = F.normalize(mixed, dim=1)


class EarlyExit(nn.Module):
    """A small classifier on an inner layer (BYOT).

    Args:
        channels: of the inner layer.
        width: channels of the deepest layer, which the exit's features shall resemble.
        classes: of the task.
    """

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        with seeded():
            self.bottleneck = nn.Sequential(
                nn.Conv2d(channels, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            self.head = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) → pooled features (N, width), logits (N, classes)."""
        pooled = self.bottleneck(features).mean((2, 3))
        return pooled, self.head(pooled)
