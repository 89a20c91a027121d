"""Text files to conversations: every record has a stable name, and every bad line is named by its place."""

import json
import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.errors import ConfigError, RecordError
from shared.layout import Chat
from shared.raw_records import BadRecord
from shared.records import CONTENT_ID_DIGITS, RecordReader
from shared.records import content_id as content_id_of
from shared.text_config import TextSettings


def chat(*contents: str, **fields) -> dict:
    """A record whose turns alternate between user and assistant."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)], **fields}


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines, name: str = "a.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return str(path)

    return write_lines


def content_id(messages) -> str:
    return content_id_of(Chat(messages=messages))


def read(*files: str, **settings):
    """All records; the first bad one is raised."""
    records = list(RecordReader(TextSettings(files=list(files), **settings)).records())
    for record in records:
        if isinstance(record, BadRecord):
            raise record.error
    return records


def ids(*files: str, **settings) -> list[str]:
    return [record.sample_id for record in read(*files, **settings)]


def refusal(*files: str, **settings) -> str:
    with pytest.raises(RecordError) as caught:
        read(*files, **settings)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_read_records_takes_messages_as_they_are(write):
    tool_turn = {"role": "tool", "content": "5", "tool_call_id": "x"}
    path = write({"messages": [{"role": "user", "content": "2+3?"}, tool_turn]}, chat("hé", "là 🦊"))
    first, second = read(path)
    assert first.content.messages == [{"role": "user", "content": "2+3?"}, tool_turn], (
        "other keys of a turn are for templates"
    )
    assert second.content.messages == [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "là 🦊"}]
    assert second.where == f"{path}:2"


def test_read_records_takes_messages_under_another_name(write):
    path = write({"conversation": chat("a", "b")["messages"]})
    assert read(path, messages_field="conversation")[0].content.messages == chat("a", "b")["messages"]


def test_read_records_takes_a_prompt_and_a_response_under_any_two_names(write):
    path = write({"question": "2+3?", "gold": "5", "difficulty": 1})
    assert read(path, prompt_field="question", response_field="gold")[0].content.messages == [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "5"},
    ]


def test_read_records_puts_the_system_turn_before_prompt_and_response(write):
    path = write({"q": "2+3?", "a": "5"})
    record = read(path, prompt_field="q", response_field="a", system="Be brief.")[0]
    assert record.content.messages[0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in record.content.messages] == ["system", "user", "assistant"]


def test_read_records_skips_blank_lines_and_a_byte_order_mark(write):
    path = write(b"\xef\xbb\xbf" + json.dumps(chat("a", "b")).encode(), b"", b"  \t", chat("c", "d"))
    assert [record.where for record in read(path)] == [f"{path}:1", f"{path}:4"]


def test_read_records_reads_the_files_in_the_order_given(write):
    files = write(chat("a", "1", id="x"), name="z.jsonl"), write(chat("b", "2", id="y"), name="b.jsonl")
    assert ids(*files) == ["x", "y"]
    assert ids(*reversed(files)) == ["y", "x"]


def test_sample_id_is_the_records_own_where_it_has_one(write):
    path = write(chat("a", "b", id="first"), chat("c", "d", id=7), chat("e", "f"), chat("g", "h", id=None))
    assert ids(path) == ["first", "7", content_id(chat("e", "f")["messages"]), content_id(chat("g", "h")["messages"])]
    assert ids(write(chat("a", "b", uid="u1", id="ignored")), id_field="uid") == ["u1"]


def test_sample_id_of_content_is_short_and_depends_on_every_word_and_role():
    first = content_id(chat("a", "b")["messages"])
    assert len(first) == CONTENT_ID_DIGITS
    assert first == content_id([dict(reversed(turn.items())) for turn in chat("a", "b")["messages"]])
    others = [chat("a", "c"), chat("a", "b", "c"), chat("ab", ""), {"messages": chat("a", "b")["messages"][::-1]}]
    assert len({first, *(content_id(other["messages"]) for other in others)}) == 5


def test_sample_id_of_content_survives_moving_splitting_and_reordering(write):
    records = [chat(f"question {i}", f"answer {i}") for i in range(7)]
    whole = set(ids(write(*records, name="whole.jsonl")))
    shuffled = random.Random(0).sample(records, len(records))
    parts = write(*shuffled[:3], name="p1.jsonl"), write(*shuffled[3:], name="p2.jsonl")
    assert len(whole) == 7
    assert set(ids(*parts)) == set(ids(*reversed(parts))) == whole
    Path(parts[0]).rename(moved := str(Path(parts[0]).with_name("moved.jsonl")))
    assert set(ids(moved, parts[1])) == whole


def test_sample_id_counts_the_repeats_of_one_content_over_all_files(write):
    twice = write(chat("a", "b"), chat("c", "d"), chat("a", "b"), name="one.jsonl"), write(chat("a", "b"))
    digest, other = content_id(chat("a", "b")["messages"]), content_id(chat("c", "d")["messages"])
    assert ids(*twice) == [digest, other, f"{digest}#2", f"{digest}#3"]


@pytest.mark.parametrize(("one", "two"), [("x", "x"), ("7", 7)])
def test_sample_id_given_twice_is_refused_with_both_places(write, one, two):
    files = write(chat("a", "b"), chat("a", "b", id=one)), write(chat("c", "d", id=two), name="b.jsonl")
    message = refusal(*files)
    assert message.startswith(f"{files[1]}:1: sample id {one!r} is already used at {files[0]}:2")
    assert "make the ids unique" in message


@pytest.mark.parametrize("suffix", ["", "#2"])
def test_sample_id_that_equals_a_digest_of_another_record_is_refused(write, suffix):
    own = chat("p", "q", id=content_id(chat("a", "b")["messages"]) + suffix)
    repeats = [chat("a", "b"), chat("a", "b")]
    assert "is already used at" in refusal(write(own, *repeats)), "own id first"
    assert "is already used at" in refusal(write(*repeats, own)), "own id last"


@pytest.mark.parametrize("own_id", [1.5, True, "", ["x"], {"a": 1}])
def test_sample_id_that_is_no_name_is_refused(write, own_id):
    path = write(chat("a", "b"), chat("a", "b", id=own_id))
    assert refusal(path) == f"{path}:2: field 'id': expected a string or an integer, got {own_id!r}"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"messages": [', "not JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud83e"}]}', "holds half a surrogate pair"),
        (
            b'{"messages": [{"role": "user", "content": ""}], "id": "\\udd8a"}',
            "holds half a surrogate pair",
        ),
        (["a"], "expected a JSON object, got list"),
        ({"text": "a", "n": 1}, "is text (text), but the first record of the file is chat (messages)"),
        ({"messages": []}, "field 'messages': expected a non-empty list, got []"),
        ({"messages": "hi"}, "field 'messages': expected a list of turns, got str 'hi'"),
        ({"messages": ["hi"]}, "messages[0]: expected an object with role and content, got 'hi'"),
        ({"messages": [*chat("a")["messages"], {"role": "bot", "content": ""}]}, "messages[1]: role: expected one of"),
        ({"messages": [{"role": ["user"], "content": ""}]}, "got ['user']"),
        ({"messages": [{"role": "user"}]}, "messages[0]: no field 'content'; there are 'role'"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0]: field 'content': expected a string, got None",
        ),
    ],
    ids=lambda value: value[:24].replace(" ", "_") if isinstance(value, str) else "",
)
def test_read_records_names_place_and_field_of_a_bad_line(write, line, complaint):
    path = write(chat("good", "line"), line)
    message = refusal(path)
    assert message.startswith(f"{path}:2: ")
    assert complaint in message


def test_read_records_takes_a_surrogate_pair_for_the_character_that_it_is(write):
    assert (
        read(write(b'{"messages": [{"role": "user", "content": "\\ud83e\\udd8a"}]}'))[0].content.messages[0]["content"]
        == "🦊"
    )


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"q": "a"}, "no field 'a'; there are 'q'"),
        ({"q": "a", "a": 5}, "field 'a': expected a string, got int 5"),
        ({"q": None, "a": "b"}, "field 'q': expected a string, got NoneType None"),
    ],
)
def test_read_records_names_the_field_that_prompt_and_response_lack(write, record, complaint):
    path = write(record)
    assert refusal(path, prompt_field="q", response_field="a").splitlines()[0] == f"{path}:1: {complaint}"


@pytest.mark.parametrize("lines", [(), (b"", b"  ")])
def test_read_records_refuses_a_file_without_records(write, lines):
    path = write(*lines)
    assert refusal(path).splitlines()[0] == f"{path}: holds no records"


def test_read_records_refuses_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist\n  next: check `files`"):
        read(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ConfigError, match="holds no text files"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"files": []}, "files names no file"),
        ({"response_field": "a"}, "go together"),
        ({"on_too_long": "cut"}, "'error', 'drop' or 'truncate'"),
        ({"form": "text", "prompt_field": "q", "response_field": "a"}, "form is text, but a field of prompt_response"),
        ({"chat_template_kwargs": {"tools": []}}, "cannot hold tools"),
        ({"reasoning_tags": ["", "x"]}, "cannot be empty"),
    ],
)
def test_text_settings_refuse_what_cannot_be_meant(settings, rule):
    with pytest.raises(ValidationError, match=rule):
        TextSettings(**{"files": ["a"], **settings})
