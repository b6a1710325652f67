from __future__ import annotations

import pytest
from pydantic import ValidationError

from slimkit.recipe.quantization_stages import PtqStage, QatStage


def test_learned_scales_start_from_the_mse_observer_unless_another_is_named() -> None:
    distilled = {"teacher": "train", "distill": [{"type": "kd"}]}
    assert QatStage.model_validate({"scales": "lsq", **distilled}).observer == "mse"
    assert QatStage.model_validate({"scales": "pact", "observer": "kl"}).observer == "kl"
    assert QatStage.model_validate(distilled).observer == "minmax"
    with pytest.raises(ValidationError, match="scales"):
        QatStage.model_validate({"scales": "lsqq"})


def test_methods_take_their_settings() -> None:
    stage = PtqStage.model_validate(
        {"methods": ["equalize", {"type": "smoothquant", "alpha": 0.75}]}
    )
    assert stage.model_dump(mode="json")["methods"] == [
        "equalize",
        {"type": "smoothquant", "alpha": 0.75},
    ]
    with pytest.raises(ValidationError):
        PtqStage.model_validate({"methods": [{"type": "equalize", "headroomm": 2.0}]})
