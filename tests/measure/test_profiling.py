"""Profiles against hand-computed numbers and the published figures of known networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from slimkit.errors import CaptureError, InputError
from slimkit.measure.profiling import profile


def layers(found):
    return {layer.name: layer for layer in found.layers}


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [
        # Papers and torchvision's documentation: 1.814 G, 0.301 G; 11.69 M, 3.50 M.
        ("resnet18", 1_814_073_344, 11_689_512),
        ("mobilenet_v2", 300_774_272, 3_504_872),
    ],
)
def test_known_networks_have_their_published_cost(name, macs, params):
    model = torchvision.models.get_model(name, weights=None)
    found = profile(model, torch.zeros(1, 3, 224, 224))
    assert (found.macs, found.params) == (macs, params)
    assert found.bops == macs * 32 * 32
    state = model.state_dict().values()
    assert found.bytes == sum(t.numel() * t.element_size() for t in state)


@pytest.mark.parametrize(
    ("layer", "size", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 10), 8 * 100 * 3 * 9),
        (nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1), (1, 4, 10, 10), 8 * 25 * 1 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (1, 4, 5, 5), 4 * 25 * 3 * 4),
        (nn.Conv1d(3, 5, 4), (2, 3, 10), 2 * 5 * 7 * 3 * 4),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
        (nn.Linear(7, 5), (2, 3, 7), 6 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (4, 7), 4 * 7 * 5),
    ],
)
def test_each_kind_of_layer_is_counted_by_its_formula(layer, size, macs, device):
    assert profile(layer.to(device), torch.randn(size)).macs == macs


def test_a_batch_multiplies_the_macs_and_not_the_parameters():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    one, four = (profile(model, torch.zeros(n, 3, 8, 8)) for n in (1, 4))
    assert four.macs == 4 * one.macs
    assert four.params == one.params


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_counts_scores_and_weighted_sum():
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    assert profile(Attention(), (q, k, v)).macs == 2 * 5 * 7 * (8 + 8)


def test_multi_head_attention_charges_its_output_projection_to_that_layer():
    width, tokens = 16, 5
    layer = nn.MultiheadAttention(width, 2, batch_first=True)
    x = torch.randn(1, tokens, width)
    rows = layers(profile(layer, (x, x, x)))
    assert rows["out_proj"].macs == tokens * width * width
    assert rows[""].macs == 3 * tokens * width * width + 2 * tokens * tokens * width


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.decoder = nn.Linear(6, 11, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.embedding(tokens))


def test_shared_parameters_count_once_and_each_use_multiplies():
    found = profile(Tied(), torch.tensor([[1, 2, 3]]))
    assert found.params == 66
    assert layers(found)["decoder"].macs == 3 * 6 * 11


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_a_layer_that_runs_twice_is_charged_twice():
    found = profile(Repeated(), torch.randn(1, 4))
    assert (found.macs, found.params) == (2 * 16, 20)


class Quantized(nn.Module):
    """What a quantization wrapper looks like from outside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)

    def bit_widths(self):
        return {"0": (8, 8)}


def test_bit_widths_of_a_quantized_network_set_bops_and_bytes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    rows = layers(profile(Quantized(model), torch.randn(1, 3, 5, 5)))
    assert rows["0"].bops == rows["0"].macs * 8 * 8
    assert rows["2"].bops == rows["2"].macs * 32 * 32
    assert rows["0"].bytes == 12 * 1 + 4 * 4  # int8 weights, 32-bit bias
    assert rows["2"].bytes == 8 * 4 + 2 * 4


def test_zeros_are_counted_and_shown():
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight[:2] = 0
    found = profile(layer, torch.randn(1, 4))
    assert (found.params, found.nonzero_params, found.sparsity) == (16, 8, 0.5)
    assert "non-zero" in str(found)


def test_the_table_names_every_layer_and_adds_up():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Conv2d(8, 4, 1))
    found = profile(model, torch.zeros(1, 3, 8, 8))
    lines = str(found).splitlines()
    assert sum("Conv2d" in line for line in lines) == 2
    assert any(line.startswith("total") and "100.0 %" in line for line in lines)
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert sum(layer.params for layer in found.layers) == found.params


def test_a_folded_table_keeps_the_sums():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 4, 1))
    found = profile(model, torch.zeros(1, 3, 8, 8))
    assert found.table(depth=1).row_count < found.table().row_count


def test_modules_that_hold_one_module_share_its_line():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 2))
    lines = str(profile(model, torch.zeros(1, 4))).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["0.0.0", "1", "total"]


def test_what_a_parametrization_computes_belongs_to_its_layer():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU())
    rows = layers(profile(model, torch.zeros(1, 3, 8, 8)))
    assert list(rows) == ["0"]
    assert (rows["0"].params, rows["0"].macs) == (8 * 27 + 8 + 8, 8 * 36 * 27)


def test_profiling_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_wrong_input_names_the_layer_that_failed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 3))
    with pytest.raises(CaptureError, match=r"^1: "):
        profile(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="example_inputs"):
        profile(model, [torch.zeros(1, 3, 8, 8)])
