"""A chunk of logits to stored values, against a truth computed in fp64 one position at a time."""

import math

import numpy as np
import pytest
import torch

from shared.errors import NonFiniteError
from shared.rows import Positions, Row
from teacher_dump.keep import TopK, keep_chunk
from teacher_dump.scoring import require_finite

TEMPERATURES = [1.0, 2.0, 0.5]


def truth(logits_V: torch.Tensor, rule: TopK, temperature: float) -> tuple[dict[int, float], float, float]:
    """Kept {id: log p}, the tail's log Σ p^(1/T) and the entropy, by definition."""
    z = logits_V.double()
    logp = (z - torch.logsumexp(z, 0)).tolist()
    by_probability = sorted(range(len(logp)), key=lambda v: -logp[v])[: rule.k]
    kept = (
        {v for v in by_probability if math.exp(logp[v]) >= rule.min_prob} | {by_probability[0]} | set(rule.always_ids)
    )
    kept = {v for v in kept if logp[v] > -math.inf}
    rest = [logp[v] / temperature for v in range(len(logp)) if v not in kept and logp[v] > -math.inf]
    tail = float(torch.logsumexp(torch.tensor(rest, dtype=torch.float64), 0)) if rest else -math.inf
    return {v: logp[v] for v in kept}, tail, -sum(math.exp(x) * x for x in logp if x > -math.inf)


def keep(logits_NV: torch.Tensor, realised_N: torch.Tensor, rule: TopK) -> Positions:
    chunk = keep_chunk(logits_NV.clone(), realised_N, rule, TEMPERATURES)
    require_finite(row_of(len(logits_NV)), chunk.positions())
    return chunk.positions()


def row_of(num_positions: int) -> Row:
    """A row that is supervised from its second token on."""
    mask = np.arange(num_positions + 1) > 0
    return Row(sample_id="a", input_ids_L=np.zeros(num_positions + 1, dtype=np.int32), label_mask_L=mask)


def assert_equals_truth(logits_NV: torch.Tensor, rule: TopK) -> None:
    realised_N = torch.arange(len(logits_NV)) * 7 % min(8, logits_NV.shape[1])
    got = keep(logits_NV, realised_N, rule)
    logp_NV = torch.log_softmax(logits_NV.double(), dim=1)
    for n, position in enumerate(got.split([1] * len(logits_NV))):
        assert position.realised_logp_P[0] == pytest.approx(float(logp_NV[n, realised_N[n]]), abs=1e-5, rel=1e-6)
        for j, temperature in enumerate(TEMPERATURES):
            kept, tail, entropy = truth(logits_NV[n], rule, temperature)
            assert position.kept_ids_E.tolist() == sorted(kept)
            expected = [kept[v] for v in sorted(kept)]
            np.testing.assert_allclose(position.kept_logp_E, expected, atol=1e-5, rtol=1e-6)
            assert position.entropy_P[0] == pytest.approx(entropy, abs=1e-5)
            assert position.tail_logsum_PT[0, j] == pytest.approx(tail, abs=1e-5, rel=1e-6)


@pytest.mark.parametrize("vocab_size", [2, 17, 1001, 4099])
@pytest.mark.parametrize(
    "rule",
    [
        TopK(k=1, min_prob=0.0, always_ids=()),
        TopK(k=5, min_prob=0.0, always_ids=(0, 1)),
        TopK(k=64, min_prob=0.01, always_ids=(1,)),
        TopK(k=10, min_prob=0.9, always_ids=()),
        TopK(k=5000, min_prob=0.0, always_ids=(0,)),
    ],
)
def test_stored_values_equal_the_full_distribution(vocab_size: int, rule: TopK):
    torch.manual_seed(vocab_size)
    assert_equals_truth(torch.randn(13, vocab_size) * torch.logspace(-1, 1.3, 13)[:, None], rule)


@pytest.mark.parametrize("at", [[*range(20)], [*range(4089, 4099)], [0, 4098], [*range(31, 4099, 407)], [4095, 4096]])
def test_the_largest_are_found_wherever_they_lie(at: list[int]):
    """Together in one group of ids, each in its own, or behind the last whole group; some exactly as large."""
    torch.manual_seed(1)
    logits = torch.randn(3, 4099)
    logits[:, at] = 9.0 + torch.arange(len(at)) // 2
    for k in (1, len(at) - len(at) % 2, 33):
        expected = torch.log_softmax(logits.double(), 1).topk(k).values.sort(dim=1).values
        got = keep(logits, torch.zeros(3, dtype=torch.long), TopK(k=k, min_prob=0.0, always_ids=()))
        assert got.kept_counts_P.tolist() == [k, k, k]
        np.testing.assert_allclose(np.sort(got.kept_logp_E.reshape(3, k)), expected, atol=1e-5)
        assert all(np.diff(ids).min(initial=1) > 0 for ids in got.kept_ids_E.reshape(3, k))


def test_a_chunk_that_is_worked_off_in_blocks_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(2)
    logits, realised = torch.randn(13, 333) * 4, torch.arange(13)
    rule = TopK(k=7, min_prob=0.001, always_ids=(5,))
    whole = keep(logits, realised, rule)
    monkeypatch.setattr("teacher_dump.keep.block_bytes", lambda _device: 16 * 333 * 4)
    for name, values in vars(keep(logits, realised, rule)).items():
        np.testing.assert_allclose(values, getattr(whole, name), rtol=1e-6, atol=1e-6)


def test_a_tail_far_below_fp32_rounding_of_the_kept_mass_is_still_exact():
    """1 − Σ of the kept would be 0 or negative at all of these."""
    logits = torch.zeros(5, 9)
    for n, drop in enumerate([10.0, 16.0, 40.0, 90.0, 300.0]):
        logits[n, 2:] = -drop - torch.arange(7) * 0.3
    rule = TopK(k=2, min_prob=0.0, always_ids=())
    assert_equals_truth(logits, rule)
    assert keep(logits, torch.zeros(5, dtype=torch.long), rule).tail_logsum_PT[4, 0] == pytest.approx(-299.8, abs=1.5)


def test_a_vocabulary_padded_with_minus_infinity_keeps_none_of_the_padding():
    torch.manual_seed(0)
    logits = torch.randn(6, 12)
    logits[:, 8:] = -torch.inf
    assert_equals_truth(logits, TopK(k=3, min_prob=0.0, always_ids=(2, 9)))
    everything = keep(logits, torch.zeros(6, dtype=torch.long), TopK(k=12, min_prob=0.0, always_ids=()))
    assert everything.kept_counts_P.tolist() == [8] * 6
    assert np.isneginf(everything.tail_logsum_PT).all()


def test_control_tokens_outside_the_top_k_are_kept_when_asked_for():
    logits = torch.arange(20.0).repeat(2, 1)
    got = keep(logits, torch.tensor([0, 19]), TopK(k=3, min_prob=0.0, always_ids=(0, 19)))
    assert got.kept_ids_E.reshape(2, -1).tolist() == [[0, 17, 18, 19]] * 2


def test_an_always_kept_token_that_min_prob_would_drop_stays():
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    got = keep(logits, torch.tensor([0]), TopK(k=4, min_prob=0.5, always_ids=(2,)))
    assert got.kept_ids_E.tolist() == [0, 2]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_reported_with_their_position(poison: float):
    logits = torch.zeros(4, 6)
    logits[2, 5] = poison
    with pytest.raises(NonFiniteError, match="row 'a', token 3:"):
        keep(logits, torch.zeros(4, dtype=torch.long), TopK(k=2, min_prob=0.0, always_ids=()))


def test_a_realised_token_without_any_probability_is_reported():
    logits = torch.zeros(3, 6)
    logits[1, 4] = -torch.inf
    rule = TopK(k=2, min_prob=0.0, always_ids=())
    keep(logits, torch.tensor([0, 3, 0]), rule)
    with pytest.raises(NonFiniteError, match="row 'a', token 2: log p of the realised token is -inf"):
        keep(logits, torch.tensor([0, 4, 0]), rule)


def test_bfloat16_logits_lose_nothing_more_once_they_are_fp32():
    torch.manual_seed(1)
    assert_equals_truth((torch.randn(4, 33) * 8).bfloat16().float(), TopK(k=6, min_prob=0.0, always_ids=()))
