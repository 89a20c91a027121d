"""Turns of a chat as people store them, to turns as Hugging Face's chat templates take them.

OpenAI's have `role` and `content`, ShareGPT's `from` and `value`.  Arguments of tool calls become objects: templates
print them as JSON themselves, and would quote a string once more.
"""

from typing import Any

from shared.errors import RecordError
from shared.json_text import parse_json, require_whole_characters

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def canonical_turn(turn: Any, where: str) -> dict[str, Any]:
    """One turn: a role, a content, and what else it has, for the template.

    Raises:
        RecordError: names place and key, expected and got.
    """
    if not isinstance(turn, dict):
        raise RecordError(f"{where}: expected an object with role and content, got {turn!r:.80}")
    if "from" in turn and turn.get("role") is None:
        return _from_sharegpt(turn, where)
    if turn.get("role") not in ROLES:
        raise RecordError(f"{where}: role: expected one of {', '.join(ROLES)}, got {turn.get('role')!r}")
    if turn.get("function_call"):
        raise RecordError(f"{where}: function_call: templates read tool_calls, the present form of it")
    clean = {key: value for key, value in turn.items() if value is not None}
    calls = clean.get("tool_calls")
    if calls and clean["role"] != "assistant":
        raise RecordError(f"{where}: tool_calls: only the assistant calls tools, got them on a turn of {clean['role']}")
    if calls is not None:
        if not isinstance(calls, list):
            raise RecordError(f"{where}: tool_calls: expected a list, got {calls!r:.80}")
        clean["tool_calls"] = [_tool_call(call, f"{where}: tool_calls[{index}]") for index, call in enumerate(calls)]
        if not calls:
            del clean["tool_calls"]
    clean["content"] = _content(turn, where, may_be_null=bool(calls))
    _require_weight(clean, where)
    return clean


def is_supervised(turn: dict[str, Any]) -> bool:
    """An assistant's turn, unless its `weight` is 0, as in OpenAI's fine-tuning files."""
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


def _from_sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise RecordError(f"{where}: from: expected one of {', '.join(SHAREGPT_ROLES)}, got {turn['from']!r:.80}")
    value = turn.get("value")
    if not isinstance(value, str):
        raise RecordError(f"{where}: field 'value': expected a string, got {type(value).__name__} {value!r:.80}")
    clean: dict[str, Any] = {"role": role, "content": value}
    if turn["from"] == "function_call":
        clean |= {"content": None, "tool_calls": [_tool_call(_json_object(value, where), where)]}
    if turn.get("weight") is not None:
        clean["weight"] = turn["weight"]
    _require_weight(clean, where)
    return clean


def _content(turn: dict[str, Any], where: str, *, may_be_null: bool) -> str | None:
    content = turn.get("content")
    if content is None and may_be_null:
        return None
    if "content" not in turn:
        raise RecordError(f"{where}: no field 'content'; there are {', '.join(map(repr, turn))}")
    # OpenAI's content parts.  How several would be joined is the template's secret, so only one is clear.
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text") if content[0].get("type") == "text" else content
    if not isinstance(content, str):
        raise RecordError(f"{where}: field 'content': expected a string, got {type(content).__name__} {content!r:.80}")
    return content


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(f"{where}: expected an object with a function's name and arguments, got {call!r:.80}")
    arguments = function.get("arguments")
    arguments = {} if arguments is None else arguments
    if isinstance(arguments, str):
        arguments = _json_object(arguments, f"{where}: arguments")
    if not isinstance(arguments, dict):
        raise RecordError(f"{where}: arguments: expected an object, got {arguments!r:.80}")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {"type": "function"} | rest | {"function": {"name": function["name"], "arguments": arguments}}


def _json_object(text: str, where: str) -> dict[str, Any]:
    value = parse_json(text, where)
    require_whole_characters(value, where)
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected a JSON object, got {text!r:.80}")
    return value


def _require_weight(turn: dict[str, Any], where: str) -> None:
    allowed = (0, 1) if turn["role"] == "assistant" else (0,)
    if "weight" in turn and turn["weight"] not in allowed:
        raise RecordError(f"{where}: weight: expected 0, or 1 on a turn of the assistant, got {turn['weight']!r}")
