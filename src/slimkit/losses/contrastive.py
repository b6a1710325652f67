"""Contrastive representation distillation: embeddings of one sample are near, of others apart."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["crd"]


def crd(scores: Tensor, samples: int) -> Tensor:
    """Noise-contrastive estimation of CRD, Tian et al. 2020 (arXiv 1910.10699).

    A critic ``h = s / (s + K/M)`` tells the one true partner of a sample from K others, drawn
    from M samples:

        ``−mean_n [log h(s[n, 0]) + Σ_{k≥1} log(1 − h(s[n, k]))]``

    Args:
        scores: s = exp(g_S·g_T / τ) / Z > 0, (N, 1 + K): of the true partner, then of the others.
        samples: M, among which the others were drawn.

    Returns:
        A scalar ≥ 0, float32.
    """
    scores = scores.float()
    others = scores.shape[1] - 1
    noise = others / samples
    total = (scores + noise + 1e-7).log()
    positive = scores[:, 0].clamp_min(1e-30).log() - total[:, 0]
    negative = (math.log(noise) - total[:, 1:]).sum(dim=1)
    return -(positive + negative).mean()
