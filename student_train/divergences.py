"""Divergences of a teacher p and a student q over a few outcomes: small functions on [n, B] log-probabilities.

Shapes: n positions, B outcomes (kept ids and, where there is one, the tail).  Each returns nats [n].
Both sides are given as logs and stay logs: at log q = −40 a probability has nothing left to take a gradient of.
What these are bounds or estimates of, and their gradients, stand in `LOSSES.md` beside this file.

An outcome of probability 0 is given as `NEVER`, a log that is finite: 0 · (−inf + inf) is NaN, and masking a product
afterwards would not keep it out of the gradient.
"""

import math

import torch
from torch import Tensor

NEVER = -1e4
"""exp of it is 0 in fp32, and so is its product with anything that such a log can be beside."""


def forward_kl(log_p_nB: Tensor, log_q_nB: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p log(p / q)."""
    return (log_p_nB.exp() * (log_p_nB - log_q_nB)).sum(dim=1)


def reverse_kl(log_p_nB: Tensor, log_q_nB: Tensor) -> Tensor:
    """KL(q ‖ p).  Infinite where p is 0 and q is not: the caller refuses that (`collate._require_tails`)."""
    return forward_kl(log_q_nB, log_p_nB)


def jsd(log_p_nB: Tensor, log_q_nB: Tensor, beta: float) -> Tensor:
    """β KL(p ‖ m) + (1−β) KL(q ‖ m) with m = βp + (1−β)q, 0 < β < 1 (Agarwal et al., GKD, arXiv 2306.13649)."""
    log_m_nB = _mixed(log_p_nB, log_q_nB, beta)
    return beta * forward_kl(log_p_nB, log_m_nB) + (1 - beta) * forward_kl(log_q_nB, log_m_nB)


def skew_kl(log_p_nB: Tensor, log_q_nB: Tensor, alpha: float) -> Tensor:
    """KL(p ‖ αp + (1−α)q), 0 < α < 1 (Ko et al., DistiLLM, arXiv 2402.03898)."""
    return forward_kl(log_p_nB, _mixed(log_p_nB, log_q_nB, alpha))


def _mixed(log_p_nB: Tensor, log_q_nB: Tensor, share: float) -> Tensor:
    """log(share · p + (1 − share) · q)."""
    return torch.logaddexp(log_p_nB + math.log(share), log_q_nB + math.log1p(-share))
