"""What an eval config may say, and what it is told when it may not."""

from typing import Any

import pytest
import yaml

from shared.config import check_settings, settings_yaml
from shared.errors import ConfigError
from student_train.eval.config import EvalSettings


def settings(**changes: Any) -> EvalSettings:
    tree: dict[str, Any] = {"student": {"model": "m"}, "data": {"dataset": "d"}, "output": "o", **changes}
    return check_settings(EvalSettings, tree, [], name="eval.yaml")


def test_settings_go_through_yaml_and_back():
    given = settings(generate={"answer": r"#### (\S+)", "stop": ["\n"], "rows": 50}, lm_eval={"tasks": ["a"]})
    assert check_settings(EvalSettings, yaml.safe_load(settings_yaml(given)), [], name="") == given
    alone = settings(data=None, lm_eval={"tasks": ["a"]})
    assert not alone.measures
    assert check_settings(EvalSettings, alone.model_dump(mode="json"), [], name="") == alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generate": {"answer": "("}}, "generate.answer: no regular expression"),
        ({"generate": {"answer": "a"}}, "exactly one group, the answer, and has 0"),
        ({"generate": {"answer": "(a)(b)"}}, "exactly one group, the answer, and has 2"),
        ({"generate": {"answer": "(a{99999999999999999999})"}}, "generate.answer: no regular expression"),
        ({"generate": {"stop": [""]}}, "generate.stop.0"),
        ({"generate": {"max_tokens": 5}}, "did you mean max_new_tokens?"),
        ({"generate": {"rows": 0}}, "generate.rows"),
        ({"lm_eval": {"tasks": []}}, "lm_eval.tasks"),
        ({"lm_eval": {"tasks": ["a"], "limit": 0}}, "lm_eval.limit"),
        ({"data": None}, "nothing to do: name data, lm_eval or both"),
        ({"data": None, "generate": {}}, "generate needs data"),
        ({"measure": False}, "data are named for nothing"),
        ({"student": {"model": "m", "lora": {}}}, "student.lora is for training"),
        ({"student": {"model": "m", "compile": True}}, "student.compile is for training"),
        ({"data": {"dataset": "d", "on_too_long": "truncate"}, "generate": {}}, "whole references"),
        ({"data": {"text": {"files": ["f"], "on_too_long": "truncate"}}, "generate": {}}, "whole references"),
        ({"data": {"text": {"files": ["f"], "supervise_reasoning": False}}, "generate": {}}, "reference's reasoning"),
        ({"data": {"mix": [{"text": {"files": ["f"], "on_too_long": "truncate"}}]}, "generate": {}}, "whole refer"),
    ],
)
def test_settings_say_what_cannot_be(changes, said):
    with pytest.raises(ConfigError, match="1 setting cannot be used") as caught:
        settings(**changes)
    assert said in str(caught.value)
