"""Sampled ids: what is claimed to be unbiased is, by Monte Carlo against the full distribution; and with what variance.

Draws are independent uniform numbers unless a test says otherwise; all bounds are five standard errors.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.rows import Positions
from teacher_dump.keep import Threshold, TopK, keep_chunk

V = 1301  # two whole blocks and a rest


def logits_of(sharpness: float, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=V) * sharpness).float()


def weights(logits_V: Tensor, rule: Threshold, draws: np.ndarray) -> Tensor:
    """w [draws, V], zero where an id was not drawn."""
    size = len(logits_V)
    dense = []
    for part in np.array_split(draws, -(-len(draws) // 500)):
        logits_NV = logits_V.expand(len(part), -1).clone()
        chunk = keep_chunk(logits_NV, torch.zeros(len(part), dtype=torch.long), rule, [1.0], part)
        assert chunk.tail_logsum_NT.shape == (len(part), 0)
        w_NV = torch.zeros(len(part), size, dtype=torch.float64)
        row_E = torch.arange(len(part)).repeat_interleave(chunk.counts_N)
        w_NV[row_E, chunk.ids_E] = chunk.logp_E.double().exp()
        dense.append(w_NV)
    return torch.cat(dense)


def softmax(logits_V: Tensor) -> Tensor:
    return torch.softmax(logits_V.double(), 0)


RULES = [
    (2.0, Threshold(tau=0.02, seed=0, always_ids=())),
    (4.0, Threshold(tau=0.005, seed=0, always_ids=(3, 700, 1300))),
    (0.3, Threshold(tau=0.1, seed=0, always_ids=())),  # nothing reaches tau
    (9.0, Threshold(tau=0.5, seed=0, always_ids=())),  # nearly everything is one id
]


@pytest.mark.parametrize(("sharpness", "rule"), RULES)
def test_every_weight_is_unbiased_with_the_variance_that_is_claimed(sharpness: float, rule: Threshold):
    logits_V = logits_of(sharpness)
    p_V, num_draws = softmax(logits_V), 20_000
    w_NV = weights(logits_V, rule, np.random.default_rng(1).random(num_draws))
    is_exact_V = p_V >= rule.tau
    is_exact_V[list(rule.always_ids)] = True
    variance_V = torch.where(is_exact_V, 0.0, p_V * (rule.tau - p_V))
    # 1301 means are looked at: five and a half standard errors, and for ids that are nearly never drawn one draw more.
    allowed_V = 5.5 * (variance_V / num_draws).sqrt() + rule.tau * 2 / num_draws + 1e-6 * p_V
    assert bool(((w_NV.mean(0) - p_V).abs() <= allowed_V).all())
    assert float(((w_NV - p_V) ** 2).sum(1).mean()) == pytest.approx(float(variance_V.sum()), rel=0.05, abs=1e-9)
    torch.testing.assert_close(w_NV[0, is_exact_V], p_V[is_exact_V], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("sharpness", "rule"), RULES)
def test_forward_kl_and_its_gradient_are_unbiased(sharpness: float, rule: Threshold):
    """−Σ w log q − H estimates KL(p‖q), and (Σ w)·q − w its gradient q − p."""
    logits_V, num_draws = logits_of(sharpness), 20_000
    p_V = softmax(logits_V)
    log_q_V = torch.log_softmax(logits_of(1.5, seed=5).double(), 0)
    w_NV = weights(logits_V, rule, np.random.default_rng(2).random(num_draws))
    entropy = -(p_V * p_V.log()).sum()
    kl_N = -(w_NV * log_q_V).sum(1) - entropy
    exact = float((p_V * (p_V.log() - log_q_V)).sum())
    assert float(kl_N.mean()) == pytest.approx(exact, abs=5 * float(kl_N.std()) / num_draws**0.5 + 1e-5)
    direction_V = torch.from_numpy(np.random.default_rng(3).normal(size=V))
    slope_N = (w_NV.sum(1, keepdim=True) * log_q_V.exp() - w_NV) @ direction_V
    exact_slope = float((log_q_V.exp() - p_V) @ direction_V)
    assert float(slope_N.mean()) == pytest.approx(exact_slope, abs=5 * float(slope_N.std()) / num_draws**0.5 + 1e-5)


@pytest.mark.parametrize(("sharpness", "rule"), RULES)
def test_evenly_spaced_draws_give_the_probabilities_themselves(sharpness: float, rule: Threshold):
    """Inclusion is a length on [0, 1): a grid of draws measures it to a grid step, with no luck involved."""
    logits_V, num_draws = logits_of(sharpness), 4000
    w_NV = weights(logits_V, rule, (np.arange(num_draws) + 0.5) / num_draws)
    assert float((w_NV.mean(0) - softmax(logits_V)).abs().max()) <= rule.tau * 1.01 / num_draws + 1e-6


@pytest.mark.parametrize(("sharpness", "rule"), RULES)
def test_one_draw_for_a_position_keeps_count_and_sum_nearly_constant(sharpness: float, rule: Threshold):
    logits_V = logits_of(sharpness)
    w_NV = weights(logits_V, rule, np.random.default_rng(4).random(3000))
    counts_N = (w_NV > 0).sum(1)
    assert int(counts_N.max() - counts_N.min()) <= 1
    assert int(counts_N.min()) >= 1
    assert float((w_NV.sum(1) - 1).abs().max()) <= rule.tau + 1e-5


def test_improbable_ids_do_not_vanish_in_a_long_vocabulary():
    """In one fp32 running sum over 200,000 ids of p = 1e-6 each, steps of p/tau would be rounded to an ulp."""
    size = 200_000
    logits_V = torch.zeros(size)
    logits_V[0] = math.log(size * 4)  # p = 0.8
    rule = Threshold(tau=0.001, seed=0, always_ids=())
    draws = np.random.default_rng(0).random(50)
    chunk = keep_chunk(logits_V.expand(50, -1).clone(), torch.zeros(50, dtype=torch.long), rule, [1.0], draws)
    counts = chunk.counts_N - 1
    assert float(counts.double().mean()) == pytest.approx(200, abs=0.5)
    drawn = chunk.ids_E[chunk.ids_E > 0].double()
    assert float(drawn.mean()) == pytest.approx(size / 2, rel=0.01)
    thirds = torch.histc(drawn, bins=3, min=0, max=size)
    assert float((thirds / len(drawn) - 1 / 3).abs().max()) < 0.01


def test_draws_are_a_function_of_seed_sample_and_position():
    rule = Threshold(tau=0.02, seed=7, always_ids=())
    draws = rule.draws("chat-1", 5)
    np.testing.assert_array_equal(rule.draws("chat-1", 9)[:5], draws)
    assert len({*draws, *rule.draws("chat-2", 5), *Threshold(tau=0.02, seed=8, always_ids=()).draws("chat-1", 5)}) == 15
    # Frozen: another value would be another dataset from the same settings.
    assert draws[:2].tolist() == [0.2376250018146947, 0.45089506084880415]
    many = rule.draws("x", 100_000)
    assert 0 <= many.min() < 1e-4
    assert 1 - 1e-4 < many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=0.005)


def test_padding_of_no_probability_is_never_drawn_nor_kept():
    logits_NV = torch.randn(40, 700)
    logits_NV[:, 600:] = -torch.inf
    rule = Threshold(tau=0.01, seed=0, always_ids=(5, 650))
    chunk = keep_chunk(logits_NV, torch.zeros(40, dtype=torch.long), rule, [1.0], np.random.default_rng(0).random(40))
    assert int(chunk.ids_E.max()) < 600
    assert all(5 in position.kept_ids_E for position in chunk.positions().split([1] * 40))


@pytest.mark.parametrize("vocab_size", [2, 511, 512, 513, 1024])
def test_block_borders_lose_and_repeat_nothing(vocab_size: int):
    torch.manual_seed(vocab_size)
    logits_NV = torch.randn(6, vocab_size)
    p_NV = torch.softmax(logits_NV.double(), 1)
    rule = Threshold(tau=0.4, seed=0, always_ids=())
    draws = (np.arange(400) + 0.5) / 400
    mean_NV = torch.stack([weights(row, rule, draws).mean(0) for row in logits_NV])
    assert float((mean_NV - p_NV).abs().max()) <= rule.tau * 1.01 / 400 + 1e-6


def test_topk_with_its_tail_says_what_is_true_of_the_full_distribution():
    """The bucket's KL is the full one with the tail as one outcome, at every declared temperature."""
    logits_V = logits_of(2.0)
    rule, temperatures = TopK(k=20, min_prob=0.0, always_ids=()), [1.0, 2.0]
    got = keep_chunk(logits_V[None].clone(), torch.zeros(1, dtype=torch.long), rule, temperatures).positions()
    log_q_V = torch.log_softmax(logits_of(1.5, seed=5).double(), 0)
    for j, temperature in enumerate(temperatures):
        p_V = torch.softmax(logits_V.double() / temperature, 0)
        q_V = torch.softmax(log_q_V / temperature, 0)
        merged = [torch.cat([x[got.kept_ids_E], 1 - x[got.kept_ids_E].sum(0, keepdim=True)]) for x in (p_V, q_V)]
        expected = float((merged[0] * (merged[0] / merged[1]).log()).sum())
        assert bucket_kl(got, q_V, temperature, j) == pytest.approx(expected, rel=1e-5)


def bucket_kl(got: Positions, q_V: Tensor, temperature: float, column: int) -> float:
    stored = np.append(got.kept_logp_E.astype(float) / temperature, got.tail_logsum_PT[0, column])
    p = np.exp(stored) / np.exp(stored).sum()
    q_kept = q_V[got.kept_ids_E].numpy()
    q = np.append(q_kept, 1 - q_kept.sum())
    return float((p * np.log(p / q)).sum())
