"""What contradicts itself, or a loss that is not defined, is refused when the config is read."""

from typing import Any

import pytest
from pydantic import ValidationError

from student_train.config import LossSettings, TrainSettings
from student_train.objective import Objective


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"divergence": "reverse_kl", "tail": "renormalise"},
            "renormalise is for forward_kl alone; reverse_kl asks",
        ),
        ({"divergence": "jsd", "tail": "drop"}, "tail: drop is for forward_kl alone"),
        ({"divergence": "skew_kl", "tail": "renormalise"}, "for forward_kl alone"),
        ({"divergence": "jsd", "jsd_beta": 0.0}, "greater than 0"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "less than 1"),
        ({"divergence": "skew_kl", "skew_alpha": 1.0}, "less than 1"),
        ({"jsd_beta": 0.3}, "jsd_beta is for divergence: jsd, and would do nothing for forward_kl"),
        ({"divergence": "jsd", "skew_alpha": 0.3}, "skew_alpha is for divergence: skew_kl"),
        ({"divergence": "js"}, "forward_kl"),
        ({"tail": "none"}, "bucket"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"temperature": float("inf")}, "temperature is above 0"),
        ({"z_loss": -1e-4}, "greater than or equal to 0"),
        ({"kd_weight": 1.1}, "less than or equal to 1"),
        ({"kd_weight": 0.0, "agreement": 1.0}, "agreement asks the teacher"),
    ],
)
def test_what_is_not_defined_is_refused(loss: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        LossSettings.model_validate(loss)


@pytest.mark.parametrize(
    ("loss", "is_sampled", "expected"),
    [
        ({}, False, Objective(kd_weight=0.9)),
        ({}, True, Objective(kd_weight=0.9, tail="none")),
        ({"tail": "drop", "temperature": 2}, False, Objective(kd_weight=0.9, tail="drop", temperature=2.0)),
        ({"divergence": "jsd"}, False, Objective(kd_weight=0.9, divergence="jsd", jsd_beta=0.5)),
        (
            {"divergence": "skew_kl", "skew_alpha": 0.2, "z_loss": 1e-4},
            False,
            Objective(kd_weight=0.9, divergence="skew_kl", skew_alpha=0.2, z_loss=1e-4),
        ),
    ],
)
def test_what_is_left_away_is_what_fits_the_dataset(loss: dict[str, Any], is_sampled: bool, expected: Objective):
    assert LossSettings.model_validate(loss).objective(is_sampled=is_sampled) == expected


def test_an_objective_by_hand_is_held_to_the_same():
    for wrong in ({"divergence": "kl"}, {"tail": "lump"}, {"tail": "none", "temperature": 2.0}, {"jsd_beta": 1.0}):
        with pytest.raises(ValueError, match=r"one of|sampled ids|between 0 and 1"):
            Objective(kd_weight=0.5, **wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, "name a dataset, text or mix"),
        ({"data": {"text": {"files": ["f"]}}}, "kd_weight above 0 needs data.dataset"),
        ({"steps": None}, "give epochs or steps"),
        ({"epochs": 1}, "give epochs or steps"),
        ({"held_out": {"fraction": 0.1, "data": {"dataset": "d"}}}, "not both"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str):
    tree = {"student": {"model": "m"}, "data": {"dataset": "d"}, "output": "o", "steps": 1}
    with pytest.raises(ValueError, match=message):
        TrainSettings.model_validate({**tree, **changes})
