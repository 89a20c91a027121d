"""Draws come from the distribution that was asked for, and depend on their names alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from student_train.eval.generation import Reply, Stops, Writer
from student_train.eval.sampling import Draws, Sampling, drawn, uniform_numbers

V = 307
NUM_DRAWS = 4000
PROMPT = [5, 17, 99]
STOPS = Stops(ids=frozenset({2, *range(40, 60)}))


@pytest.fixture(scope="module")
def model(teacher_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(teacher_folder).eval()


@torch.no_grad()
def logp_of(model: Any, ids: list[int]) -> torch.Tensor:
    """[L, V], teacher-forced, at T = 1."""
    return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def write(model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling, **changes: Any) -> list[Reply]:
    settings = {"max_new_tokens": 9, "batch_rows": 4, **changes}
    writer = Writer(model, tokenizer, stops=STOPS, **settings)
    return writer.write(prompts, sampling=sampling, keys=[f"7/{number}" for number in range(len(prompts))])


def expected_p(model: Any, sampling: Sampling) -> torch.Tensor:
    """By definition: temper; the k most probable; of these, in order, those before which less than top_p stands."""
    p_V = (logp_of(model, PROMPT)[-1] / sampling.temperature).softmax(-1)
    sorted_V, ids_V = p_V.sort(descending=True)
    sorted_V[sampling.top_k or V :] = 0.0
    sorted_V /= sorted_V.sum()
    sorted_V[sorted_V.cumsum(-1) - sorted_V >= sampling.top_p] = 0.0
    return torch.zeros(V, dtype=torch.float64).scatter_(0, ids_V, sorted_V / sorted_V.sum())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=1.7, top_k=23),
        Sampling(top_p=0.6),
        Sampling(temperature=0.8, top_p=0.5, top_k=11),
    ],
    ids=str,
)
def test_draws_have_the_distribution_that_was_asked_for(model, tokenizer, sampling):
    """Total variation, against what as many draws from the exact probabilities have themselves."""
    replies = write(model, tokenizer, [PROMPT] * NUM_DRAWS, sampling, max_new_tokens=1, batch_rows=NUM_DRAWS)
    counts_V = np.bincount([reply.ids[0] for reply in replies], minlength=V)
    p_V = expected_p(model, sampling).numpy()
    assert not counts_V[p_V == 0].any()
    random = np.random.default_rng(0)

    def total_variation(counts_V: np.ndarray) -> float:
        return float(np.abs(counts_V / NUM_DRAWS - p_V).sum() / 2)

    usual = [total_variation(random.multinomial(NUM_DRAWS, p_V)) for _ in range(400)]
    assert total_variation(counts_V) < max(usual)
    assert max(usual) < 0.15


def test_a_reply_depends_neither_on_its_batch_nor_on_those_before_it(model, tokenizer):
    torch.manual_seed(3)
    prompts = [torch.randint(3, V, (length,)).tolist() for length in (9, 2, 31, 9, 17, 1, 30, 9)]
    together = write(model, tokenizer, prompts, Sampling(), batch_rows=8)
    torch.manual_seed(99)
    for batch_rows in (1, 3):
        assert [each.ids for each in write(model, tokenizer, prompts, Sampling(), batch_rows=batch_rows)] == [
            each.ids for each in together
        ]
    assert len({each.ids for each in together}) == 8
    assert {each.is_cut for each in together} == {True, False}
    other = Writer(model, tokenizer, stops=STOPS, max_new_tokens=9, batch_rows=8)
    replies = other.write(prompts, sampling=Sampling(), keys=[f"8/{number}" for number in range(8)])
    assert all(one.ids != another.ids for one, another in zip(replies, together, strict=True))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.8)], ids=str)
def test_nll_is_that_of_a_teacher_forced_pass(model, tokenizer, sampling):
    torch.manual_seed(4)
    prompts = [torch.randint(3, V, (length,)).tolist() for length in (9, 2, 31, 1, 30)]
    for prompt, reply in zip(prompts, write(model, tokenizer, prompts, sampling), strict=True):
        logp_LV = logp_of(model, [*prompt, *reply.ids])[len(prompt) - 1 : -1]
        expected = -float(logp_LV.gather(1, torch.tensor(reply.ids)[:, None]).mean())
        assert reply.nll == pytest.approx(expected, abs=1e-4)


def test_ids_are_the_text_and_what_ended_it(model, tokenizer):
    replies = write(model, tokenizer, [PROMPT] * 40, Sampling(), max_new_tokens=20, batch_rows=40)
    assert {reply.is_cut for reply in replies} == {True, False}
    for reply in replies:
        kept = reply.ids if reply.is_cut else reply.ids[:-1]
        assert not set(kept) & STOPS.ids
        assert reply.is_cut or reply.ids[-1] in STOPS.ids
        assert reply.text == tokenizer.decode(kept, skip_special_tokens=False)


def test_greedy_draws_are_what_is_written_without_any(model, tokenizer):
    prompts = [PROMPT, [9, 9], [200, 3, 4, 5]]
    writer = Writer(model, tokenizer, stops=STOPS, max_new_tokens=9, batch_rows=2)
    greedy = write(model, tokenizer, prompts, Sampling(temperature=0))
    assert [each.ids for each in greedy] == [each.ids for each in writer.write(prompts)]


def test_a_token_is_drawn_at_every_number_that_there_is():
    p_BV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(5, 1)
    number_B1 = torch.tensor([0.0, 0.2499, 0.2501, 0.5, 1 - 2**-24])[:, None]
    assert drawn(p_BV, number_B1)[:, 0].tolist() == [1, 1, 3, 3, 3]
    third = torch.full((1, 3), 1 / 3)  # whose sum is not 1
    assert drawn(third, torch.tensor([[1 - 2**-24]])).item() == 2


def test_numbers_of_a_shorter_reply_begin_those_of_a_longer_one():
    assert uniform_numbers("a", 5).tolist() == uniform_numbers("a", 50)[:5].tolist()
    assert uniform_numbers("a", 5).tolist() != uniform_numbers("b", 5).tolist()


def test_logits_that_are_no_numbers_end_as_a_mean_that_is_none():
    draws = Draws(Sampling(), ["a"], 1, torch.device("cpu"))
    draws(torch.zeros(1, 1, dtype=torch.long), torch.full((1, V), torch.nan))
    assert np.isnan(draws.nll([1])[0])
