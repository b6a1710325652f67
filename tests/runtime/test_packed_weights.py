"""Packed sparse weights: the same values back, as small as promised, damage noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimkit.errors import ArtifactError, InputError
from slimkit.runtime.packed_weights import pack_tensor, read_packed, unpack_tensor, write_packed


def sparse(shape: tuple[int, ...], sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 100, shape, generator=generator).to(dtype)
    return values * (torch.rand(shape, generator=generator) >= sparsity).to(dtype)


@given(
    st.integers(1, 30), st.integers(1, 60), st.floats(0, 1), st.booleans(), st.integers(0, 10**6)
)
@settings(max_examples=120, deadline=None)
def test_any_tensor_comes_back_as_it_was(
    rows: int, columns: int, sparsity: float, integer: bool, seed: int
) -> None:
    dtype = torch.int8 if integer else torch.float32
    tensor = sparse((rows, columns), sparsity, dtype, seed)
    parts = pack_tensor(tensor)
    if parts is not None:
        again = unpack_tensor(parts, tensor.shape)
        assert again.dtype == dtype
        assert torch.equal(again, tensor)


@pytest.mark.parametrize(
    ("sparsity", "dtype", "most", "form"),
    [
        (0.75, torch.float32, 0.30, "bitmap"),
        (0.75, torch.int8, 0.40, "bitmap"),
        (0.97, torch.float32, 0.05, "delta8"),
        (0.90, torch.int8, 0.20, "delta4"),
    ],
)
def test_a_sparse_layer_is_as_small_as_promised(
    tmp_path: Path, sparsity: float, dtype: torch.dtype, most: float, form: str
) -> None:
    weight = sparse((128, 96, 1, 1), sparsity, dtype)
    parts = pack_tensor(weight)
    assert parts is not None
    assert form in parts
    fractions = write_packed(tmp_path / "w.safetensors", {"conv.weight": weight})
    assert fractions["conv.weight"] <= most
    size = (tmp_path / "w.safetensors").stat().st_size
    assert size <= most * weight.numel() * weight.element_size() + 600  # names and description


def test_a_file_holds_dense_and_sparse_tensors(tmp_path: Path) -> None:
    state = {
        "a.weight": sparse((16, 32), 0.8, torch.float32),
        "a.bias": torch.zeros(16),
        "b.weight": torch.randn(4, 4),
        "b.running_mean": torch.zeros(4),
        "empty.weight": torch.zeros(8, 8),
        "steps": torch.tensor(3),
    }
    fractions = write_packed(tmp_path / "w.safetensors", state)
    assert set(fractions) == {"a.weight", "empty.weight"}
    again = read_packed(tmp_path / "w.safetensors")
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_half_precision_is_refused_by_name(tmp_path: Path) -> None:
    weight = sparse((16, 16), 0.8, torch.float16)
    with pytest.raises(InputError, match=r"a\.weight.*float16"):
        write_packed(tmp_path / "w.safetensors", {"a.weight": weight})
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_packed(path, {"a.weight": sparse((8, 16), 0.75, torch.float32), "b": torch.ones(3)})
    content = path.read_bytes()
    state = read_packed(path)
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        try:
            again = read_packed(path)
        except ArtifactError:
            continue
        # what the header says in other words, such as a space, changes nothing
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            read_packed(path)


def test_other_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(ArtifactError, match="no packed weights"):
        read_packed(tmp_path / "plain.safetensors")
    with pytest.raises(ArtifactError, match="no such file"):
        read_packed(tmp_path / "none.safetensors")
