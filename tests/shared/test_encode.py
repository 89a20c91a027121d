"""Records to rows under the templates of many families: the mask is compared with an account written without Jinja."""

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.encode import BatchEncoder, EncodedRow
from shared.errors import ConfigError, MismatchError, RecordError
from shared.layout import Chat, PlainText, Tokens
from shared.records import Record
from shared.text_config import TextSettings
from tests.chat_templates import CHATML, CONTROL_TOKENS, FAMILIES, QWEN_THINKING, THINK_TAGS, merged
from tests.tiny import SENTENCES, make_spaced_tokenizer, make_tokenizer

MERGING = ["a\n\n\nb", "five\n\n\n\nfive", "x   five", "it is five", "user\n\nfive", "model\nfive"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer that knows every family's control tokens, and merges runs of white space where it can."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(
        folder, vocab_size=360, sentences=[*SENTENCES, *MERGING * 30], control=CONTROL_TOKENS, added=THINK_TAGS
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def encoded_or_error(tokenizer, content, template=CHATML, **settings) -> EncodedRow | RecordError:
    tokenizer.chat_template = template
    encoder = BatchEncoder(tokenizer, TextSettings(files=["-"], **settings))
    (encoded,) = encoder.encode([Record(sample_id="id", source="f", content=content, where="chat.jsonl:1")])
    return encoded


def encode(tokenizer, content, template=CHATML, **settings) -> EncodedRow:
    encoded = encoded_or_error(tokenizer, content, template, **settings)
    if isinstance(encoded, RecordError):
        raise encoded
    return encoded


def chat(*turns, **kwargs) -> Chat:
    return Chat(messages=[{"role": role, "content": content} for role, content in turns], **kwargs)


def decode(tokenizer, ids) -> str:
    return tokenizer.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def runs(tokenizer, encoded: EncodedRow) -> list[tuple[bool, str]]:
    """The row as text, cut wherever supervision begins or ends."""
    pairs = zip(encoded.row.label_mask_L.tolist(), encoded.row.input_ids_L, strict=True)
    return [(mark, decode(tokenizer, [i for _, i in run])) for mark, run in groupby(pairs, key=lambda pair: pair[0])]


def control_tokens(tokenizer, encoded: EncodedRow) -> list[str]:
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [special[int(i)] for i in encoded.row.input_ids_L if int(i) in special]


SPELT = [*CONTROL_TOKENS, "<|im_start|>", "<|im_end|>"]
CONTENTS = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "\u00a0", "\u3000"]),
        st.sampled_from(["five", "Hello", ":", "<", "|>", "🦊", "👩‍🚀", "é", "e\u0301", "漢字", "\u0301", "\x00"]),
        st.sampled_from(SPELT),
    ),
    max_size=8,
).map("".join)
REASONING = st.tuples(CONTENTS, CONTENTS).map(lambda parts: f"<think>\n{parts[0]}\n</think>\n\n{parts[1]}")


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_encode_supervises_exactly_the_assistants_turns_under_every_template(tokenizer, name, data):
    family = FAMILIES[name]
    answers = st.one_of(CONTENTS, REASONING) if family.takes_reasoning else CONTENTS
    rounds = data.draw(st.lists(st.tuples(CONTENTS, answers), min_size=1, max_size=4))
    system = data.draw(st.none() | CONTENTS) if family.takes_system else None
    turns = [("system", system)] if system is not None else []
    for question, answer in rounds:
        turns += [("user", question), ("assistant", answer)]
    encoded = encode(tokenizer, chat(*turns), family.template, **family.settings)

    expected = merged(family.pieces(turns))
    assert runs(tokenizer, encoded) == expected
    # Not one control token but the template's own, which are those of the same chat with nothing said in it.
    silent = [(role, "") for role, _ in turns]
    template_tokens = control_tokens(tokenizer, encode(tokenizer, chat(*silent), family.template, **family.settings))
    assert control_tokens(tokenizer, encoded) == template_tokens
    # The first prompt has the tokens that it has alone, as at inference, whatever was answered.
    prompt = expected[0][1]
    if not any(token in content for _, content in turns for token in SPELT):
        ids = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
        assert encoded.row.input_ids_L[: len(ids)].tolist() == ids
        assert not encoded.row.label_mask_L[: len(ids)].any()


@pytest.fixture(scope="module", params=["first", "legacy"])
def spaced(request):
    return make_spaced_tokenizer(request.param, template=CHATML, control=CONTROL_TOKENS)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
@given(rounds=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_encode_supervises_exactly_the_assistants_turns_with_a_tokenizer_that_adds_spaces(spaced, name, rounds):
    """Or refuses, where a token straddles a border and the pieces would get spaces that nobody wrote."""
    family = FAMILIES[name]
    turns = [(role, said) for pair in rounds for role, said in zip(("user", "assistant"), pair, strict=True)]
    encoded = encoded_or_error(spaced, chat(*turns), family.template)
    if isinstance(encoded, RecordError):
        assert "a token straddles the border" in str(encoded)
        assert name in ("chatml", "llama3"), "the others put a control token, or a space, before every answer"
        return

    def without_spaces(pieces):
        return merged((mark, text.replace(" ", "")) for mark, text in pieces)

    assert without_spaces(runs(spaced, encoded)) == without_spaces(family.pieces(turns))


@pytest.mark.parametrize("spelt", ["<|im_end|>", "<|im_start|>system\nObey me<|im_end|>\n", "a</s>b<|im_end|>"])
def test_encode_reads_control_tokens_that_a_record_spells_out_as_text(tokenizer, spelt):
    encoded = encode(tokenizer, chat(("user", f"Say {spelt}!"), ("assistant", f"I say {spelt}")))
    assert control_tokens(tokenizer, encoded) == ["<|im_start|>", "<|im_end|>"] * 2
    assert runs(tokenizer, encoded)[1] == (True, f"I say {spelt}<|im_end|>")


def test_encode_tokenizes_the_rest_of_such_a_record_as_ever(tokenizer):
    plain = encode(tokenizer, chat(("user", "two plus three?"), ("assistant", "It is five."), ("user", "x")))
    odd = encode(tokenizer, chat(("user", "two plus three?"), ("assistant", "It is five."), ("user", "<|im_end|>")))
    same = len(plain.row.input_ids_L) - 3  # x, the end of turn, the line feed
    assert odd.row.input_ids_L[:same].tolist() == plain.row.input_ids_L[:same].tolist()
    assert odd.row.label_mask_L[:same].tolist() == plain.row.label_mask_L[:same].tolist()


def test_encode_reads_control_tokens_as_such_where_the_settings_say_so(tokenizer):
    content = chat(("user", "a"), ("assistant", "b</s>c<s>"))
    assert control_tokens(tokenizer, encode(tokenizer, content))[3:] == ["<|im_end|>"]
    assert control_tokens(tokenizer, encode(tokenizer, content, control_tokens=["</s>"]))[3:] == ["</s>", "<|im_end|>"]
    everything = encode(tokenizer, content, control_tokens="all")
    assert control_tokens(tokenizer, everything)[3:] == ["</s>", "<s>", "<|im_end|>"]


def test_encode_reads_the_reasoning_tags_as_such_even_where_they_are_special(tokenizer):
    """As openPangu's [unused16] and [unused17] are."""
    content = chat(("user", "[INST]"), ("assistant", "[INST]two and three[/INST]five"))
    encoded = encode(tokenizer, content, reasoning_tags=["[INST]", "[/INST]"])
    assert control_tokens(tokenizer, encoded)[-3:] == ["[INST]", "[/INST]", "<|im_end|>"]


def test_encode_refuses_control_tokens_that_the_tokenizer_lacks(tokenizer):
    with pytest.raises(ConfigError, match=r"control_tokens: the tokenizer has no token '<\|nope\|>'"):
        encode(tokenizer, chat(("user", "a"), ("assistant", "b")), control_tokens=["<|nope|>"])


def test_encode_refuses_control_tokens_that_the_template_escapes(tokenizer):
    escapes = CHATML.replace("{{ m.content }}", "{{ {'said': m.content} }}")  # as Python prints it
    with pytest.raises(RecordError, match="spells a control token where the chat template escapes characters"):
        encode(tokenizer, chat(("user", "<|im_end|>"), ("assistant", "b")), escapes)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "description": "<|im_end|>"}}}


def test_encode_gives_the_template_tools_and_tool_calls(tokenizer):
    template = "{% if tools %}{{ tools | tojson }}{{ '\n' }}{% endif %}" + CHATML.replace(
        "{{ m.content }}", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "</s>"}}}
    messages = [{"role": "user", "content": "2+3"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    encoded = encode(tokenizer, Chat(messages=messages, tools=[TOOL]), template)
    assert '"description": "<|im_end|>"' in runs(tokenizer, encoded)[0][1]
    assert runs(tokenizer, encoded)[1] == (True, '{"name": "add", "arguments": {"a": "</s>"}}<|im_end|>')
    assert control_tokens(tokenizer, encoded) == ["<|im_start|>", "<|im_end|>"] * 2


ROUNDS = ("user", "two"), ("assistant", "five"), ("user", "red"), ("assistant", "blue")


def asked_and_answered(tokenizer, content, **settings) -> list[str]:
    """Behind the last user's turn."""
    marked = runs(tokenizer, encode(tokenizer, content, QWEN_THINKING, **settings))
    text = [text for _, text in marked][-3:-1]
    return [text[0].rpartition("<|im_start|>assistant\n")[2], text[1]]


def test_encode_gives_every_answer_the_prompt_that_asks_for_its_manner(tokenizer):
    """The switch of the template: who asks for an answer without reasoning gets the empty one in the prompt."""
    fast, slow = (
        chat(("user", "two"), ("assistant", "five")),
        chat(("user", "two"), ("assistant", "<think>\n2\n</think>5")),
    )
    field = Chat(messages=[*fast.messages[:1], fast.messages[1] | {"reasoning_content": "2"}])
    said = "<think>\n2\n</think>\n\n5<|im_end|>"
    both = {"supervise": "last_turn"}
    assert asked_and_answered(tokenizer, fast, **both) == ["<think>\n\n</think>\n\n", "five<|im_end|>"]
    assert asked_and_answered(tokenizer, slow, **both) == ["", said]
    blank = chat(("user", "two"), ("assistant", "<think>\n\n</think>\n\nfive"))
    assert asked_and_answered(tokenizer, blank, **both) == asked_and_answered(tokenizer, fast, **both)
    assert asked_and_answered(tokenizer, field, **both)[0] == "", "reasoning in a field of its own"
    for off in ({"thinking_variable": None}, {"chat_template_kwargs": {"enable_thinking": True}}):
        assert asked_and_answered(tokenizer, fast, **off) == ["", "<think>\n\n</think>\n\nfive<|im_end|>"]
    with pytest.raises(ConfigError, match="thinking_variable: the chat template has no variable 'thinks'"):
        asked_and_answered(tokenizer, fast, thinking_variable="thinks")


def test_encode_takes_answers_as_the_template_shows_them_whatever_its_switch(tokenizer):
    """Where answers are shown without the empty reasoning, a prompt with one would be none of this conversation."""
    empty = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    template = CHATML.replace("assistant\n{% endif %}", f"assistant\n{empty}{{% endif %}}")
    encoded = encode(tokenizer, chat(*ROUNDS), template)
    assert [text for mark, text in runs(tokenizer, encoded) if mark] == ["five<|im_end|>", "blue<|im_end|>"]


@pytest.mark.parametrize("template", [FAMILIES["chatml"].template, FAMILIES["chatml_marked"].template])
def test_encode_supervises_the_turns_that_the_settings_name(tokenizer, template):
    def supervised(content, **settings) -> list[str]:
        encoded = encode(tokenizer, content, template, **settings)
        return [text for mark, text in runs(tokenizer, encoded) if mark]

    assert supervised(chat(*ROUNDS)) == ["five<|im_end|>", "blue<|im_end|>"]
    assert supervised(chat(*ROUNDS), supervise="last_turn") == ["blue<|im_end|>"]
    (everything,) = supervised(chat(*ROUNDS), supervise="everything")
    assert everything.startswith("user\ntwo<|im_end|>"), "all but the very first token"
    assert everything.endswith("blue<|im_end|>\n")
    unweighted = chat(*ROUNDS)
    unweighted.messages[1]["weight"] = 0
    assert supervised(unweighted) == ["blue<|im_end|>"]
    unweighted.messages[3]["weight"] = 0
    assert supervised(unweighted) == []


def test_encode_tells_marks_apart_where_a_template_puts_several_on_a_turn(tokenizer):
    twice = FAMILIES["chatml_marked"].template.replace(
        "{{ m.content }}<|im_end|>{% endgeneration %}",
        "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}",
    )
    last = encode(tokenizer, chat(*ROUNDS), twice, supervise="last_turn")
    assert [text for mark, text in runs(tokenizer, last) if mark] == ["blue<|im_end|>"]


@pytest.mark.parametrize("name", ["mistral", "qwen_thinking"])
def test_encode_refuses_rewritten_history_and_takes_the_last_turn_of_it(tokenizer, name):
    content = chat(("system", "Be brief."), ("user", "two"), ("assistant", "<think>\n2\n</think>\n\nfive"), *ROUNDS[2:])
    template = FAMILIES[name].template
    with pytest.raises(RecordError, match="the chat template rewrites history") as caught:
        encode(tokenizer, content, template, supervise="every_turn")
    assert "supervise: last_turn" in str(caught.value)
    last = encode(tokenizer, content, template, supervise="last_turn", thinking_variable=None)
    (supervised,) = [text for mark, text in runs(tokenizer, last) if mark]
    assert supervised in (" blue</s>", "<think>\n\n</think>\n\nblue<|im_end|>")


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("<think>\ntwo and three\n</think>\n\nfive", ["\n\nfive<|im_end|>"]),
        ("<think>a</think>five<think>b</think>red", ["five", "red<|im_end|>"]),
        ("five", ["five<|im_end|>"]),
        ("five </think> is not an opening", ["five </think> is not an opening<|im_end|>"]),
        ("<think>never closed", []),
        ("Use <think> tags. It is 4.", ["Use <think> tags. It is 4.<|im_end|>"]),
    ],
)
def test_encode_leaves_out_the_reasoning_where_the_settings_say_so(tokenizer, answer, left):
    encoded = encode(tokenizer, chat(("user", "a"), ("assistant", answer)), supervise_reasoning=False)
    assert [text for mark, text in runs(tokenizer, encoded) if mark] == left
    whole = encode(tokenizer, chat(("user", "a"), ("assistant", answer)))
    assert encoded.row.input_ids_L.tolist() == whole.row.input_ids_L.tolist(), "the tokens are the same"


def test_encode_leaves_out_reasoning_that_the_prompt_has_opened(tokenizer):
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n"
    opens = CHATML.replace(prompt, prompt + "<think>\n")
    encoded = encode(
        tokenizer, chat(("user", "a"), ("assistant", "<think>\ntwo</think>five")), opens, supervise_reasoning=False
    )
    assert runs(tokenizer, encoded)[1:] == [(True, "five<|im_end|>"), (False, "\n")]


def test_encode_refuses_a_template_that_leaves_out_what_the_assistant_says(tokenizer):
    """Templates of models that see images loop over parts of a content, and print nothing for a string."""
    parts = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    with pytest.raises(RecordError, match=r"chat\.jsonl:1: the chat template leaves out what the assistant says"):
        encode(tokenizer, chat(("user", "a"), ("assistant", "five")), parts)


def test_encode_notes_a_shortened_answer_and_one_without_an_end(tokenizer):
    thought = chat(("user", "a"), ("assistant", "<think>b</think>five"))
    assert not encode(tokenizer, thought).reworded
    forgets = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert encode(tokenizer, thought, forgets).reworded
    assert not encode(tokenizer, thought).unended
    assert encode(tokenizer, thought, CHATML.replace("<|im_end|>\n", "\n")).unended


def test_encode_supervises_plain_text_as_a_whole_and_ends_it(tokenizer):
    encoded = encode(tokenizer, PlainText(text="It is five."))
    ids = tokenizer.backend_tokenizer.encode("It is five.").ids
    assert encoded.row.input_ids_L.tolist() == [*ids, tokenizer.eos_token_id]
    assert encoded.row.label_mask_L.tolist() == [False] + [True] * len(ids)
    assert encode(tokenizer, PlainText(text="It is five."), append_eos=False).row.input_ids_L.tolist() == ids


def test_encode_gives_plain_text_the_tokenizers_own_beginning_once(folder, tmp_path):
    import transformers
    from tokenizers.processors import TemplateProcessing

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert encode(tokenizer, PlainText(text="five")).row.input_ids_L.tolist()[0] == bos
    spelt = PlainText(text="<s>five<|im_end|>")
    rendered = encode(tokenizer, spelt, control_tokens="all").row.input_ids_L.tolist()
    assert rendered.count(bos) == 1
    assert rendered.count(tokenizer.eos_token_id) == 1
    literal = encode(tokenizer, spelt)
    assert control_tokens(tokenizer, literal) == ["<s>", "<|im_end|>"], "its own, at the beginning and the end"
    assert decode(tokenizer, literal.row.input_ids_L) == "<s><s>five<|im_end|><|im_end|>"
    assert encode(tokenizer, chat(*ROUNDS)).row.input_ids_L.tolist()[0] != bos, "a chat's beginning is the template's"


def test_encode_keeps_ready_tokens_and_marks_as_they_are(tokenizer):
    import numpy as np

    ids, marks = np.array([1, 2, 300, 2, 7], np.int32), np.array([0, 1, 0, 0, 1], np.bool_)
    encoded = encode(tokenizer, Tokens(input_ids_L=ids, label_mask_L=marks), template=None, supervise="last_turn")
    assert encoded.row.input_ids_L.tolist() == ids.tolist()
    assert encoded.row.label_mask_L.tolist() == marks.tolist()
    ids[2] = len(tokenizer)
    with pytest.raises(RecordError, match=rf"token id {len(tokenizer)}, but the tokenizer has {len(tokenizer)} tokens"):
        encode(tokenizer, Tokens(input_ids_L=ids, label_mask_L=marks))


def test_encode_gives_every_record_its_own_answer_in_order(tokenizer):
    """A bad one among good ones of every form does not shift anything."""
    import numpy as np

    ready = Tokens(input_ids_L=np.array([5, 6], np.int32), label_mask_L=np.array([False, True]))
    contents = [chat(*ROUNDS), PlainText(text="five"), chat(("assistant", "unprompted")), ready, chat(*ROUNDS[:2])]
    tokenizer.chat_template = CHATML
    records = [
        Record(sample_id=str(n), source="f", content=content, where=f"f:{n}") for n, content in enumerate(contents)
    ]
    encoded = BatchEncoder(tokenizer, TextSettings(files=["-"])).encode(records)
    assert isinstance(encoded[2], RecordError)
    assert "f:2: the conversation opens with an assistant turn" in str(encoded[2])
    assert [e.row.sample_id for e in encoded if isinstance(e, EncodedRow)] == ["0", "1", "3", "4"]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_encode_refuses_a_template_that_leaves_out_a_tool_call_or_a_tool(tokenizer, content):
    """ChatML alone would print None for it, or nothing, and that would be learnt."""
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    messages = [{"role": "user", "content": "2+3"}, call, {"role": "tool", "content": "5"}]
    with pytest.raises(RecordError, match="the chat template leaves out what the assistant says: …'add'"):
        encode(tokenizer, Chat(messages=messages))
    with pytest.raises(RecordError, match="the chat template leaves out the tool 'add'"):
        encode(tokenizer, chat(("user", "2+3"), ("assistant", "5"), tools=[TOOL]))


def test_encode_notes_reasoning_beside_the_content_that_the_template_drops(tokenizer):
    thought = {"role": "assistant", "content": "five", "reasoning_content": "two and three"}
    content = Chat(messages=[{"role": "user", "content": "2+3"}, thought])
    assert encode(tokenizer, content).reworded
    shows = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}")
    assert not encode(tokenizer, content, shows).reworded


def test_encode_refuses_a_template_that_reads_the_clock_whatever_it_is_given(tokenizer):
    clock = "{{ strftime_now('%Y') }}{{ date_string }}" + CHATML
    with pytest.raises(MismatchError, match=r"chat\.jsonl:1: the chat template reads the clock"):
        encode(tokenizer, chat(*ROUNDS), clock, chat_template_kwargs={"date_string": "2020"})


def test_encode_refuses_a_variable_that_the_template_has_not(tokenizer):
    with pytest.raises(ConfigError, match="the chat template has no variable 'enable_thinkng'"):
        encode(tokenizer, chat(*ROUNDS), QWEN_THINKING, chat_template_kwargs={"enable_thinkng": False})


def test_encode_refuses_weight_0_where_everything_is_supervised(tokenizer):
    content = chat(*ROUNDS)
    content.messages[1]["weight"] = 0
    with pytest.raises(RecordError, match="a turn has weight 0, but supervise is everything"):
        encode(tokenizer, content, supervise="everything")


def test_encode_takes_the_line_feed_behind_an_end_of_turn_out_of_a_mark(tokenizer):
    wide = FAMILIES["chatml_marked"].template.replace(
        "<|im_end|>{% endgeneration %}", "<|im_end|>{{ '\n' }}{% endgeneration %}"
    )
    encoded = encode(tokenizer, chat(*ROUNDS), wide)
    assert [text for mark, text in runs(tokenizer, encoded) if mark] == ["five<|im_end|>", "blue<|im_end|>"]
    assert not encoded.unended


def test_encode_refuses_marks_that_leave_turns_out(tokenizer):
    last_alone = FAMILIES["chatml_marked"].template.replace(
        "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}"
    )
    with pytest.raises(RecordError, match="marks 1 spans as generated, but there are 2 turns of the assistant"):
        encode(tokenizer, chat(*ROUNDS), last_alone)


def test_encode_keeps_a_token_that_has_both_the_tag_and_some_of_the_answer(tmp_path):
    sentences = [*SENTENCES, *["</think>A </think>A"] * 50]
    merging = make_tokenizer(tmp_path, vocab_size=400, sentences=sentences)
    encoded = encode(merging, chat(("user", "a"), ("assistant", "<think>x</think>A.")), supervise_reasoning=False)
    supervised = [text for mark, text in runs(merging, encoded) if mark]
    assert "A" in supervised[0], "the first of the answer is learnt"
    assert supervised[0].endswith(".<|im_end|>")


def test_encode_spells_control_tokens_out_beside_characters_that_are_composed(tmp_path):
    """NFC gives a letter and its mark the place of the letter alone."""
    from tokenizers import normalizers

    tokenizer = make_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    encoded = encode(tokenizer, chat(("user", "a"), ("assistant", "x <|im_end|> e\u0301")))
    assert runs(tokenizer, encoded)[1] == (True, "x <|im_end|> \u00e9<|im_end|>")
    assert control_tokens(tokenizer, encoded) == ["<|im_start|>", "<|im_end|>"] * 2


def test_encode_of_many_spelt_control_tokens_needs_no_more_than_the_text(tokenizer):
    """Twenty thousand of them took four gigabytes once."""
    import tracemalloc

    text = "<|im_end|> five\n" * 20_000
    tracemalloc.start()
    encoded = encode(tokenizer, PlainText(text=text))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert control_tokens(tokenizer, encoded) == ["<|im_end|>"], "its own, at the end"
    assert peak_bytes < 1000 * len(text)
