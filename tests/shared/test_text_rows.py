"""Nothing is left out in silence: what is cut, dropped or skipped is counted.  Several processes give the same rows."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shared.errors import LogitferryError, MismatchError, RecordError
from shared.records import RecordReader
from shared.rows import Row
from shared.text_config import TextSettings
from shared.text_rows import LOGGED_BAD_RECORDS, Tally, TextRows
from tests.data import chat_records, write_jsonl


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(40)))


def rows_of(tokenizer, *files: str, context_tokens=None, **settings) -> tuple[list[Row], Tally]:
    text_settings = TextSettings(files=list(files), **settings)
    tally = Tally()
    with TextRows(tokenizer, text_settings, context_tokens=context_tokens) as text:
        return list(text.rows(RecordReader(text_settings).records(), tally)), tally


def same(rows: list[Row], others: list[Row]) -> bool:
    return len(rows) == len(others) and all(
        a.sample_id == b.sample_id
        and np.array_equal(a.input_ids_L, b.input_ids_L)
        and np.array_equal(a.label_mask_L, b.label_mask_L)
        for a, b in zip(rows, others, strict=True)
    )


def test_rows_are_counted(tokenizer, chats):
    rows, tally = rows_of(tokenizer, chats)
    assert tally.records == tally.rows == len(rows) == 40
    assert tally.tokens == sum(row.num_tokens for row in rows)
    assert tally.positions == sum(row.num_positions for row in rows)
    assert tally.summary().endswith(" supervised"), "nothing to complain of"


def test_truncate_cuts_long_rows_and_their_marks_and_counts_them(tokenizer, chats):
    whole, _ = rows_of(tokenizer, chats)
    limit = int(np.median([row.source_index_P[0] for row in whole])) + 1
    rows, tally = rows_of(tokenizer, chats, max_tokens=limit, on_too_long="truncate")
    by_id = {row.sample_id: row for row in rows}
    long = [row for row in whole if row.num_tokens > limit]
    unanswered = [row for row in long if not row.label_mask_L[:limit].any()]
    assert len(long) > len(unanswered) > 0, "some answers begin behind the cut"
    assert tally.truncated == len(long) - len(unanswered)
    assert tally.dropped_no_label == len(unanswered)
    assert tally.rows == len(rows) == len(whole) - len(unanswered)
    for row in whole:
        if row not in unanswered and row.sample_id in by_id:
            cut = by_id[row.sample_id]
            assert cut.input_ids_L.tolist() == row.input_ids_L[:limit].tolist()
            assert cut.label_mask_L.tolist() == row.label_mask_L[:limit].tolist()


def test_the_shorter_of_context_and_max_tokens_decides(tokenizer, chats):
    for limits in ({"max_tokens": 90, "context_tokens": 130}, {"max_tokens": 130, "context_tokens": 90}):
        rows, _ = rows_of(tokenizer, chats, on_too_long="truncate", **limits)
        assert max(row.num_tokens for row in rows) == 90
        rows, tally = rows_of(tokenizer, chats, on_too_long="drop", **limits)
        assert max(row.num_tokens for row in rows) <= 90
        assert tally.dropped_too_long == 40 - len(rows) > 0


@pytest.fixture
def spoilt(tmp_path) -> str:
    """Of eight lines every second one is bad, each in another way."""
    good = [json.dumps(record).encode() for record in chat_records(4)]
    bad = [
        b'{"messages": [',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        json.dumps({"messages": [{"role": "assistant", "content": "unprompted"}]}).encode(),
        good[0],  # its sample id comes twice
    ]
    path = tmp_path / "spoilt.jsonl"
    path.write_bytes(b"".join(line + b"\n" for pair in zip(good, bad, strict=True) for line in pair))
    return str(path)


def test_skip_counts_bad_records_and_keeps_all_others(tokenizer, spoilt, caplog):
    with caplog.at_level(logging.INFO, "logitferry"):
        rows, tally = rows_of(tokenizer, spoilt, on_bad_record="skip")
    assert [row.sample_id for row in rows] == [record["id"] for record in chat_records(4)]
    assert (tally.records, tally.rows, tally.skipped_bad) == (8, 4, 4)
    assert "skipped bad: 4" in tally.summary()
    skipped = [message for message in caplog.messages if message.startswith("skipped: ")]
    assert [message.split(": ")[1] for message in skipped] == [f"{spoilt}:{line}" for line in (2, 4, 6, 8)]


def test_a_bad_record_is_an_error_unless_skipped(tokenizer, spoilt):
    with pytest.raises(RecordError, match=rf"{spoilt}:2: not JSON"):
        rows_of(tokenizer, spoilt)


def test_skip_logs_the_first_few_and_then_says_so(tokenizer, tmp_path, caplog):
    lines = [{"messages": "no"}] * (LOGGED_BAD_RECORDS + 7) + chat_records(1)
    with caplog.at_level(logging.INFO, "logitferry"):
        _, tally = rows_of(tokenizer, str(write_jsonl(tmp_path / "a.jsonl", lines)), on_bad_record="skip", form="chat")
    assert tally.skipped_bad == LOGGED_BAD_RECORDS + 7
    assert sum(message.startswith("skipped: ") for message in caplog.messages) == LOGGED_BAD_RECORDS
    assert "further skipped records are counted only" in caplog.messages


def test_no_row_at_all_is_an_error_that_says_why(tokenizer, chats):
    _, tally = rows_of(tokenizer, chats, max_tokens=3, on_too_long="drop")
    with pytest.raises(RecordError, match=r"not one record gives a row: 40 records.*dropped too long: 40"):
        tally.require_rows()


def test_oddities_are_counted(tokenizer, chats, tmp_path):
    template = tmp_path / "odd.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content.split('five')[-1] if m.role == 'assistant' else m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.chat_template, before = None, tokenizer.chat_template
    try:
        rows, tally = rows_of(tokenizer, chats, chat_template=str(template), reasoning_tags=["five", "five"])
    finally:
        tokenizer.chat_template = before
    assert tally.unended == len(rows) == 40, "no control token ends the turns"
    assert 0 < tally.reworded < 40, "answers that speak of five birds are cut"


def test_processes_give_the_same_rows_in_the_same_order(tokenizer, tmp_path, spoilt):
    lots = str(write_jsonl(tmp_path / "lots.jsonl", [{**record, "id": None} for record in chat_records(1500)]))
    alone = rows_of(tokenizer, lots, spoilt, on_bad_record="skip")
    together = rows_of(tokenizer, lots, spoilt, on_bad_record="skip", processes=2)
    assert same(alone[0], together[0])
    assert alone[1] == together[1]


def test_errors_of_processes_reach_the_caller(tokenizer, tmp_path, chats):
    bad = str(write_jsonl(tmp_path / "bad.jsonl", [{"messages": [{"role": "assistant", "content": "unprompted"}]}]))
    with pytest.raises(RecordError, match="nothing prompts it"):
        rows_of(tokenizer, chats, bad, processes=2)
    tokenizer.chat_template, before = None, tokenizer.chat_template
    try:
        with pytest.raises(MismatchError, match="has no chat template\n  next: put one"):
            rows_of(tokenizer, chats, processes=2)
    finally:
        tokenizer.chat_template = before


def _workers_of(pid: int) -> list[int]:
    """Processes that tokenize, wherever they hang in the tree: they have the session of their ancestor."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError, IndexError):
            continue
        if session == pid and int(folder.name) != pid and state != "Z":
            found.append(int(folder.name))
    return found


ENDLESS = """
import sys
from itertools import repeat
import transformers
from shared.layout import Chat
from shared.records import Record
from shared.text_config import TextSettings
from shared.text_rows import Tally, TextRows

if __name__ == "__main__":
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 50}]
    record = Record(sample_id="x", source="f", content=Chat(messages=turns), where="f:1")
    with TextRows(tokenizer, TextSettings(files=["-"], processes=2)) as text:
        for number, row in enumerate(text.rows(repeat(record), Tally())):
            if number == 1000:
                print("running", flush=True)
"""


@pytest.fixture
def endless(tmp_path, teacher_folder):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, str(script), str(teacher_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n", process.stderr.read() if process.stderr else ""
    yield process
    for pid in [process.pid, *_workers_of(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(endless, number):
    assert len(_workers_of(endless.pid)) >= 2
    os.kill(endless.pid, number)
    endless.wait(timeout=30)
    deadline = time.monotonic() + 20
    while _workers_of(endless.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _workers_of(endless.pid)


def test_a_process_that_dies_is_an_error_and_not_a_hang(tokenizer, tmp_path):
    lots = str(write_jsonl(tmp_path / "lots.jsonl", [{**record, "id": None} for record in chat_records(3000)]))
    settings = TextSettings(files=[lots], processes=2)
    with TextRows(tokenizer, settings) as text:
        rows = text.rows(RecordReader(settings).records(), Tally())
        next(rows)
        workers = text._pool._executor._processes
        os.kill(next(iter(workers)), signal.SIGKILL)
        with pytest.raises(LogitferryError, match="a process that tokenizes died"):
            list(rows)


KILLED_READERS = """
import os
import signal
import sys
import time
from itertools import islice
import transformers
from shared.errors import LogitferryError
from shared.layout import Chat
from shared.records import Record
from shared.text_config import TextSettings
from shared.text_rows import ENCODE_BATCH_RECORDS, Tally, TextRows

if __name__ == "__main__":
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 50}]
    records = (
        Record(sample_id=f"{n:01000}", source="f", content=Chat(messages=turns), where="f:1") for n in range(10**6)
    )
    with TextRows(tokenizer, TextSettings(files=["-"], processes=2)) as text:
        rows = text.rows(records, Tally())
        next(rows)
        time.sleep(2)  # what is under way arrives
        workers = list(text._pool._executor._processes)
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        list(islice(rows, 2 * ENCODE_BATCH_RECORDS))
        time.sleep(1)  # a new batch, larger than what a pipe holds, is under way to them
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        try:
            list(rows)
        except LogitferryError as error:
            print(error)
"""


@pytest.mark.cluster
def test_processes_that_die_while_a_batch_is_on_its_way_to_them_are_no_hang(tmp_path, teacher_folder):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_READERS)
    done = subprocess.run(
        [sys.executable, str(script), str(teacher_folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "a process that tokenizes died" in done.stdout, done.stderr


def test_a_chat_template_file_takes_the_place_of_the_tokenizers(tokenizer, chats, tmp_path):
    before = tokenizer.chat_template
    template = tmp_path / "other.jinja"
    template.write_text(before.replace("<|im_start|>", "<|im_start|>the "))
    try:
        rows, _ = rows_of(tokenizer, chats, chat_template=str(template))
        assert tokenizer.chat_template == template.read_text(), "it is saved with the tokenizer, and its digest with it"
        assert tokenizer.decode(rows[0].input_ids_L[:6]).startswith("<|im_start|>the s")
    finally:
        tokenizer.chat_template = before
