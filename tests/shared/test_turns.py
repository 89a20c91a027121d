"""Turns as people store them become turns as templates take them, or are refused by name."""

import json
from typing import Any

import pytest

from shared.errors import RecordError
from shared.turns import ROLES, SHAREGPT_ROLES, canonical_turn, is_supervised

WHERE = "a.jsonl:7: messages[2]"
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": {"c": None}}}}


def turn(**keys: Any) -> dict[str, Any]:
    return canonical_turn(keys, WHERE)


def assistant(*calls: Any, **keys: Any) -> dict[str, Any]:
    return turn(role="assistant", tool_calls=list(calls), **{"content": "", **keys})


def sharegpt(speaker: Any, value: Any, **keys: Any) -> dict[str, Any]:
    return canonical_turn({"from": speaker, "value": value, **keys}, WHERE)


def refusal(given: Any) -> str:
    with pytest.raises(RecordError) as caught:
        canonical_turn(given, WHERE)
    assert type(caught.value) is RecordError
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    return message.removeprefix(f"{WHERE}: ")


@pytest.mark.parametrize("role", ROLES)
def test_canonical_turn_keeps_every_role_and_other_keys(role):
    keys = {"role": role, "content": "hé", "name": "Ann", "reasoning_content": "", "parts": [{"a": None}]}
    assert turn(**keys) == keys


def test_canonical_turn_does_not_change_what_it_was_given():
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}, "id": "x"}
    given = {"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": [call], "name": None}
    before = json.dumps(given)
    canonical_turn(given, WHERE)
    assert json.dumps(given) == before


def test_canonical_turn_loses_keys_that_are_null():
    keys = {"name": None, "tool_calls": None, "function_call": None, "weight": None, "tool_call_id": None}
    assert turn(role="user", content="a", **keys) == {"role": "user", "content": "a"}


def test_canonical_turn_of_sharegpt_loses_keys_that_are_null():
    assert sharegpt("human", "a", role=None, content=None) == {"role": "user", "content": "a"}


@pytest.mark.parametrize("given", ["hi", None, 5, ["user", "hi"]])
def test_canonical_turn_is_of_an_object(given):
    assert refusal(given) == f"expected an object with role and content, got {given!r}"


@pytest.mark.parametrize("role", ["bot", "User", "", None, 5, ["user"], {"a": 1}])
def test_canonical_turn_refuses_an_unknown_role(role):
    expected = f"role: expected one of system, developer, user, assistant, tool, got {role!r}"
    assert refusal({"role": role, "content": "a"}) == expected
    assert refusal({"content": "a"}) == expected.replace(repr(role), "None")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("content", [5, True, {"text": "a"}, ["a"], []])
def test_canonical_turn_refuses_a_content_that_is_no_string(role, content):
    message = refusal({"role": role, "content": content})
    assert message == f"field 'content': expected a string, got {type(content).__name__} {content!r}"


def test_canonical_turn_refuses_to_go_without_content():
    assert refusal({"role": "user"}) == "no field 'content'; there are 'role'"
    assert refusal({"role": "assistant", "content": None}) == "field 'content': expected a string, got NoneType None"
    assert "expected a string" in refusal({"role": "assistant", "content": None, "tool_calls": []})
    assert "expected a string" in refusal({"role": "assistant", "content": None, "tool_calls": None})


def test_canonical_turn_shortens_what_it_quotes():
    assert len(refusal({"role": "user", "content": ["x" * 10_000]})) < 200
    assert len(refusal("x" * 10_000)) < 200


def test_canonical_turn_takes_one_part_of_text_for_its_text():
    assert turn(role="user", content=[{"type": "text", "text": "hé"}]) == {"role": "user", "content": "hé"}


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        [{"type": "image_url", "image_url": {"url": "a.png"}}],
        [{"type": "text", "text": "a"}, {"type": "image"}],
        [{"type": "text"}],
        [{"type": "text", "text": None}],
        [{"text": "a"}],
        ["a"],
        [],
    ],
)
def test_canonical_turn_refuses_other_parts(parts):
    assert refusal({"role": "user", "content": parts}).startswith("field 'content': expected a string, got ")


def test_tool_calls_get_their_arguments_as_objects():
    text = json.dumps(ADD["function"]["arguments"])
    as_text = {"type": "function", "function": {"name": "add", "arguments": text}}
    assert assistant(ADD)["tool_calls"] == assistant(as_text)["tool_calls"] == [ADD]
    assert assistant(as_text, ADD, as_text)["tool_calls"] == [ADD] * 3


def test_tool_calls_of_unlike_shapes_become_alike():
    function = ADD["function"]
    assert assistant(function)["tool_calls"] == assistant({"function": function})["tool_calls"] == [ADD]
    with_id = {"id": "call_1", "type": "function", "function": function}
    assert assistant(with_id)["tool_calls"] == [with_id]
    assert assistant({"id": "call_1", **function})["tool_calls"] == [with_id]


@pytest.mark.parametrize(
    "function", [{"name": "now"}, {"name": "now", "arguments": {}}, {"name": "now", "arguments": "{}"}]
)
def test_tool_calls_may_have_no_arguments(function):
    [call] = assistant({"function": function})["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": {}}


def test_tool_calls_may_have_arguments_that_are_null():
    assert assistant({"function": {"name": "now", "arguments": None}})["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({"function": {"name": "f", "arguments": '{"a": '}}, "arguments: not JSON: "),
        ({"function": {"name": "f", "arguments": ""}}, "arguments: not JSON: "),
        ({"function": {"name": "f", "arguments": "[1]"}}, "arguments: expected a JSON object, got '[1]'"),
        ({"function": {"name": "f", "arguments": "null"}}, "arguments: expected a JSON object, got 'null'"),
        ({"function": {"name": "f", "arguments": "[" * 100_000}}, "arguments: not JSON: "),
        ({"function": {"name": "f", "arguments": "9" * 5000}}, "arguments: not JSON: "),
        ({"function": {"name": "f", "arguments": [1]}}, "arguments: expected an object, got [1]"),
        ({"function": {"arguments": {}}}, "expected an object with a function's name and arguments"),
        ({"function": {"name": 5}}, "expected an object with a function's name and arguments"),
        ({"function": "f"}, "expected an object with a function's name and arguments"),
        ({"function": None, "name": "f"}, "expected an object with a function's name and arguments"),
        ("f", "expected an object with a function's name and arguments, got 'f'"),
        (None, "expected an object with a function's name and arguments, got None"),
    ],
    ids=lambda value: str(value)[:40].replace(" ", "_"),
)
def test_tool_calls_that_name_no_call_are_refused(call, complaint):
    message = refusal({"role": "assistant", "content": None, "tool_calls": [ADD, call]})
    assert message.startswith(f"tool_calls[1]: {complaint}")


def test_tool_calls_with_half_a_surrogate_pair_are_refused():
    arguments = '{"a": "\\ud83e"}'
    assert "surrogate" in refusal(
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    )


@pytest.mark.parametrize("calls", ["f", {}, {"function": {"name": "f"}}, 0, False])
def test_tool_calls_that_are_no_list_are_refused(calls):
    message = refusal({"role": "assistant", "content": "a", "tool_calls": calls})
    assert message == f"tool_calls: expected a list, got {calls!r}"


def test_tool_calls_that_are_none_at_all_vanish():
    assert turn(role="assistant", content="a", tool_calls=[]) == {"role": "assistant", "content": "a"}


def test_content_may_be_null_or_absent_beside_tool_calls():
    expected = {"role": "assistant", "content": None, "tool_calls": [ADD]}
    assert (
        turn(role="assistant", content=None, tool_calls=[ADD]) == turn(role="assistant", tool_calls=[ADD]) == expected
    )
    assert assistant(ADD, content="Let me see.")["content"] == "Let me see."
    assert assistant(ADD, content="")["content"] == ""


def test_function_call_of_old_is_refused():
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    assert refusal(old) == "function_call: templates read tool_calls, the present form of it"


@pytest.mark.parametrize("speaker", [name for name in SHAREGPT_ROLES if name != "function_call"])
def test_canonical_turn_of_sharegpt_takes_its_speakers(speaker):
    assert sharegpt(speaker, "hé") == {"role": SHAREGPT_ROLES[speaker], "content": "hé"}


def test_canonical_turn_of_sharegpt_takes_calls_and_what_came_of_them():
    call = sharegpt("function_call", json.dumps(ADD["function"]))
    assert call == {"role": "assistant", "content": None, "tool_calls": [ADD]}
    as_text = {"name": "add", "arguments": json.dumps(ADD["function"]["arguments"])}
    assert sharegpt("function_call", json.dumps(as_text)) == call
    assert sharegpt("observation", "5") == {"role": "tool", "content": "5"}
    assert sharegpt("tool", "5") == {"role": "tool", "content": "5"}


@pytest.mark.parametrize("speaker", ["bard", "Human", "", None, 5, ["human"]])
def test_canonical_turn_of_sharegpt_refuses_an_unknown_speaker(speaker):
    expected = f"from: expected one of {', '.join(SHAREGPT_ROLES)}, got {speaker!r}"
    assert refusal({"from": speaker, "value": "a"}) == expected


@pytest.mark.parametrize("value", [None, 5, ["a"], {"text": "a"}])
def test_canonical_turn_of_sharegpt_refuses_a_value_that_is_no_string(value):
    message = f"field 'value': expected a string, got {type(value).__name__} {value!r}"
    assert refusal({"from": "gpt", "value": value}) == message
    assert refusal({"from": "gpt", "content": "a"}) == "field 'value': expected a string, got NoneType None"


@pytest.mark.parametrize("value", ["[]", '"add"', "5", "null"])
def test_canonical_turn_of_sharegpt_refuses_a_call_that_is_no_object(value):
    assert refusal({"from": "function_call", "value": value}).startswith(f"expected a JSON object, got {value!r}")


@pytest.mark.parametrize("value", ["add(2, 3)", "", "[" * 100_000])
def test_canonical_turn_of_sharegpt_refuses_a_call_that_is_no_json(value):
    assert refusal({"from": "function_call", "value": value}).startswith("not JSON: ")


def test_canonical_turn_of_sharegpt_refuses_a_call_without_a_name():
    assert "a function's name" in refusal({"from": "function_call", "value": "{}"})


def test_canonical_turn_with_role_and_from_is_not_sharegpts():
    keys = {"role": "user", "content": "a", "from": "gpt", "value": "b"}
    assert turn(**keys) == keys


@pytest.mark.parametrize(("weight", "supervised"), [(0, False), (1, True), (0.0, False), (1.0, True), (None, True)])
def test_weight_decides_whether_an_assistants_turn_is_supervised(weight, supervised):
    assert is_supervised(turn(role="assistant", content="a", weight=weight)) is supervised
    assert is_supervised(sharegpt("gpt", "a", weight=weight)) is supervised
    assert is_supervised(sharegpt("function_call", '{"name": "f"}', weight=weight)) is supervised


def test_weight_survives_for_the_digest():
    assert turn(role="assistant", content="a", weight=0)["weight"] == 0
    assert sharegpt("gpt", "a", weight=0) == {"role": "assistant", "content": "a", "weight": 0}


@pytest.mark.parametrize("weight", [2, -1, 0.5, "0", "1", [], float("nan")])
def test_weight_of_other_values_is_refused(weight):
    complaint = f"weight: expected 0, or 1 on a turn of the assistant, got {weight!r}"
    assert refusal({"role": "assistant", "content": "a", "weight": weight}) == complaint
    assert refusal({"from": "gpt", "value": "a", "weight": weight}) == complaint


@pytest.mark.parametrize("role", [role for role in ROLES if role != "assistant"])
def test_weight_of_other_turns_is_0_alone(role):
    assert not is_supervised(turn(role=role, content="a", weight=0))
    assert not is_supervised(turn(role=role, content="a"))
    complaint = "weight: expected 0, or 1 on a turn of the assistant, got 1"
    assert refusal({"role": role, "content": "a", "weight": 1}) == complaint
    assert refusal({"from": "human", "value": "a", "weight": 1}) == complaint


@pytest.mark.parametrize("role", [role for role in ROLES if role != "assistant"])
def test_tool_calls_of_others_do_not_make_up_for_a_content(role):
    refusal({"role": role, "content": None, "tool_calls": [ADD]})
