"""Example inputs, under the name that graph code knows; they live in :mod:`slimkit.inputs`.

The values are on the lowest floor because the runtime takes them too and must not import graph.
"""

from __future__ import annotations

from slimkit.inputs import ExampleInputs, Inputs, as_inputs

__all__ = ["ExampleInputs", "Inputs", "as_inputs"]
