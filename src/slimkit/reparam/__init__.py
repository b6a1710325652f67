"""Re-parameterization: the same function with fewer operators.

::

    folded = fuse(model, example_inputs)  # no batch norms left where they follow a convolution
"""

from __future__ import annotations

from slimkit.reparam.fusing import fuse

__all__ = ["fuse"]
