"""Benchmarks: each module measures one claim and writes its table to ``docs/benchmarks/``."""

import os
from pathlib import Path

_DATA = Path(os.environ.get("SLIMKIT_DATA") or Path(__file__).parents[2] / "shared" / "data")
# recipes that benchmarks run look for their checkpoints there
os.environ.setdefault("SLIMKIT_CHECKPOINTS", str(_DATA.parent / "checkpoints"))
