"""What each divergence is, over a few outcomes: bounds, symmetry, limits, and the gradients that LOSSES.md claims."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from student_train.divergences import NEVER, forward_kl, jsd, reverse_kl, skew_kl
from student_train.objective import Objective
from tests.student_train.references import lesson, true_divergence

B = 9
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": lambda p, q: jsd(p, q, 0.5),
    "jsd-0.2": lambda p, q: jsd(p, q, 0.2),
    "skew_kl": lambda p, q: skew_kl(p, q, 0.1),
}


def distributions(seed: int, num: int = 200) -> Tensor:
    return torch.log_softmax(torch.randn(num, B, generator=torch.Generator().manual_seed(seed)) * 4, dim=1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_between_equals_and_above_between_others(name: str):
    p, q = distributions(0), distributions(1)
    assert DIVERGENCES[name](p, p).abs().max() <= 1e-6
    assert DIVERGENCES[name](p, q).min() > 0


def test_jsd_at_a_half_is_symmetric_and_bounded():
    p, q = distributions(0), distributions(1)
    torch.testing.assert_close(jsd(p, q, 0.5), jsd(q, p, 0.5), rtol=1e-6, atol=1e-7)
    assert jsd(p, q, 0.5).max() < math.log(2)
    # One side's weight becomes the other's: jsd(p, q, β) = jsd(q, p, 1 − β).
    torch.testing.assert_close(jsd(p, q, 0.2), jsd(q, p, 0.8), rtol=1e-5, atol=1e-6)


def test_the_families_end_in_the_two_kls():
    p, q = torch.log_softmax(torch.randn(2, 50, B, generator=torch.Generator().manual_seed(7)).double(), dim=2)
    torch.testing.assert_close(jsd(p, q, 1e-6) / 1e-6, forward_kl(p, q), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(jsd(p, q, 1 - 1e-6) / 1e-6, reverse_kl(p, q), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(skew_kl(p, q, 1e-6), forward_kl(p, q), rtol=1e-3, atol=1e-5)


def test_skew_kl_is_bounded_where_forward_kl_is_not():
    p, q = distributions(0), distributions(1)
    q = torch.log_softmax(q * 30, dim=1)
    assert forward_kl(p, q).max() > 100
    assert skew_kl(p, q, 0.1).max() <= -math.log(0.1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_outcome_that_never_happens_on_either_side_changes_nothing(name: str):
    p, q = distributions(0), distributions(1)
    never = torch.full((len(p), 2), NEVER)
    padded = DIVERGENCES[name](torch.cat([p, never], dim=1), torch.cat([q, never], dim=1))
    torch.testing.assert_close(padded, DIVERGENCES[name](p, q), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "reverse_kl"])
def test_an_outcome_that_the_teacher_rules_out_has_a_value_and_a_gradient(name: str):
    """Not infinite, no NaN; where the student's own mass enters, it still does."""
    p = torch.cat([distributions(0), torch.full((200, 1), NEVER)], dim=1)
    z = torch.randn(200, B + 1, generator=torch.Generator().manual_seed(2), requires_grad=True)
    value = DIVERGENCES[name](p, torch.log_softmax(z, dim=1))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert (z.grad[:, -1] > 0).all(), "the student is taught to put no mass there"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_those_of_the_table(name: str):
    """∂D/∂z = Q (s − Σ Q s), with s = ∂D/∂Q in closed form."""
    log_p, z = distributions(3).double(), distributions(4).double().requires_grad_()
    q = torch.softmax(z, dim=1)
    DIVERGENCES[name](log_p, q.log()).sum().backward()
    p, q = log_p.exp(), q.detach()
    beta, alpha = 0.2 if name == "jsd-0.2" else 0.5, 0.1
    s = {
        "forward_kl": -p / q,
        "reverse_kl": (q / p).log(),
        "jsd": (1 - beta) * (q / (beta * p + (1 - beta) * q)).log(),
        "skew_kl": -(1 - alpha) * p / (alpha * p + (1 - alpha) * q),
    }[name.split("-")[0]]
    torch.testing.assert_close(z.grad, q * (s - (q * s).sum(dim=1, keepdim=True)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_over_kept_ids_and_tail_a_divergence_is_a_lower_bound_of_the_full_one(name: str):
    """Lumping outcomes together never adds: the more is kept the closer, and equal where everything is."""
    generator = torch.Generator().manual_seed(6)
    teacher, logits = torch.randn(2, 20, 53, generator=generator, dtype=torch.float64) * 3
    objective = Objective(kd_weight=1.0, divergence=name)  # type: ignore[arg-type]
    values = [true_divergence(logits, lesson(teacher, [k] * 20), objective) for k in (1, 4, 16, 53)]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-12).all()
    full = DIVERGENCES[name](torch.log_softmax(teacher, dim=1), torch.log_softmax(logits, dim=1))
    torch.testing.assert_close(values[-1], full, rtol=1e-9, atol=1e-12)
