from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.artifact import read_json, write_json
from slimkit.errors import ArtifactError, CheckpointError, InputError, PlanError
from slimkit.plan import PLAN_KINDS, Plan, applied_plans, load_weights


@dataclass(frozen=True)
class KeepRows(Plan):
    """Keeps the first rows of a linear layer; a plan small enough to read at a glance."""

    kind: ClassVar[str] = "keep_rows"
    rows: int
    scale: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> KeepRows:
        return cls(data["rows"], tensors.get("scale"))

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.scale is None else {"scale": self.scale}

    def explain(self) -> str:
        return f"keeps {self.rows} rows"

    def apply_to(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, nn.Linear) or model.out_features < self.rows:
            raise PlanError("this model has too few rows")
        model.weight = nn.Parameter(model.weight.detach()[: self.rows].clone())
        model.bias = nn.Parameter(model.bias.detach()[: self.rows].clone())
        model.out_features = self.rows
        return model


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with PLAN_KINDS.scratch():
        PLAN_KINDS.register("keep_rows")(KeepRows)
        yield


def test_apply_changes_in_place_returns_the_model_and_remembers_the_plan() -> None:
    model = nn.Linear(3, 8)
    first, second = KeepRows(6), KeepRows(4)
    assert sk.apply(model, first) is model
    sk.apply(model, second)
    assert model(torch.zeros(1, 3)).shape == (1, 4)
    assert applied_plans(model) == [first, second]
    assert applied_plans(nn.Linear(1, 1)) == []


def test_a_plan_that_does_not_fit_changes_and_records_nothing() -> None:
    model = nn.Linear(3, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match="too few rows"):
        sk.apply(model, KeepRows(9))
    assert applied_plans(model) == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="plan: expected a Plan, got 'half of it'"):
        sk.apply(model, "half of it")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [None, torch.tensor([0.5, 2.0])])
def test_a_plan_comes_back_from_its_file_with_its_tensors(
    tmp_path: Path, scale: Tensor | None
) -> None:
    path = KeepRows(5, scale).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.safetensors").exists() == (scale is not None)
    plan = sk.Plan.load(path)
    assert isinstance(plan, KeepRows)
    assert plan.rows == 5
    assert plan.scale is None if scale is None else torch.equal(plan.scale, scale)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "keep_row"}, PlanError, "did you mean 'keep_rows'"),
        ({"version": 2}, PlanError, "update slimkit"),
        ({"format": 99}, PlanError, "update slimkit"),
        ({"plan": {}}, ArtifactError, "keep_rows plan is damaged"),
        ({"plan": None}, ArtifactError, "keep_rows plan is damaged"),
        ({"has_tensors": True}, ArtifactError, r"plan\.safetensors"),
    ],
)
def test_a_wrong_plan_file_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = KeepRows(5).save(tmp_path / "plan.json")
    write_json(path, {**read_json(path), **change})
    with pytest.raises(error, match=message):
        sk.Plan.load(path)


def test_some_other_json_file_is_no_plan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", ["nothing"])
    with pytest.raises(ArtifactError, match="this is not a plan"):
        sk.Plan.load(tmp_path / "x.json")


def test_saved_weights_and_plans_rebuild_the_model_exactly(tmp_path: Path) -> None:
    model = nn.Linear(3, 8)
    sk.apply(sk.apply(model, KeepRows(6)), KeepRows(4))
    sk.save(model, tmp_path / "model")
    again = sk.load(tmp_path / "model", model=nn.Linear(3, 8))
    inputs = torch.randn(5, 3)
    assert torch.equal(again(inputs), model(inputs))
    assert applied_plans(again) == applied_plans(model)
    assert not [
        p for p in (tmp_path / "model").iterdir() if p.suffix not in {".json", ".safetensors"}
    ]


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    sk.save(sk.apply(nn.Linear(3, 8), KeepRows(4)), tmp_path / "model")
    plain = nn.Linear(3, 8)
    sk.save(plain, tmp_path / "model")
    again = sk.load(tmp_path / "model", model=nn.Linear(3, 8))
    assert torch.equal(again.weight, plain.weight)
    assert len(list((tmp_path / "model").iterdir())) == 2


def test_weights_of_another_network_are_refused_untouched(tmp_path: Path) -> None:
    sk.save(nn.Linear(3, 8), tmp_path / "model")
    other = nn.Linear(4, 8)
    before = other.weight.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"'weight': the model has \(8, 4\), the file \(8, 3\)"
    ):
        sk.load(tmp_path / "model", model=other)
    assert torch.equal(other.weight, before)
    with pytest.raises(CheckpointError, match=r"2 missing, first '0.weight' .*2 unexpected"):
        sk.load(tmp_path / "model", model=nn.Sequential(nn.Linear(3, 8)))


def test_a_missing_or_damaged_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        sk.load(tmp_path / "nowhere", model=nn.Linear(1, 1))


class Versioned(nn.Linear):
    """Loads differently by the version in the metadata, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest) -> None:  # type: ignore[no-untyped-def]
        if local_metadata.get("version") not in (1, 2):
            raise ValueError("version should be set to 1 or 2")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_the_versions_of_modules_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential(Versioned(3, 2))
    sk.save(model, tmp_path / "net")
    loaded = sk.load(tmp_path / "net", model=nn.Sequential(Versioned(3, 2)))
    assert torch.equal(loaded(torch.ones(1, 3)), model(torch.ones(1, 3)))
    assert read_json(tmp_path / "net" / "plans.json")["metadata"]["0"] == {"version": 2}


def test_folders_without_versions_still_load(tmp_path: Path) -> None:
    model = nn.Sequential(Versioned(3, 2))
    sk.save(model, tmp_path / "net")
    index = read_json(tmp_path / "net" / "plans.json")
    write_json(tmp_path / "net" / "plans.json", {k: index[k] for k in ("format", "model", "plans")})
    loaded = sk.load(tmp_path / "net", model=nn.Sequential(Versioned(3, 2)))
    assert torch.equal(loaded(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_a_module_that_refuses_its_weights_is_a_checkpoint_error() -> None:
    model = nn.Sequential(Versioned(3, 2))
    load_weights(model, dict(model.state_dict()))  # names and shapes are those of today
    old = model.state_dict()
    old._metadata = {"0": {"version": 0}}  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"refuses the weights.*version"):
        load_weights(model, old, where="file")


class Counts(nn.Module):
    def __init__(self, count: object) -> None:
        super().__init__()
        self.count = count

    def get_extra_state(self) -> object:
        return self.count

    def set_extra_state(self, state: object) -> None:
        self.count = state


def test_extra_state_is_kept_or_refused_by_name(tmp_path: Path) -> None:
    sk.save(nn.Sequential(Counts({"seen": [3, 4]})), tmp_path / "net")
    assert sk.load(tmp_path / "net", model=nn.Sequential(Counts(None)))[0].count == {"seen": [3, 4]}
    with pytest.raises(ArtifactError, match=r"0\._extra_state.*set"):
        sk.save(nn.Sequential(Counts({1, 2})), tmp_path / "net")
    assert sk.load(tmp_path / "net", model=nn.Sequential(Counts(None)))[0].count == {"seen": [3, 4]}
