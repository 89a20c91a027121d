"""Why a reply is not trained on."""

from typing import Any

import pytest

from student_train.eval.generation import Reply
from student_train.rollout.config import KeepSettings
from student_train.rollout.filters import repetition, why_dropped


def why(right: bool | None = None, keep: dict[str, Any] | None = None, **reply: Any) -> str | None:
    made = Reply(**{"ids": (5, 6, 7, 2), "text": "well", "is_cut": False, "nll": 1.5} | reply)
    return why_dropped(made, right, KeepSettings.model_validate(keep or {}), num_ids=300)


def test_a_usual_reply_is_kept_right_or_wrong():
    assert why() is why(right=True) is why(right=False) is None


@pytest.mark.parametrize(
    ("reply", "keep", "reason"),
    [
        ({"text": " \n"}, {}, "empty"),
        ({"text": "", "is_cut": True}, {"truncated": True}, "empty"),
        ({"ids": (5, 300)}, {}, "unknown_token"),
        ({"is_cut": True}, {}, "truncated"),
        ({"is_cut": True}, {"truncated": True}, None),
        ({}, {"nll": [None, 1.4]}, "nll_high"),
        ({}, {"nll": [1.6, None]}, "nll_low"),
        ({}, {"nll": [1.5, 1.6]}, None),
        ({"ids": (1, 2, 3, 4) * 3}, {"repetition": 0.5}, "repetition"),
        ({"ids": (1, 2, 3, 4) * 3}, {"repetition": 0.6}, None),
        ({"right": False}, {"wrong": False}, "wrong"),
        ({"right": True}, {"wrong": False}, None),
        ({"right": None}, {"wrong": False}, None),
        ({"right": False, "is_cut": True}, {"wrong": False}, "truncated"),
    ],
)
def test_the_first_reason_that_holds_is_told(reply: dict[str, Any], keep: dict[str, Any], reason: str | None):
    assert why(reply.pop("right", None), keep, **reply) == reason


def test_repetition_is_the_share_of_runs_that_stood_before():
    assert repetition((1, 2, 3)) == repetition(range(50)) == 0
    assert repetition((7,) * 13) == pytest.approx(9 / 10)
    assert repetition((1, 2, 3, 4) * 3) == pytest.approx(5 / 9)
