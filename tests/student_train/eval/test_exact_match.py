"""What a row asks, and what comes of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from shared.errors import ConfigError
from shared.rows import Row, last_span
from shared.text_config import TextSettings
from shared.text_rows import Tally
from student_train.data_config import SourceSettings
from student_train.eval.config import GenerateSettings
from student_train.eval.exact_match import ExactMatch, draw, exact_match, questions_of
from student_train.sources import Source, TextSource, open_source
from tests.data import write_jsonl
from tests.student_train.eval.conftest import ANSWERS, chat

HASHES = r"####\s*(\S+)"


@pytest.fixture(scope="module")
def model(learnt_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(learnt_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(learnt_folder: Path) -> Any:
    """The model's own: beside a config transformers makes another one of the same file."""
    return transformers.AutoTokenizer.from_pretrained(learnt_folder)


def source_of(path: Path, tokenizer: Any, **changes: Any) -> Source:
    text = TextSettings(files=[str(path)], **changes)
    return open_source(SourceSettings(text=text), tokenizer, vocab_size=307, context_tokens=512)


def match(source: Source, model: Any, tokenizer: Any, **changes: Any) -> ExactMatch:
    settings = GenerateSettings.model_validate({"max_new_tokens": 20, "answer": HASHES, "batch_rows": 4, **changes})
    questions = questions_of(draw([source], settings.rows, 0), model, tokenizer, settings)
    return exact_match(questions, model, tokenizer, settings, context_tokens=512, compute_dtype=None)


@pytest.mark.parametrize(
    ("mask", "span"),
    [("0011", (2, 4)), ("0110", (1, 3)), ("01100110", (5, 7)), ("0101", (3, 4)), ("0000", (0, 0)), ("", (0, 0))],
)
def test_last_span_is_the_last_run_of_supervised_tokens(mask, span):
    assert last_span(np.array([mark == "1" for mark in mask], dtype=np.bool_)) == span


def test_questions_ask_for_the_last_answer_alone(tmp_path, model, tokenizer):
    records = [chat("c", "And now?", "Then it is 9. #### 9", "How many?", "It is 7. #### 7")]
    source = source_of(write_jsonl(tmp_path / "chats.jsonl", records), tokenizer)
    (row,) = source.read_block(0)
    questions = questions_of(draw([source], None, 0), model, tokenizer, GenerateSettings(answer=HASHES))
    (question,) = questions.asked
    rendered = tokenizer.apply_chat_template(records[0]["messages"][:3], tokenize=False, add_generation_prompt=True)
    assert question.prompt == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert question.prompt == row.input_ids_L[: len(question.prompt)].tolist()
    assert question.expected == "9"
    assert 2 in questions.stops.ids
    whole = questions_of(draw([source], None, 0), model, tokenizer, GenerateSettings())
    assert whole.asked[0].expected == "Then it is 9. #### 9"  # what ends the turn is no part of the text


def test_questions_find_out_what_ends_a_reference(tmp_path, learnt_folder, model, monkeypatch):
    """A template may end turns with another control token than the model's end of sequence."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(learnt_folder, eos_token="<|endoftext|>")
    for name in ("config", "generation_config"):
        monkeypatch.setattr(getattr(model, name), "eos_token_id", None)
    source = source_of(write_jsonl(tmp_path / "c.jsonl", [chat("c", "How many?", "It is 7")]), tokenizer)
    questions = questions_of(draw([source], None, 0), model, tokenizer, GenerateSettings())
    assert questions.stops.ids == {0, 2}
    assert questions.asked[0].expected == "It is 7"


def test_exact_match_counts_what_is_right_and_what_cannot_be_told(asked, model, tokenizer, caplog):
    found = match(source_of(asked, tokenizer), model, tokenizer)
    assert (found.rows, found.checkable, found.uncheckable, found.without_prompt) == (7, 6, 1, 0)
    assert (found.right, found.share) == (4, 4 / 6)
    assert found.standard_error == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    assert (found.cut, found.shortened) == (0, 0)
    wrong, right = found.examples[:2], found.examples[2:]
    assert [(each.sample_id, each.expected, each.got) for each in wrong] == [("sum-0", "17", "4"), ("sum-1", "6", "5")]
    assert [each.is_right for each in wrong + right] == [False, False, True, True, True, True]
    assert (right[0].sample_id, right[0].expected, right[0].got) == ("sum-2", "$5.00", "5")
    assert right[0].reply == "It is so. #### 5"
    assert right[0].prompt.endswith("How many is 1 and 4?<|im_end|>\n<|im_start|>assistant\n")
    assert "1 of 7 references have no answer by generate.answer, first no-answer: 'It is so.'" in caplog.text
    tokens = [len(tokenizer(each)["input_ids"]) + 1 for each in ANSWERS.values()]
    assert found.mean_reply_tokens == pytest.approx(sum(tokens) / 6)


def test_exact_match_without_a_pattern_compares_letters(asked, model, tokenizer):
    found = match(source_of(asked, tokenizer), model, tokenizer, answer=None, examples=1)
    assert (found.checkable, found.uncheckable, found.right) == (7, 0, 3)
    assert [each.is_right for each in found.examples] == [False, True]


def test_exact_match_counts_replies_that_are_cut(asked, model, tokenizer):
    found = match(source_of(asked, tokenizer), model, tokenizer, max_new_tokens=3)
    assert (found.cut, found.right, found.mean_reply_tokens) == (6, 0, 3.0)
    assert all(each.is_cut and each.got is None for each in found.examples)


def test_exact_match_counts_replies_that_the_context_shortens(asked, model, tokenizer):
    source, settings = source_of(asked, tokenizer), GenerateSettings(answer=HASHES, max_new_tokens=40)
    questions = questions_of(draw([source], None, 0), model, tokenizer, settings)
    longest = max(len(each.prompt) for each in questions.asked)
    limits: dict[str, Any] = {"context_tokens": longest + 39, "compute_dtype": None}
    found = exact_match(questions, model, tokenizer, settings, **limits)
    assert found.shortened == sum(len(each.prompt) == longest for each in questions.asked)
    assert found.right == 4


def test_exact_match_takes_the_same_whatever_the_batches(asked, model, tokenizer):
    one, many = (match(source_of(asked, tokenizer), model, tokenizer, batch_rows=rows) for rows in (1, 7))
    assert one.examples == many.examples


def test_exact_match_computes_in_the_dtype_of_products(asked, model, tokenizer, monkeypatch):
    seen, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **x: (seen.append(torch.is_autocast_enabled("cpu")), generate(**x))[1]
    )
    settings = GenerateSettings(answer=HASHES, max_new_tokens=20)
    questions = questions_of(draw([source_of(asked, tokenizer)], None, 0), model, tokenizer, settings)
    for dtype in (None, torch.bfloat16):
        exact_match(questions, model, tokenizer, settings, context_tokens=512, compute_dtype=dtype)
    assert seen == [False, True]


def test_questions_leave_out_what_has_no_prompt(tmp_path, model, tokenizer, caplog):
    def row(name: str, mask: list[bool]) -> Row:
        return Row(sample_id=name, input_ids_L=np.arange(9, 9 + len(mask), dtype=np.int32), label_mask_L=np.array(mask))

    rows = [row("text", [False, True, True]), row("asks", [False, False, True]), row("none", [False, False, False])]
    source = TextSource(files=["f"], blocks=[rows], tally=Tally())
    questions = questions_of(draw([source], None, 0), model, tokenizer, GenerateSettings())
    assert [each.sample_id for each in questions.asked] == ["asks"]
    assert (questions.num_rows, questions.num_without_prompt) == (3, 2)
    assert "2 of 3 rows have no prompt" in caplog.text
    texts = source_of(write_jsonl(tmp_path / "t.jsonl", [{"text": "a red fox"}]), tokenizer)
    with pytest.raises(ConfigError, match="not one of 1 rows has a prompt and a reference"):
        questions_of(draw([texts], None, 0), model, tokenizer, GenerateSettings())


def test_questions_refuse_a_pattern_that_finds_no_answer_at_all(asked, model, tokenizer):
    with pytest.raises(ConfigError, match=r"7 of 7 references have no answer by .*, first sum-0: '#### 17'"):
        match(source_of(asked, tokenizer), model, tokenizer, answer="boxed(.*)")


def test_draw_takes_the_same_rows_in_whatever_order(tmp_path, tokenizer):
    def ids(source: Source, num_rows: int, seed: int) -> list[str]:
        (selection,) = draw([source], num_rows, seed)
        return sorted(row.sample_id for rows in selection.in_order(2) for row in rows)

    records = [chat(f"c{n}", f"{n}?", f"{n}") for n in range(20)]
    forth = source_of(write_jsonl(tmp_path / "forth.jsonl", records), tokenizer)
    back = source_of(write_jsonl(tmp_path / "back.jsonl", records[::-1]), tokenizer)
    assert ids(forth, 7, 0) == ids(back, 7, 0)
    assert len(ids(forth, 7, 0)) == 7
    assert ids(forth, 7, 0) != ids(forth, 7, 1)
    assert set(ids(forth, 7, 0)) < set(ids(forth, 8, 0))
    assert len(ids(forth, 99, 0)) == 20
    both = draw([forth, back], 7, 0)  # which have all ids in common
    assert sum(selection.num_rows for selection in both) == 7
