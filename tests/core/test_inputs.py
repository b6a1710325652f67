"""Example inputs in parts."""

from __future__ import annotations

import torch

import slimkit as sk


def test_inputs_are_split_where_examples_can_be_told_apart() -> None:
    pair = sk.Inputs((torch.arange(5.0), torch.arange(10.0).reshape(5, 2)))
    parts = pair.split(2)
    assert [part.examples for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.args[1] for part in parts]), pair.args[1])
    apart = sk.Inputs((torch.zeros(5), torch.zeros(3)))
    (whole,) = apart.split(2)
    assert whole is apart
