"""PP-PicoDet (Yu et al. 2021): a one-stage detector for phones, with its loss and its decoding."""

from __future__ import annotations

from slimkit.models.picodet.network import PicoDet, picodet_l, picodet_m, picodet_s

__all__ = ["PicoDet", "picodet_l", "picodet_m", "picodet_s"]
