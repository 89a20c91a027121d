"""What a rollout's config refuses, before anything is loaded."""

from typing import Any

import pytest

from student_train.rollout.config import RolloutSettings

TEXT = {"text": {"files": ["chats.jsonl"]}}


def settings(**changes: Any) -> RolloutSettings:
    return RolloutSettings.model_validate({"student": {"model": "m"}, "data": TEXT, "output": "out"} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0, "samples": 2}, "samples would do nothing"),
        ({"temperature": 0, "top_p": 0.9}, "top_p would do nothing"),
        ({"temperature": 0.001}, "temperature is 0, or 0.01 at least"),
        ({"vllm": {"tensor_parallel": 2}}, "vllm is not for engine: transformers"),
        ({"engine": "vllm", "batch_rows": 7}, "batch_rows is not for engine: vllm"),
        ({"engine": "vllm", "vllm": {"engine_args": {"logprobs_mode": "raw_logits"}}}, "logprobs_mode is set by other"),
        ({"keep": {"wrong": False}}, "keep.wrong: false needs verify"),
        ({"keep": {"nll": [3, 1]}}, "expected a lower and a higher bound"),
        ({"verify": {}}, "give answer or function, one of the two"),
        ({"verify": {"answer": "(a)", "function": "a.py:f"}}, "give answer or function, one of the two"),
        ({"verify": {"answer": "a"}}, "needs exactly one group"),
        ({"verify": {"function": "a.py"}}, "expected path/to/file.py:name"),
        ({"verify": {"function": "a.py:not a name"}}, "expected path/to/file.py:name"),
        ({"data": {"text": {"files": ["a"], "on_too_long": "truncate"}}}, "rollout compares with whole references"),
        ({"data": {"text": {"files": ["a"], "supervise_reasoning": False}}}, "hand the reference's reasoning"),
        ({"data": TEXT | {"curriculum": {"deduplicate": True}}}, "a curriculum is for rows that are trained on"),
        ({"student": {"model": "m", "lora": {}}}, "Extra inputs"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_config_of_the_one_thing_that_must_be_said():
    plain = settings()
    assert (plain.samples, plain.temperature, plain.engine, plain.verify) == (1, 1.0, "transformers", None)
    assert not plain.keep.truncated
    assert settings(keep={"nll": [None, 2.5]}).keep.nll == (None, 2.5)
