"""The form of a file is told by its first record that has one; what lacks its fields is bad, and the rest is read."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import ConfigError, RecordError
from shared.layout import Chat, PlainText, Tokens, column_names
from shared.raw_records import BadRecord
from shared.records import Record, RecordReader, content_id
from shared.text_config import TextSettings

QUESTION, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}
TURNS = [QUESTION, ANSWER]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOKENS = {"input_ids": [5, 6, 7], "label_mask": [0, 1, 1]}


@pytest.fixture
def write(tmp_path):
    def write_lines(*records: Any, name: str = "a.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write_lines


def read(*files: str, **settings: Any) -> list[Record | BadRecord]:
    return list(RecordReader(TextSettings(files=list(files), **settings)).records())


def contents(*files: str, **settings: Any) -> list[Any]:
    """What all records say; the first bad one is raised."""
    records = read(*files, **settings)
    for record in records:
        if isinstance(record, BadRecord):
            raise record.error
    return [record.content for record in records]


def refusal(*files: str, **settings: Any) -> str:
    """Why the first bad record is bad; some records may be good."""
    reader = RecordReader(TextSettings(files=list(files), **settings)).records()
    return str(next(record.error for record in reader if isinstance(record, BadRecord)))


def ids(*files: str, **settings: Any) -> list[str]:
    return [record.sample_id for record in read(*files, **settings)]


@pytest.mark.parametrize(
    ("record", "content"),
    [
        ({"messages": TURNS}, Chat(messages=TURNS)),
        ({"conversations": TURNS}, Chat(messages=TURNS)),
        (
            {"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}]},
            Chat(messages=TURNS),
        ),
        ({"prompt": "2+3?", "response": "5"}, Chat(messages=TURNS)),
        ({"prompt": "2+3?", "completion": "5"}, Chat(messages=TURNS)),
        ({"question": "2+3?", "answer": "5"}, Chat(messages=TURNS)),
        ({"question": "2+3?", "response": "5", "prompt": None}, Chat(messages=TURNS)),
        ({"text": "once upon a time"}, PlainText(text="once upon a time")),
        ({"text": "a", "prompt": "a prompt alone is no form", "input_ids": [1]}, PlainText(text="a")),
        ({"text": ""}, PlainText(text="")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_layout_is_told_from_the_fields(write, record, content):
    assert contents(write({"meta": 1, **record})) == [content]


def test_layout_of_ready_tokens_keeps_them_as_they_are(write):
    [first, second] = contents(write(TOKENS, {"input_ids": [0, 2**31 - 1], "label_mask": [False, True]}))
    assert isinstance(first, Tokens)
    assert (first.input_ids_L.tolist(), first.label_mask_L.tolist()) == ([5, 6, 7], [False, True, True])
    assert (str(first.input_ids_L.dtype), str(first.label_mask_L.dtype)) == ("int32", "bool")
    assert (second.input_ids_L.tolist(), second.label_mask_L.tolist()) == ([0, 2**31 - 1], [False, True])


def test_layout_of_a_file_is_logged(write, caplog):
    path = write({"question": "a", "answer": "b"}, {"question": "c", "answer": "d"})
    with caplog.at_level("INFO", logger="logitferry"):
        read(path)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: read as prompt_response (question, answer)"]


@pytest.mark.parametrize(
    ("record", "ways"),
    [
        ({"messages": TURNS, "text": "a"}, "chat (messages) and text (text)"),
        ({"messages": TURNS, "conversations": TURNS}, "chat (messages) and chat (conversations)"),
        ({"text": "a", **TOKENS}, "text (text) and tokens (input_ids, label_mask)"),
        (
            {"prompt": "a", "response": "b", "answer": "c"},
            "prompt_response (prompt, response) and prompt_response (prompt, answer)",
        ),
        ({"messages": TURNS, "prompt": "a", "completion": "b"}, "chat (messages) and prompt_response (prompt, compl"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_layout_that_could_be_several_is_refused_with_all_ways_named(write, record, ways):
    path = write(record)
    message = refusal(path)
    assert message.startswith(f"{path}:1: can be read in several ways: {ways}")
    assert "`form` decides between several" in message
    with pytest.raises(ConfigError, match="not one of its records is of a known form"):
        read(path)


def test_layout_is_the_one_that_form_names(write):
    path = write({"messages": TURNS, "text": "a", "prompt": "b", "response": "c", **TOKENS})
    assert contents(path, form="chat") == [Chat(messages=TURNS)]
    assert contents(path, form="text") == [PlainText(text="a")]
    assert contents(path, form="prompt_response")[0].messages[0]["content"] == "b"
    assert isinstance(contents(path, form="tokens")[0], Tokens)


def test_layout_that_form_names_may_still_lie_under_several_names(write):
    path = write({"messages": TURNS, "conversations": TURNS, "text": "a"})
    assert "chat (messages) and chat (conversations)" in refusal(path, form="chat")
    assert contents(path, form="chat", messages_field="conversations") == [Chat(messages=TURNS)]
    path = write({"conversations": TURNS, "text": "a"})
    assert contents(path, form="chat") == [Chat(messages=TURNS)]


def test_layout_is_the_one_whose_fields_are_named(write):
    path = write({"messages": TURNS, "text": "a", "body": "b", "q": "c", "a": "d", "prompt": "e", "response": "f"})
    assert contents(path, text_field="body") == [PlainText(text="b")]
    assert contents(path, text_field="text") == [PlainText(text="a")]
    assert contents(path, messages_field="messages") == [Chat(messages=TURNS)]
    assert contents(path, prompt_field="q", response_field="a")[0].messages[1]["content"] == "d"
    assert "chat (messages) and text (body)" in refusal(path, messages_field="messages", text_field="body")


def test_layout_of_two_named_forms_is_told_file_by_file(write):
    files = write({"body": "a"}, name="1.jsonl"), write({"chat": TURNS, "text": "x"}, name="2.jsonl")
    assert contents(*files, messages_field="chat", text_field="body") == [PlainText(text="a"), Chat(messages=TURNS)]


def test_layout_with_named_fields_says_which_one_a_record_lacks(write):
    path = write({"text": "a"})
    assert refusal(path, messages_field="chat").startswith(f"{path}:1: no field 'chat'; there are 'text'\n  next: name")


def test_layout_is_told_file_by_file(write):
    files = write({"messages": TURNS}, name="1.jsonl"), write({"text": "a"}, name="2.jsonl"), write(TOKENS)
    assert [type(content) for content in contents(*files)] == [Chat, PlainText, Tokens]


def test_layout_is_the_first_records_and_later_ones_of_another_are_bad(write):
    """Also one that has both: had the first one had a null in its chat, all would be read as text in silence."""
    path = write({"text": "a", "messages": None}, {"messages": TURNS}, {"text": "b", "messages": TURNS}, {"text": None})
    first, chat, both, null = read(path)
    assert first.content == PlainText(text="a")
    assert str(chat.error).startswith(f"{path}:2: is chat (messages), but the first record of the file is text (text)")
    assert str(both.error).startswith(f"{path}:3: can be read in several ways: chat (messages) and text (text)")
    assert str(null.error).startswith(f"{path}:4: a record of no known form; it has 'text'")


def test_layout_is_told_by_the_first_record_that_has_one(write):
    path = write({"meta": 1}, {}, ["a"], {"text": "a", "messages": TURNS}, {"text": "b"}, {"text": "c"})
    bad, good = read(path)[:4], read(path)[4:]
    assert [str(record.error).splitlines()[0] for record in bad] == [
        f"{path}:1: a record of no known form; it has 'meta'",
        f"{path}:2: a record of no known form; it has no field",
        f"{path}:3: expected a JSON object, got list",
        f"{path}:4: can be read in several ways: chat (messages) and text (text)",
    ]
    assert [record.content for record in good] == [PlainText(text="b"), PlainText(text="c")]


def test_layout_is_refused_where_no_record_of_a_file_has_one(write):
    files = write({"text": "a"}), write({"meta": 1}, {"messages": None}, name="b.jsonl")
    reader = RecordReader(TextSettings(files=list(files))).records()
    assert isinstance(next(reader), Record)
    assert isinstance(next(reader), BadRecord)
    assert isinstance(next(reader), BadRecord)
    with pytest.raises(ConfigError) as caught:
        next(reader)
    assert str(caught.value).startswith(f"{files[1]}: not one of its records is of a known form\n  next: name messages")


def test_layout_can_be_read_again(write):
    reader = RecordReader(TextSettings(files=[write({"text": "a"}, {"text": "a"})]))
    assert [record.sample_id for record in reader.records()] == [record.sample_id for record in reader.records()]


def test_layout_of_columns_is_told_from_those_that_are_not_null(tmp_path):
    table = pa.table({"messages": pa.nulls(2, pa.list_(pa.struct({"role": pa.string()}))), "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert contents(str(tmp_path / "a.parquet")) == [PlainText(text="a"), PlainText(text="b")]


def test_layout_of_chats_in_columns_is_that_of_chats_in_lines(write, tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    records = [
        {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [TOOL]},
        {"messages": [{**QUESTION, "name": "Ann"}, ANSWER], "tools": None},
    ]
    table = pa.table({name: [record[name] for record in records] for name in ("messages", "tools")})
    pq.write_table(table, tmp_path / "a.parquet")
    assert ids(str(tmp_path / "a.parquet")) == ids(write(*records))


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_layout_refuses_turns_stored_as_json(write, name):
    path = write({name: json.dumps(TURNS)})
    assert refusal(path).startswith(f"{path}:1: field {name!r}: expected a list of turns, got str")


def test_column_names_are_the_default_ones_and_those_named():
    default = column_names(TextSettings(files=["a"]))
    assert {"messages", "conversations", "prompt", "answer", "text", "input_ids", "system", "tools", "id"} <= default
    named = {"messages_field": "m", "prompt_field": "p", "response_field": "r", "text_field": "t", "id_field": "i"}
    assert column_names(TextSettings(files=["a"], **named)) == default | {"m", "p", "r", "t", "i"}


@pytest.mark.parametrize("record", [{"messages": TURNS}, {"prompt": "2+3?", "response": "5"}])
def test_system_turn_is_the_records_own_or_the_default(write, record):
    default = {"role": "system", "content": "Be brief."}
    own = {"role": "system", "content": "Be kind."}
    path = write(record, {**record, "system": "Be kind."}, {**record, "system": ""}, {**record, "system": None})
    assert [content.messages for content in contents(path, system="Be brief.")] == [
        [default, *TURNS],
        [own, *TURNS],
        [default, *TURNS],
        [default, *TURNS],
    ]
    assert [content.messages[0] for content in contents(path)] == [QUESTION, own, QUESTION, QUESTION]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_turn_of_a_chat_stays_and_is_refused_beside_a_field(write, role):
    turns = [{"role": role, "content": "Be kind."}, *TURNS]
    path = write({"messages": turns}, {"messages": turns, "system": "Be rude."}, {"messages": turns, "system": ""})
    first, both, last = read(path, system="Be brief.")
    assert first.content.messages == last.content.messages == turns
    assert str(both.error) == f"{path}:2: has a field 'system' and a system turn; which one is meant?"


def test_system_field_that_is_no_string_is_refused(write):
    assert "field 'system': expected a string, got int 5" in refusal(write({"messages": TURNS, "system": 5}))


@pytest.mark.parametrize("system", [0, [], {}, False])
def test_system_field_that_is_empty_but_no_string_is_refused(write, system):
    path = write({"messages": TURNS}, {"messages": TURNS, "system": system})
    assert isinstance(read(path)[1], BadRecord)


def test_system_default_is_for_chats_alone(write):
    files = write({"text": "a", "system": "Be kind."}), write(TOKENS, name="b.jsonl")
    text, tokens = contents(*files, system="Be brief.")
    assert text == PlainText(text="a")
    assert tokens.input_ids_L.tolist() == TOKENS["input_ids"]


@pytest.mark.parametrize("beside", [{"messages": TURNS}, {"prompt": "2+3?", "response": "5"}])
@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], [TOOL]),
        ([TOOL, TOOL], [TOOL, TOOL]),
        (json.dumps([TOOL]), [TOOL]),
        (None, None),
        ([], None),
        ("[]", None),
        ("", None),
        (" \n", None),
        ("null", None),
    ],
)
def test_tools_are_a_list_or_the_json_of_one(write, beside, tools, expected):
    assert contents(write({**beside, "tools": tools})) == [Chat(messages=TURNS, tools=expected)]


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        ("[{", "field 'tools': not JSON: "),
        ("[" * 100_000, "field 'tools': not JSON: "),
        (TOOL, "field 'tools': expected a list of objects, got {"),
        (json.dumps(TOOL), "field 'tools': expected a list of objects, got {"),
        (["add"], "field 'tools': expected a list of objects, got ['add']"),
        ([TOOL, None], "field 'tools': expected a list of objects"),
        ('"add"', "field 'tools': expected a list of objects, got 'add'"),
        (7, "field 'tools': expected a list of objects, got 7"),
    ],
    ids=lambda value: str(value)[:20].replace(" ", "_"),
)
def test_tools_that_are_no_list_of_objects_are_refused(write, tools, complaint):
    path = write({"messages": TURNS}, {"messages": TURNS, "tools": tools})
    assert refusal(path).startswith(f"{path}:2: {complaint}")


def test_tools_with_half_a_surrogate_pair_are_refused(write):
    path = write({"messages": TURNS}, {"messages": TURNS, "tools": '[{"name": "\\ud83e"}]'})
    assert isinstance(read(path)[1], BadRecord)


def test_layout_of_any_nesting_is_read_or_bad(write, tmp_path):
    for depth in range(850, 1000):
        nested = "[" * depth + "]" * depth
        line = f'{{"messages": [{{"role": "user", "content": "\\u0061", "extra": {nested}}}]}}\n'
        (tmp_path / "deep.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n" + line)
        read(str(tmp_path / "deep.jsonl"))


@pytest.mark.parametrize(
    ("ids", "marks", "complaint"),
    [
        ([1, 2, 3], [0, 1], "3 input_ids and 2 marks of label_mask"),
        ([1], [0, 1], "1 input_ids and 2 marks of label_mask"),
        ([], [], "0 input_ids and 0 marks of label_mask"),
        ([1, -2], [0, 1], "field 'input_ids': expected token ids, got [1, -2]"),
        ([1, 2**31], [0, 1], "field 'input_ids': expected token ids, got [1, 2147483648]"),
        ([1, True], [0, 1], "field 'input_ids': expected token ids, got [1, True]"),
        ([1, 2.0], [0, 1], "field 'input_ids': expected token ids, got [1, 2.0]"),
        ([1, "2"], [0, 1], "field 'input_ids': expected token ids"),
        ([[1, 2]], [0], "field 'input_ids': expected token ids"),
        ([1, 2], [0, 2], "field 'label_mask': expected true and false, got [0, 2]"),
        ([1, 2], [0, -100], "field 'label_mask': expected true and false, got [0, -100]"),
        ([1, 2], [0, 0.5], "field 'label_mask': expected true and false, got [0, 0.5]"),
        ([1, 2], [0, None], "field 'label_mask': expected true and false, got [0, None]"),
        ([1, 2], [0, "1"], "field 'label_mask': expected true and false"),
        ([1, 2], [0, [1]], "field 'label_mask': expected true and false"),
        ([1, 2], [1, 1], "field 'label_mask': the first token is supervised, but nothing precedes it"),
        ([1], [True], "field 'label_mask': the first token is supervised"),
        ("12", [0, 1], "field 'input_ids': expected a list, got str '12'"),
        ([1, 2], "01", "field 'label_mask': expected a list, got str '01'"),
    ],
)
def test_tokens_that_cannot_be_a_row_are_refused(write, ids, marks, complaint):
    path = write(TOKENS, {"input_ids": ids, "label_mask": marks})
    assert refusal(path).startswith(f"{path}:2: {complaint}")


def test_tokens_without_a_mask_are_of_no_form(write):
    assert "a record of no known form; it has 'input_ids'" in refusal(write({"input_ids": [1, 2]}, TOKENS))
    message = refusal(write({"input_ids": [1, 2]}), form="tokens")
    assert "no field 'label_mask'; there are 'input_ids'" in message


def test_tokens_in_columns_are_those_in_lines(write, tmp_path):
    pq.write_table(
        pa.table({"input_ids": pa.array([[5, 6, 7]], pa.large_list(pa.uint16())), "label_mask": [[False, True, True]]}),
        tmp_path / "a.parquet",
    )
    assert ids(str(tmp_path / "a.parquet")) == ids(write(TOKENS))


def test_sample_id_is_under_one_of_two_names_or_the_one_named(write):
    records = [{"id": "a", "sample_id": "x"}, {"sample_id": "b"}, {"id": None, "sample_id": 3}]
    path = write(*({"text": "t", "uid": f"u{n}", **record} for n, record in enumerate(records)))
    assert ids(path) == ["a", "b", "3"]
    assert ids(path, id_field="uid") == ["u0", "u1", "u2"]
    assert ids(path, id_field="sample_id")[:2] == ["x", "b"]
    assert refusal(path, id_field="gone") == f"{path}:1: no field 'gone' for the sample id"


def test_sample_id_named_is_refused_where_it_is_no_name(write):
    path = write({"text": "t", "uid": 1.5, "id": "fine"})
    assert refusal(path, id_field="uid") == f"{path}:1: field 'uid': expected a string or an integer, got 1.5"
    assert ids(path) == ["fine"]


def test_sample_id_of_content_depends_on_form_tools_and_mask(write):
    records = [
        {"messages": TURNS},
        {"messages": TURNS, "tools": [TOOL]},
        {"messages": TURNS, "tools": [TOOL, TOOL]},
        {"messages": [{**QUESTION, "weight": 0}, ANSWER]},
        {"messages": TURNS, "system": "Be kind."},
    ]
    texts = [{"text": "2+3?"}, {"text": json.dumps(TURNS)}, {"text": json.dumps(TURNS, separators=(",", ":"))}]
    tokens = [TOKENS, {**TOKENS, "label_mask": [0, 0, 1]}, {**TOKENS, "input_ids": [5, 6, 8]}]
    files = [write(*group, name=f"{n}.jsonl") for n, group in enumerate((records, texts, tokens))]
    found = ids(*files)
    assert len(set(found)) == len(records) + len(texts) + len(tokens)
    assert not any("#" in sample_id for sample_id in found)


def test_sample_id_of_content_is_the_same_however_a_chat_is_stored(write):
    sharegpt = [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}]
    records = [{"messages": TURNS}, {"messages": TURNS, "tools": []}, {"messages": TURNS, "tools": "[]", "meta": 1}]
    files = [write(record, name=f"{n}.jsonl") for n, record in enumerate(records)]
    files += [
        write({"conversations": sharegpt}, name="s.jsonl"),
        write({"question": "2+3?", "answer": "5"}, name="q.jsonl"),
        write({"messages": [QUESTION, {**ANSWER, "tool_calls": None, "name": None}]}, name="n.jsonl"),
    ]
    assert {sample_id.split("#")[0] for sample_id in ids(*files)} == {content_id(Chat(messages=TURNS))}


def test_refusals_of_the_layout_are_of_the_record(write):
    [bad, _] = read(write({"meta": 1}, {"text": "a"}))
    assert type(bad.error) is RecordError
