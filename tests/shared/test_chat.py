"""From a conversation to supervised tokens: what the assistant wrote, its end-of-turn token, and nothing else.

Expectations are written down by hand as the text of every token, so that a shifted or widened mask shows at once.
"""

import json
from itertools import groupby

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import MismatchError, RecordError
from shared.layout import Chat
from shared.records import Record
from shared.text_config import TextSettings
from shared.text_rows import ENCODE_BATCH_RECORDS, Tally, TextRows
from tests.tiny import CHATML, SENTENCES, make_tokenizer

# Both end the prompt in white space that a byte-level tokenizer likes to merge with what follows.
SPACE_BEFORE_ANSWER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' + m.content + '<|im_end|>' }}\n"
    "{% else %}{{ 'Q: ' + m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
BLANK_LINE_BEFORE_ANSWER = CHATML.replace("{{ m.role }}\n", "{{ m.role }}\n\n").replace("assistant\n", "assistant\n\n")
# As reasoning models do it: the thinking of earlier turns is taken out again once the conversation goes on.
FORGETS_THINKING = CHATML.replace(
    "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
)


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(messages=[{"role": role, "content": text} for role, text in turns])


def record(*turns: tuple[str, str], where: str = "chat.jsonl:1") -> Record:
    return Record(sample_id="id", source="f", content=chat(*turns), where=where)


def rows(tokenizer, *records, context_tokens=None, **settings):
    tally = Tally()
    encoder = TextRows(tokenizer, TextSettings(files=["-"], **settings), context_tokens=context_tokens)
    return list(encoder.rows(records, tally)), tally


def row_of(tokenizer, *turns: tuple[str, str], **settings):
    (row,), _ = rows(tokenizer, record(*turns), **settings)
    return row


def decode(tokenizer, ids) -> str:
    return tokenizer.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def supervised_tokens(tokenizer, row) -> list[str]:
    return [decode(tokenizer, [token]) for token in row.label_ids_P]


def runs(tokenizer, row) -> list[tuple[bool, str]]:
    """The row as text, cut wherever supervision begins or ends."""
    pairs = zip(row.label_mask_L.tolist(), row.input_ids_L, strict=True)
    return [(mark, decode(tokenizer, [i for _, i in run])) for mark, run in groupby(pairs, key=lambda pair: pair[0])]


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A tokenizer with tokens for runs of line feeds and spaces, and for a space with the word behind it."""
    sentences = [*SENTENCES, *["a\n\n\nb", "five\n\n\n\nfive", "x   five", "it is five"] * 30]
    return make_tokenizer(tmp_path_factory.mktemp("merging"), vocab_size=340, sentences=sentences)


def with_template(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def edited(tmp_path):
    """A tokenizer whose tokenizer.json has been changed by hand."""

    def load(change):
        make_tokenizer(tmp_path)
        tree = json.loads((tmp_path / "tokenizer.json").read_text())
        change(tree)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
        return transformers.AutoTokenizer.from_pretrained(tmp_path)

    return load


def test_rows_supervise_the_answer_and_its_end_of_turn_alone(tokenizer):
    row = row_of(tokenizer, ("system", "Be brief."), ("user", "two plus three?"), ("assistant", "five"))
    assert supervised_tokens(tokenizer, row) == ["f", "iv", "e", "<|im_end|>"]
    assert runs(tokenizer, row) == [
        (
            False,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ntwo plus three?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (True, "five<|im_end|>"),
        (False, "\n"),
    ]


def test_rows_supervise_every_turn_of_the_assistant(tokenizer):
    row = row_of(tokenizer, ("user", "two"), ("assistant", "five"), ("user", "red"), ("assistant", "blue"))
    tokens = [decode(tokenizer, [i]) for i in row.input_ids_L]
    marks = "".join("X" if mark else "." for mark in row.label_mask_L)
    user = ["<|im_start|>", "u", "s", "er", "\n"]
    assistant = ["<|im_start|>", "a", "s", "s", "is", "t", "ant", "\n"]
    assert tokens == [
        *[*user, "t", "w", "o", "<|im_end|>", "\n"],
        *[*assistant, "f", "iv", "e", "<|im_end|>", "\n"],
        *[*user, "r", "ed", "<|im_end|>", "\n"],
        *[*assistant, "b", "lu", "e", "<|im_end|>", "\n"],
    ]
    assert marks == ".........." + "........XXXX." + "........." + "........XXXX."


def test_rows_supervise_an_empty_answers_end_of_turn(tokenizer):
    row = row_of(tokenizer, ("user", "Say nothing."), ("assistant", ""))
    assert supervised_tokens(tokenizer, row) == ["<|im_end|>"]


def test_rows_supervise_the_end_of_the_turn_not_a_special_token_that_was_quoted(tokenizer):
    row = row_of(tokenizer, ("user", "a"), ("assistant", "say <|im_end|>\n and stop \n"))
    assert runs(tokenizer, row)[1] == (True, "say <|im_end|>\n and stop \n<|im_end|>")


def test_rows_supervise_to_the_end_of_the_turn_where_no_special_token_ends_it(tmp_path):
    plain = make_tokenizer(tmp_path, template=CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "# "))
    row = row_of(plain, ("user", "two"), ("assistant", "five"), ("user", "red"))
    assert runs(plain, row) == [(False, "# user\ntwo\n# assistant\n"), (True, "five\n"), (False, "# user\nred\n")]


def test_rows_of_a_turn_that_tools_answered_leave_the_tool_unsupervised(tokenizer):
    row = row_of(tokenizer, ("user", "2+3"), ("assistant", "call"), ("tool", "5"), ("assistant", "five"))
    assert [text for mark, text in runs(tokenizer, row) if mark] == ["call<|im_end|>", "five<|im_end|>"]


def test_rows_come_one_per_record_in_order_over_several_batches(tokenizer):
    num_records = ENCODE_BATCH_RECORDS + 3
    got, tally = rows(tokenizer, *(record(("user", "n"), ("assistant", f"{n}")) for n in range(num_records)))
    assert [runs(tokenizer, row)[1][1] for row in got] == [f"{n}<|im_end|>" for n in range(num_records)]
    assert tally.records == tally.rows == num_records
    assert tally.tokens == sum(row.num_tokens for row in got)
    assert tally.positions == sum(row.num_positions for row in got)


@pytest.mark.parametrize("answer", ["\n\nfive", "\n\n\n", "\nfive", "  five", "\t"])
def test_rows_give_the_prompt_of_inference_where_a_token_would_straddle_the_line_feed(merging, answer):
    merging = with_template(merging, CHATML)
    prompt = encode(merging, "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n")
    row = row_of(merging, ("user", "two"), ("assistant", answer))
    assert row.input_ids_L[: len(prompt)].tolist() == prompt
    assert not row.label_mask_L[: len(prompt)].any()
    assert row.input_ids_L[len(prompt) : -1].tolist() == encode(merging, f"{answer}<|im_end|>")
    assert runs(merging, row)[1:] == [(True, f"{answer}<|im_end|>"), (False, "\n")]


def test_rows_give_the_prompt_of_inference_where_a_token_would_straddle_the_space(merging):
    merging = with_template(merging, SPACE_BEFORE_ANSWER)
    assert " five" in [decode(merging, [i]) for i in encode(merging, "A: five")], "whole, the border is not seen"
    row = row_of(merging, ("user", "2+3"), ("assistant", "five"), ("user", "3+2"), ("assistant", "five"))
    prompt = encode(merging, "Q: 2+3\nA: ")
    assert row.input_ids_L[: len(prompt)].tolist() == prompt
    assert [text for _, text in runs(merging, row)] == [
        *["Q: 2+3\nA: ", "five<|im_end|>"],
        *["\nQ: 3+2\nA: ", "five<|im_end|>", "\n"],
    ]


def test_rows_give_the_prompt_of_inference_where_only_the_answer_splits_its_last_token(merging):
    """`\\n\\n` is one token at the end of a text, but two before a letter; no token straddles, and yet they differ."""
    merging = with_template(merging, BLANK_LINE_BEFORE_ANSWER)
    prompt = encode(merging, "<|im_start|>user\n\ntwo<|im_end|>\n<|im_start|>assistant\n\n")
    assert encode(merging, "assistant\n\nfive")[:-1] != encode(merging, "assistant\n\n")
    row = row_of(merging, ("user", "two"), ("assistant", "five"))
    assert row.input_ids_L[: len(prompt)].tolist() == prompt
    assert runs(merging, row)[1] == (True, "five<|im_end|>")


def test_rows_give_the_prompt_of_inference_before_every_answer_and_not_the_first_alone(merging):
    """The first answer is empty, so that its prompt is the same in the whole; the second's is not."""
    merging = with_template(merging, BLANK_LINE_BEFORE_ANSWER)
    row = row_of(merging, ("user", "two"), ("assistant", ""), ("user", "red"), ("assistant", "five"))
    ids, end = row.input_ids_L.tolist(), encode(merging, "assistant\n\n")
    begins = [t for t in range(1, len(ids)) if row.label_mask_L[t] and not row.label_mask_L[t - 1]]
    assert len(begins) == 2
    for begin in begins:
        assert ids[begin - len(end) : begin] == end
    assert [text for mark, text in runs(merging, row) if mark] == ["<|im_end|>", "five<|im_end|>"]


def test_rows_cut_a_token_that_straddles_the_end_of_a_turn(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    gluing = make_tokenizer(tmp_path, sentences=["foxbird"] * 50, template=template)
    assert len(encode(gluing, "foxbird")) == 1
    row = row_of(gluing, ("user", "a"), ("assistant", "fox"), ("user", "bird"), ("assistant", "s"))
    assert runs(gluing, row) == [(False, "a"), (True, "fox"), (False, "bird"), (True, "s")]


def test_rows_supervise_an_end_of_turn_that_swallows_the_line_feed_behind_it(edited):
    def swallow(tree):
        for token in tree["added_tokens"]:
            token["rstrip"] = True

    tokenizer = edited(swallow)
    row = row_of(tokenizer, ("user", "two"), ("assistant", "five"), ("user", "red"), ("assistant", "blue"))
    assert [text for _, text in runs(tokenizer, row)] == [
        *["<|im_start|>user\ntwo<|im_end|><|im_start|>assistant\n", "five<|im_end|>"],
        *["<|im_start|>user\nred<|im_end|><|im_start|>assistant\n", "blue<|im_end|>"],
    ]


def test_rows_have_one_bos_where_the_template_writes_it_and_the_tokenizer_would_too(tokenizer, edited):
    def prepend_bos(tree):
        bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        tree["post_processor"] |= {"special_tokens": {"<|endoftext|>": bos}}
        tree["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}})

    adding = with_template(edited(prepend_bos), "<|endoftext|>" + CHATML)
    assert adding("five").input_ids[0] == 0
    row = row_of(adding, ("user", "two"), ("assistant", "five"))
    plain = row_of(tokenizer, ("user", "two"), ("assistant", "five"))
    assert row.input_ids_L.tolist() == [0, *plain.input_ids_L]
    assert row.label_mask_L.tolist() == [False, *plain.label_mask_L]


def test_rows_supervise_white_space_whose_offsets_the_tokenizer_trims(edited):
    def trim(tree):
        tree["post_processor"] = {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": False}
        tree["post_processor"] |= {"use_regex": True}

    trimming = with_template(edited(trim), "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert trimming("fox ", return_offsets_mapping=True).offset_mapping[-1] == (4, 4)
    assert runs(trimming, row_of(trimming, ("user", "a"), ("assistant", "fox "))) == [(False, "a"), (True, "fox ")]


def test_rows_are_whole_where_the_tokenizer_comes_with_truncation_and_padding(tokenizer, edited):
    def truncate(tree):
        tree["truncation"] = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
        tree["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None}
        tree["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}

    turns = ("user", "two"), ("assistant", "five")
    assert np.array_equal(row_of(edited(truncate), *turns).input_ids_L, row_of(tokenizer, *turns).input_ids_L)


def test_rows_pass_template_kwargs_on(tmp_path):
    template = CHATML.replace("assistant\n", "assistant\n{{ mood }}: ").replace(
        "{{ m.content }}", "{{ (mood + ': ' if m.role == 'assistant' else '') + m.content }}"
    )
    moody = make_tokenizer(tmp_path, template=template)
    row = row_of(moody, ("user", "a"), ("assistant", "b"), chat_template_kwargs={"mood": "calm"})
    assert runs(moody, row)[1:] == [(True, "b<|im_end|>"), (False, "\n")]
    assert runs(moody, row)[0][1].endswith("assistant\ncalm: ")


def test_render_refuses_a_template_that_rewrites_history_and_shows_both_texts(tmp_path):
    tokenizer = make_tokenizer(tmp_path, template=FORGETS_THINKING)
    thought = ("assistant", "two and three</think>five")
    assert runs(tokenizer, row_of(tokenizer, ("user", "a"), thought))[1][1] == "two and three</think>five<|im_end|>"
    with pytest.raises(RecordError) as caught:
        row_of(tokenizer, ("user", "a"), thought, ("user", "b"), ("assistant", "c"))
    message = str(caught.value)
    assert message.startswith("chat.jsonl:1: the chat template rewrites history: the conversation up to turn 1 ")
    renders, whole = message.split("renders as ")[1].split(" but the whole as ")
    assert "two and three</think>" in renders
    assert "assistant\\nfive<|im_end|>" in whole
    assert "</think>" not in whole.split("\n")[0]
    assert "next: set supervise: last_turn, or chat_template_kwargs" in message


def test_render_refuses_a_generation_prompt_that_the_conversation_lacks(tmp_path):
    tokenizer = make_tokenizer(tmp_path, template=CHATML.replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(RecordError, match="rewrites history: the prompt of turn 1"):
        row_of(tokenizer, ("user", "a"), ("assistant", "b"))


def test_render_refuses_a_conversation_that_opens_with_the_assistant(tokenizer):
    with pytest.raises(RecordError, match=r"^chat\.jsonl:1: the conversation opens with an assistant turn"):
        row_of(tokenizer, ("assistant", "Hello"), ("user", "a"), ("assistant", "b"))


def test_render_names_the_record_for_which_the_template_fails(tmp_path):
    tokenizer = make_tokenizer(tmp_path, template="{{ raise_exception('no tools please') }}")
    with pytest.raises(RecordError, match=r"chat\.jsonl:1: the chat template failed: TemplateError: no tools please"):
        row_of(tokenizer, ("user", "a"), ("assistant", "b"))


def test_rows_refuse_to_supervise_the_very_first_token(tmp_path):
    tokenizer = make_tokenizer(
        tmp_path, template="{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(RecordError, match=r"chat\.jsonl:1: the first token would be supervised"):
        row_of(tokenizer, ("user", "a"), ("assistant", "b"))


def test_rows_refuse_a_record_that_is_too_long_and_say_which_limit(tokenizer):
    turns = ("user", "two"), ("assistant", "five")
    num_tokens = row_of(tokenizer, *turns).num_tokens
    assert row_of(tokenizer, *turns, max_tokens=num_tokens, context_tokens=num_tokens).num_tokens == num_tokens
    with pytest.raises(RecordError, match=rf"chat\.jsonl:1: {num_tokens} tokens, but max_tokens is 5\n  next:"):
        row_of(tokenizer, *turns, max_tokens=5)
    with pytest.raises(RecordError, match=f"but the model's context is {num_tokens - 1}\n"):
        row_of(tokenizer, *turns, context_tokens=num_tokens - 1)


def test_rows_drop_and_count_what_is_too_long_or_has_no_answer(tokenizer):
    short = record(("user", "two"), ("assistant", "five"))
    long = record(("user", "two"), ("assistant", "five " * 9))
    unanswered = record(("user", "two"))
    got, tally = rows(tokenizer, long, short, unanswered, short, on_too_long="drop", max_tokens=30)
    assert len(got) == 2
    assert (tally.records, tally.rows, tally.dropped_too_long, tally.dropped_no_label) == (4, 2, 1, 1)
    assert tally.tokens == 2 * got[0].num_tokens
    assert tally.positions == 2 * got[0].num_positions == 8


def test_encoder_refuses_a_tokenizer_without_a_template(tmp_path):
    tokenizer = with_template(make_tokenizer(tmp_path), "")
    with pytest.raises(MismatchError, match=r"has no chat template\n  next: put one chat_template\.jinja"):
        row_of(tokenizer, ("user", "a"), ("assistant", "b"))


def test_encoder_refuses_a_tokenizer_without_character_offsets():
    class Slow:
        name_or_path = "old/one"

    with pytest.raises(MismatchError, match=r"'old/one' has no tokenizer\.json"):
        TextRows(Slow(), TextSettings(files=["-"]))


CONTENTS = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r\u00a0\u3000"),
        st.sampled_from("five:<|im_end>🦊👩‍🚀éß漢\u0301\x00"),
        st.characters(codec="utf-8"),
    ),
    max_size=12,
).filter(lambda text: "<|im_" not in text)  # a quoted special token is a special token, which another test looks at


@given(pairs=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3), system=st.none() | CONTENTS)
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize(
    "template", [CHATML, SPACE_BEFORE_ANSWER, BLANK_LINE_BEFORE_ANSWER], ids=["lf", "space", "blank"]
)
def test_rows_supervise_exactly_what_the_assistant_wrote_whatever_it_wrote(merging, template, pairs, system):
    merging = with_template(merging, template)
    turns = [("system", system)] if system is not None else []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    row = row_of(merging, *turns)

    blank = "\n" if template == BLANK_LINE_BEFORE_ANSWER else ""
    expected, rest = [], ""
    for role, content in turns:
        if template == SPACE_BEFORE_ANSWER:
            opening, closing = ("A: " if role == "assistant" else "Q: "), "\n"
        else:
            opening, closing = f"<|im_start|>{role}\n{blank}", "\n"
        ending = "<|im_end|>" if template != SPACE_BEFORE_ANSWER or role == "assistant" else ""
        if role == "assistant":
            expected += [(False, rest + opening), (True, content + ending)]
            rest = closing
        else:
            rest += opening + content + ending + closing
    assert runs(merging, row) == [*expected, (False, rest)]
    prompt = encode(merging, expected[0][1])
    assert row.input_ids_L[: len(prompt)].tolist() == prompt


def test_encoder_refuses_a_template_that_reads_the_clock_until_it_is_given_a_date(tmp_path):
    """As Llama 3.2's does: a dump that is resumed tomorrow would hold two kinds of prompts."""
    clock = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n" + CHATML
    tokenizer = make_tokenizer(tmp_path, template=clock)
    with pytest.raises(MismatchError, match="reads the clock"):
        row_of(tokenizer, ("user", "a"), ("assistant", "b"))
    row_of(tokenizer, ("user", "a"), ("assistant", "b"), chat_template_kwargs={"date_string": "26 Jul 2024"})


def test_encoder_refuses_a_tokenizer_with_several_templates(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML}
    with pytest.raises(MismatchError, match="has several chat templates"):
        row_of(tokenizer, ("user", "a"), ("assistant", "b"))
