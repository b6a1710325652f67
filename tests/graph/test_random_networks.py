"""Any plan for any network of the supported operators is proved by equivalence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attention_layers import STYLES, Attention, Split, Standardised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimkit import prune
from slimkit.errors import PlanError
from slimkit.graph import capture, check_equivalence, dependency_groups, track
from slimkit.graph.groups import AttentionPart

SIZE = 4
STEPS = [
    *("conv", "grouped", "depthwise", "transposed", "norm", "group_norm", "layer_norm", "relu"),
    *(
        "add",
        "cat",
        "chunk",
        "halves",
        "shuffle",
        "gate",
        "scale",
        "pad",
        "tokens",
        "glu",
        "instance",
        "attention",
        "encoder",
        "standardised",
        "parts",
        "mean",
        "softmax",
    ),
]


class RandomNet(nn.Module):
    """Runs steps on a growing list of (N, C, 4, 4) maps; each reads the ones drawn for it."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps: list[tuple[str, int, int]] = []
        self.layers = nn.ModuleList()
        channels = [3]
        for name, first, second in [("conv", 0, 3), *steps]:
            i, j = first % len(channels), second % len(channels)
            made = self._layer(name, channels[i], second)
            widths = self._widths(name, channels[i], channels[j], made)
            if widths:
                self.steps.append((name, i, j))
                self.layers.append(made)
                channels += widths
        self.head = nn.Linear(sum(channels[1:]) * SIZE * SIZE, 3)

    @staticmethod
    def _layer(name: str, c: int, draw: int) -> nn.Module:
        even = 2 * (2 + draw % 4)
        makers = {
            "conv": lambda: nn.Conv2d(c, even, 3, padding=1, bias=bool(draw % 2)),
            "grouped": lambda: nn.Conv2d(c, 2 * c, 1, groups=2 if draw % 2 else max(c // 2, 1)),
            "depthwise": lambda: nn.Conv2d(c, c * (1 + draw % 2), 3, padding=1, groups=c),
            "transposed": lambda: nn.ConvTranspose2d(c, even, 1, groups=1 + draw % 2),
            "norm": lambda: nn.BatchNorm2d(c),
            "group_norm": lambda: nn.GroupNorm([1, 2, c][draw % 3], c),
            "layer_norm": lambda: nn.LayerNorm(c),
            "gate": lambda: nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, even, 1), nn.ReLU(), nn.Conv2d(even, c, 1)
            ),
            "scale": lambda: nn.ParameterList([torch.randn(c, 1, 1)]),
            "tokens": lambda: nn.Linear(c, c),
            "instance": lambda: nn.InstanceNorm2d(c, affine=bool(draw % 2)),
            "attention": lambda: Attention(c, 2, STYLES[draw % len(STYLES)]),
            "encoder": lambda: nn.TransformerEncoderLayer(c, 2, 2 * c, batch_first=True),
            "standardised": lambda: Standardised(c, even, 3, padding=1, groups=1 + draw % 2),
            "parts": lambda: Split([2, c - 2]),
        }
        return makers.get(name, nn.Identity)() if c % 2 == 0 or name == "conv" else nn.Identity()

    @staticmethod
    def _widths(name: str, c: int, other: int, layer: nn.Module) -> list[int]:
        """Channels of the maps that a step makes; none if it does not fit."""
        if name == "conv":
            return [layer.out_channels]
        if c % 2 or (name in ("add", "cat") and other % 2):
            return []
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            return [layer.out_channels]
        if name == "add":
            return [c] if c == other else []
        halves = [c // 2] if c % 4 == 0 else []
        special = {"cat": [c + other], "chunk": halves * 2, "halves": halves, "glu": halves}
        special["parts"] = [2, c - 2] if c > 2 else []
        return special.get(name, [c + 2] if name == "pad" else [c])

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for (name, i, j), layer in zip(self.steps, self.layers, strict=True):
            maps += self.step(name, maps[i], maps[j], layer)
        return self.head(torch.cat([m.flatten(1) for m in maps[1:]], dim=1))

    def step(  # noqa: C901, PLR0911, PLR0912 - a table
        self, name: str, x: Tensor, other: Tensor, layer: nn.Module
    ) -> list[Tensor]:
        b, c, h, w = x.shape
        match name:
            case "relu":
                return [F.hardswish(x)]
            case "add":
                return [x + other]
            case "cat":
                return [torch.cat([x, other], 1)]
            case "chunk":
                return list(x.chunk(2, 1))
            case "halves":
                return [x[:, : c // 2] * x[:, c // 2 :]]
            case "glu":
                return [F.glu(x, dim=1)]
            case "shuffle":
                return [x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w)]
            case "gate":
                return [x * layer(x).sigmoid()]
            case "scale":
                return [x * layer[0]]
            case "pad":
                return [F.pad(x, (0, 0, 0, 0, 1, 1))]
            case "layer_norm":
                return [layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
            case "parts":
                return list(layer(x))
            case "mean":
                return [x * x.mean(1, keepdim=True) + x.amax(1, keepdim=True)]
            case "softmax":
                return [x.softmax(1)]
            case "tokens" | "attention" | "encoder":
                tokens = layer(x.flatten(2).transpose(1, 2))
                return [tokens.transpose(1, 2).unflatten(2, (h, w))]
        return [layer(x)]


step = st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9))


@settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    steps=st.lists(step, min_size=1, max_size=10),
    ratio=st.sampled_from([0.2, 0.5, 0.8]),
    attention=st.sampled_from([None, "heads", "channels"]),
)
def test_random_networks_are_pruned_exactly(
    steps: list[tuple[str, int, int]], ratio: float, attention: AttentionPart | None
) -> None:
    torch.manual_seed(len(steps))
    model = RandomNet(steps).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    x = torch.randn(2, 3, SIZE, SIZE)
    assert track(capture(model, x), model).failed == []
    try:
        plan = prune.plan(
            model,
            x,
            ratio=ratio,
            criterion="random",
            attention=attention,
            round_to=1,
            min_channels=1,
        )
    except PlanError:  # nothing can go: then nothing must be free
        groups = dependency_groups(capture(model, x), model, attention)
        assert all(
            group.frozen_reason or group.size * (1 - ratio) > group.size - 1 for group in groups
        )
        return
    proof = check_equivalence(model, plan, x)
    assert proof.equal, f"{proof}\n{plan.explain()}"
