"""Which replies are not trained on, and why: the first reason that holds, in the order in which they stand here."""

from collections.abc import Sequence

from student_train.eval.generation import Reply
from student_train.rollout.config import KeepSettings

RUN = 4
"""Tokens of what may be repeated."""


def why_dropped(reply: Reply, right: bool | None, keep: KeepSettings, *, num_ids: int) -> str | None:
    """The reason; None for what is kept.  The tokenizer knows ids below `num_ids`."""
    if not reply.text.strip():
        return "empty"
    if max(reply.ids) >= num_ids:  # of the padding behind the vocabulary, which another model need not have
        return "unknown_token"
    if reply.is_cut and not keep.truncated:
        return "truncated"
    if keep.nll is not None and reply.nll is not None:
        low, high = keep.nll
        if low is not None and reply.nll < low:
            return "nll_low"
        if high is not None and reply.nll > high:
            return "nll_high"
    if keep.repetition is not None and repetition(reply.ids) > keep.repetition:
        return "repetition"
    return "wrong" if right is False and not keep.wrong else None


def repetition(ids: Sequence[int]) -> float:
    """The share of all runs of four tokens that stand in the reply before."""
    runs = [tuple(ids[begin : begin + RUN]) for begin in range(len(ids) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
