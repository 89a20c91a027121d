"""Who thinks: told by what stands in the last answer and its turn, however the tags are tokenized."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from shared.rows import Row
from student_train.manner import USUAL_TAGS, Thinking
from tests.chat_templates import THINK_TAGS, qwen
from tests.tiny import make_tokenizer

USER = (False, "<|im_start|>user\nHow many?<|im_end|>\n")
HEADER = (False, "<|im_start|>assistant\n")
END = (False, "\n")
Pieces = list[tuple[bool, str]]


@pytest.fixture(scope="module", params=["tokens of their own", "several tokens"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    added = THINK_TAGS if request.param == "tokens of their own" else ()
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), added=added).backend_tokenizer


def row_of(pieces: Pieces, tokenizer: Tokenizer) -> Row:
    """Pieces are tokenized one by one, as marked text is."""
    parts = [(marked, tokenizer.encode(text, add_special_tokens=False).ids) for marked, text in pieces]
    return Row(
        sample_id="row",
        input_ids_L=np.array([token for _, ids in parts for token in ids], np.int32),
        label_mask_L=np.array([marked for marked, ids in parts for _ in ids], np.bool_),
    )


CASES: dict[str, tuple[bool, Pieces]] = {
    "thoughts": (True, [USER, HEADER, (True, "<think>\nHm.\n</think>\n\nTwo.<|im_end|>"), END]),
    "no tags": (False, [USER, HEADER, (True, "Two.<|im_end|>"), END]),
    "empty tags": (False, [USER, HEADER, (True, "<think>\n\n</think>\n\nTwo.<|im_end|>"), END]),
    "empty tags of all kinds of space": (False, [USER, HEADER, (True, "<think> \t\u3000\n</think>Two.<|im_end|>")]),
    "empty tags in the prompt": (False, [USER, HEADER, (False, "<think>\n\n</think>\n\n"), (True, "Two.<|im_end|>")]),
    "empty tags on the border": (False, [USER, HEADER, (False, "<think>\n"), (True, "\n</think>\n\nTwo.<|im_end|>")]),
    "opened in the prompt": (True, [USER, HEADER, (False, "<think>\n"), (True, "Hm.</think>Two.<|im_end|>")]),
    "thoughts that are not learnt": (True, [USER, HEADER, (False, "<think>Hm.</think>\n"), (True, "Two.<|im_end|>")]),
    "cut within thoughts": (True, [USER, HEADER, (True, "<think>\nHm, so two and")]),
    "cut where they begin": (True, [USER, HEADER, (True, "<think>")]),
    "cut, and opened in the prompt": (True, [USER, HEADER, (False, "<think>\n"), (True, "Hm")]),
    "many words of space, then thoughts": (True, [HEADER, (True, "<think>" + " \n" * 40 + "Hm.</think>Two.")]),
    "thoughts of an accent that is many bytes": (True, [HEADER, (True, "<think>" + "\u0344" * 9 + "</think>Two.")]),
    "thoughts behind empty ones": (True, [HEADER, (True, "<think>\n</think>So:<think>Hm.</think>Two.")]),
    "tags that the user names": (
        False,
        [(False, "<|im_start|>user\nWhat does <think> do?<|im_end|>\n"), HEADER, (True, "It opens.<|im_end|>")],
    ),
    "thoughts of an earlier round": (
        False,
        [USER, HEADER, (True, "<think>Hm.</think>Two.<|im_end|>"), END, USER, HEADER, (True, "Three.<|im_end|>"), END],
    ),
    "an earlier round without": (
        True,
        [USER, HEADER, (True, "Two.<|im_end|>"), END, USER, HEADER, (True, "<think>Hm.</think>Three.<|im_end|>"), END],
    ),
    "nothing supervised": (False, [USER, HEADER]),
    "a closing tag alone": (False, [HEADER, (True, "The tag </think> closes.<|im_end|>")]),
}


@pytest.mark.parametrize("name", CASES)
def test_thinking_is_what_stands_between_the_tags_of_the_last_answer(name: str, tokenizer: Tokenizer):
    thinks, pieces = CASES[name]
    assert Thinking.of(tokenizer, USUAL_TAGS).thinks(row_of(pieces, tokenizer)) is thinks


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_knows_what_qwens_template_writes(marked: bool, thinking: bool, tokenizer: Tokenizer):
    look = Thinking.of(tokenizer, USUAL_TAGS)
    asked, fast, slow = ("user", "How many?"), ("assistant", "Two."), ("assistant", "<think>\nHm.\n</think>\n\nTwo.")
    for turns, thinks in (([asked, fast], False), ([asked, slow], True), ([asked, slow, asked, fast], False)):
        pieces = qwen(turns, thinking=thinking, marked=marked)
        assert look.thinks(row_of(pieces, tokenizer)) is thinks


def test_thinking_takes_tags_of_ones_own(tokenizer: Tokenizer):
    row = row_of([HEADER, (True, "[thought] Hm. [/thought] Two.")], tokenizer)
    assert Thinking.of(tokenizer, ("[thought]", "[/thought]")).thinks(row)
    assert not Thinking.of(tokenizer, USUAL_TAGS).thinks(row)


def test_thinking_takes_ids_beyond_the_tokenizers(tokenizer: Tokenizer):
    """A padded vocabulary has ids that no tokenizer knows."""
    row = row_of([HEADER, (True, "<think>Hm.</think>Two.")], tokenizer)
    ids = row.input_ids_L.copy()
    ids[1] = 100_000
    assert Thinking.of(tokenizer, USUAL_TAGS).thinks(
        Row(sample_id="padded", input_ids_L=ids, label_mask_L=row.label_mask_L)
    )


def test_thinking_decodes_little_of_what_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A million rows of thoughts are not decoded as a whole."""
    tokenizer = make_tokenizer(tmp_path, added=THINK_TAGS).backend_tokenizer
    decoded: list[int] = []
    decode = Thinking._text
    monkeypatch.setattr(Thinking, "_text", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    row = row_of([USER, HEADER, (True, "<think>" + "Two and three is five. " * 500 + "</think>Five.")], tokenizer)
    assert Thinking.of(tokenizer, USUAL_TAGS).thinks(row)
    assert row.num_tokens > 4000
    assert sum(decoded) <= 16
