"""Replies in batches are those that a model writes alone, one token at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shared.errors import LogitferryError
from student_train.attention import VARLEN
from student_train.config import StudentSettings
from student_train.eval.generation import Stops, Writer, take_own_attention
from student_train.student import Student

V = 307
MAX_NEW_TOKENS = 11
NONE = Stops(ids=frozenset())


@pytest.fixture(scope="module")
def model(teacher_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of unlike lengths, in no order."""
    torch.manual_seed(5)
    return [torch.randint(3, V, (length,)).tolist() for length in (9, 2, 31, 9, 17, 1, 30)]


@torch.no_grad()
def alone(model: Any, prompt: list[int], room: int = MAX_NEW_TOKENS, stops: frozenset[int] = frozenset()) -> list[int]:
    """Greedy decoding as it is defined: the whole text goes through the model for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + room and (len(ids) == len(prompt) or ids[-1] not in stops):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def writer(model: Any, tokenizer: Any, stops: Stops = NONE, **changes: Any) -> Writer:
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "batch_rows": 3, **changes}
    return Writer(model, tokenizer, stops=stops, **settings)


def texts(tokenizer: Any, written: list[list[int]]) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in written]


def test_writer_writes_what_the_model_writes_alone(model, tokenizer, prompts):
    replies = writer(model, tokenizer).write(prompts)
    expected = [alone(model, prompt) for prompt in prompts]
    assert [reply.text for reply in replies] == texts(tokenizer, expected)
    assert len({reply.text for reply in replies}) > 4  # the prompts have an influence
    assert all(reply.is_cut and reply.num_tokens == MAX_NEW_TOKENS for reply in replies)


def test_writer_ends_every_reply_for_itself(model, tokenizer, prompts):
    free = [alone(model, prompt) for prompt in prompts]
    ids = frozenset({free[0][3], free[2][0]})
    replies = writer(model, tokenizer, Stops(ids=ids)).write(prompts)
    expected = [alone(model, prompt, stops=ids) for prompt in prompts]
    assert [reply.num_tokens for reply in replies] == [len(each) for each in expected]
    ended = [each[-1] in ids for each in expected]
    assert any(ended)
    assert not all(ended)
    assert [not reply.is_cut for reply in replies] == ended
    kept = [each[:-1] if end else each for each, end in zip(expected, ended, strict=True)]
    assert [reply.text for reply in replies] == texts(tokenizer, kept)
    assert replies[2].text == ""


def test_writer_ends_at_a_string_as_well(model, tokenizer, prompts):
    whole = [reply.text for reply in writer(model, tokenizer).write(prompts)]
    number, end = next((number, text[4:6]) for number, text in enumerate(whole) if text[4:6].isascii())
    stops = Stops(ids=frozenset({2}), strings=("never to be seen", end))
    replies = writer(model, tokenizer, stops).write(prompts)
    assert [reply.text for reply in replies] == [text.split(end)[0].split("<|im_end|>")[0] for text in whole]
    assert [reply.is_cut for reply in replies] == [end not in text for text in whole]
    assert all(reply.num_tokens < MAX_NEW_TOKENS for reply in replies if not reply.is_cut)
    assert writer(model, tokenizer, stops).write([prompts[number]]) == [replies[number]]  # nothing pads it then


def test_writer_minds_nothing_that_a_checkpoint_says_of_generation(model, tokenizer, prompts, monkeypatch):
    expected = writer(model, tokenizer).write(prompts)
    strange = transformers.GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=4.0, min_new_tokens=9, num_beams=2, suppress_tokens=[9]
    )
    monkeypatch.setattr(model, "generation_config", strange)
    model.train()
    assert writer(model, tokenizer).write(prompts) == expected
    assert model.generation_config is strange
    assert model.training
    model.eval()


def test_writer_leaves_each_row_the_room_that_the_context_has(tokenizer, prompts):
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 24, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, **shape)).eval()
    replies = writer(model, tokenizer, context_tokens=32).write(prompts)  # one past it has no position, and raises
    rooms = [min(MAX_NEW_TOKENS, 32 - len(prompt)) for prompt in prompts]
    assert [reply.num_tokens for reply in replies] == rooms
    assert min(rooms) == 1
    expected = [alone(model, prompt, room) for prompt, room in zip(prompts, rooms, strict=True)]
    assert [reply.text for reply in replies] == texts(tokenizer, expected)


def test_take_own_attention_undoes_packing(teacher_folder, model, tokenizer, prompts):
    student = Student(StudentSettings(model=str(teacher_folder)), torch.device("cpu"), batch_tokens=600)
    assert student.model.config._attn_implementation == VARLEN
    take_own_attention(student.model)
    assert student.model.config._attn_implementation == model.config._attn_implementation
    assert writer(student.model, tokenizer).write(prompts) == writer(model, tokenizer).write(prompts)


def test_writer_halves_batches_that_do_not_fit(model, tokenizer, prompts, monkeypatch, caplog):
    expected = writer(model, tokenizer).write(prompts)
    generate, sizes = model.generate, []

    def limited(input_ids, **others):
        sizes.append(len(input_ids))
        if len(input_ids) > limit:
            raise torch.OutOfMemoryError("no memory left")
        return generate(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "generate", limited)
    limit = 2
    greedy = writer(model, tokenizer, batch_rows=6)
    assert greedy.write(prompts) == expected
    assert (sizes, greedy.batch_rows) == ([6, 3, 1, 1, 1, 1, 1, 1, 1], 1)
    assert "generate.batch_rows is 1 from now on" in caplog.text
    limit = 0
    with pytest.raises(LogitferryError, match="with one prompt of 31 tokens and a reply of 11"):
        writer(model, tokenizer).write(prompts)


def test_writer_passes_other_errors_on(model, tokenizer, prompts, monkeypatch):
    def broken(**_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        writer(model, tokenizer).write(prompts)


def test_stops_are_the_models_the_tokenizers_and_those_asked_for(model, tokenizer, monkeypatch):
    assert Stops.of(model, tokenizer) == Stops(ids=frozenset({2}))  # <|im_end|>
    monkeypatch.setattr(model, "generation_config", transformers.GenerationConfig(eos_token_id=[2, 300]))
    monkeypatch.setattr(model.config, "eos_token_id", None)
    stops = Stops.of(model, tokenizer, ["<|im_start|>", "\n\n"])
    assert stops == Stops(ids=frozenset({1, 2, 300}), strings=("\n\n",))
    assert stops.before("one\n\ntwo\n\n") == "one"
