"""Lists of ids with log-probabilities to positions of ours, and what has to be made up for what such lists leave out.

A position of ours holds the exact mass of what is not kept, the realised token's log p and the exact entropy.  Lists
hold none of these, so the rest is taken as *one more outcome*:

    tail      log(1 − Σ p); the difference of rounded numbers, so nothing below `LEAST_LEFT` is told apart
    realised  its own log p where it is in the list, else that of all the rest: no more than that
    entropy   of the kept ids and the rest as one outcome: no less than that

Lists that were renormalised add up to one and have no rest: their tail is *unknown*, and is stored as `LEAST_LEFT`.
Nothing of this is exact, so T = 1 alone is declared, and the manifest says it.

Shapes: P positions, E entries of all of them.
"""

from collections import Counter
from typing import Any

import numpy as np

from shared.exchange.lists import Aligned, ForeignRow
from shared.rows import Int32, Positions
from shared.schema import LOGP_TOLERANCE

LEAST_LEFT = 2.0**-24
"""What fp32 can tell of a difference from 1."""
SLACK = 5e-4
"""By which a list may add up to more than one and is taken as it is; readers allow no more than 1e-3."""
MOST = 1.2
"""What a list may add up to, as where it was rounded; those in between are scaled down to one."""
ADDS_TO_ONE = 1e-5


def wrong_lists(row: ForeignRow) -> dict[int, str]:
    """Indices of the lists that cannot be log-probabilities over a whole vocabulary, and why."""
    list_E, logp_E = np.repeat(np.arange(len(row.counts_L)), row.counts_L), row.logp_E.astype(np.float64)
    top_L = np.full(len(row.counts_L), -np.inf)
    np.maximum.at(top_L, list_E, logp_E)
    sum_L = np.bincount(list_E, np.exp(np.minimum(logp_E, 1.0)), len(row.counts_L))
    indices = np.flatnonzero((sum_L > MOST) | (top_L > LOGP_TOLERANCE))
    return {int(at): f"adds up to {sum_L[at]:.4g}, its largest log p is {top_L[at]:.4g}" for at in indices}


def positions_of(
    aligned: Aligned, label_ids_P: Int32, *, vocab_size: int, has_tail: bool
) -> tuple[Positions, Counter[str]]:
    """The positions of lists that `wrong_lists` has nothing against, and how many of them had to be put right."""
    counts_P, logp_E = aligned.counts_P, aligned.logp_E.astype(np.float64)
    num_positions = len(counts_P)
    position_E = np.repeat(np.arange(num_positions), counts_P)
    sum_P = np.bincount(position_E, np.exp(logp_E), num_positions)
    is_scaled_P = sum_P > 1 + SLACK if has_tail else np.ones(num_positions, dtype=np.bool_)
    scale_P = np.where(is_scaled_P, sum_P, 1.0)
    logp_E, sum_P = logp_E - np.log(scale_P)[position_E], sum_P / scale_P
    left_P = np.where(counts_P < vocab_size, np.maximum(1 - sum_P, LEAST_LEFT), 0.0)
    with np.errstate(divide="ignore"):
        tail_P = np.log(left_P).astype(np.float32)
    stored_E = logp_E.astype(np.float32)
    is_label_E = aligned.ids_E == label_ids_P[position_E]
    realised_P = tail_P.copy()
    realised_P[position_E[is_label_E]] = stored_E[is_label_E]
    entropy_P = np.bincount(position_E, -np.exp(logp_E) * logp_E, num_positions)
    entropy_P -= left_P * np.log(np.where(left_P > 0, left_P, 1.0))
    is_clipped_P = left_P == LEAST_LEFT
    teacher = Positions(
        kept_counts_P=counts_P,
        kept_ids_E=aligned.ids_E,
        kept_logp_E=stored_E,
        realised_logp_P=realised_P,
        entropy_P=np.maximum(entropy_P, 0.0).astype(np.float32),
        tail_logsum_PT=tail_P[:, None],
    )
    put_right: dict[str, Any] = {
        "realised_token_not_in_list": num_positions - int(is_label_E.sum()),
        "lists_that_add_up_to_one": int((np.abs(1 - sum_P) <= ADDS_TO_ONE).sum()) if has_tail else num_positions,
    }
    if has_tail:
        put_right |= {"tails_clipped": int(is_clipped_P.sum()), "lists_scaled_down": int(is_scaled_P.sum())}
    return teacher, Counter(put_right)
