from __future__ import annotations

import pytest
from torch import nn
from torchvision.models import resnet18

from slimkit.errors import InputError, PatternError
from slimkit.graph import match_modules


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return resnet18(num_classes=2)


def test_a_path_takes_in_everything_below(model: nn.Module) -> None:
    whole = match_modules(model, "layer4", where="ignore")
    assert {"layer4", "layer4.0", "layer4.1.conv2"} <= whole
    assert match_modules(model, ["layer4.*"], where="ignore") == whole - {"layer4"}
    assert not any(path.startswith("layer1") for path in whole)


def test_classes_match_by_name_and_by_type(model: nn.Module) -> None:
    assert match_modules(model, "Linear", where="ignore") == {"fc"}
    assert match_modules(model, nn.Linear, where="ignore") == {"fc"}
    norms = match_modules(model, ["BatchNorm*"], where="ignore")
    assert norms == match_modules(model, [nn.BatchNorm2d], where="ignore")
    assert len(norms) == 20


def test_no_patterns_match_nothing(model: nn.Module) -> None:
    assert match_modules(model, [], where="ignore") == set()


def test_a_pattern_without_a_match_is_an_error_with_the_nearest_name(model: nn.Module) -> None:
    with pytest.raises(PatternError, match=r"stages\.prune\.ignore: .*'layer5'.*'layer[1-4]'"):
        match_modules(model, ["fc", "layer5"], where="stages.prune.ignore")
    with pytest.raises(PatternError, match="Conv1d"):
        match_modules(model, nn.Conv1d, where="ignore")
    with pytest.raises(InputError, match=r"patterns\.0: expected text or a class"):
        match_modules(model, [3], where="ignore")  # type: ignore[list-item]
