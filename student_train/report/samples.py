"""The worst rows of an evaluation as coloured text, and what the page's script tells of each of their tokens.

A supervised token has a class for its KL to the teacher, k0 to k4, and one for its cross-entropy, h0 to h4; two radio
buttons choose between them without a script.  A row without a teacher has its cross-entropy for both.

The page holds MAX_TOKENS tokens of such rows: of a longer row the stretch that is worst.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from shared.page import escaped, escaped_token
from shared.token_text import visible
from student_train.evaluation import Row
from student_train.report.axes import short
from student_train.report.evals import Look

MAX_TOKENS = 12_000
LEAST_TOKENS = 120
"""Of a row, however many there are."""
KL_STEPS = (0.02, 0.1, 0.5, 2.0)
CE_STEPS = (0.1, 0.7, 2.3, 4.6)
"""Where the next colour begins, in nats; of the cross-entropy at a probability of 90, 50, 10 and 1 %."""
LISTED = 8
OPEN_ROWS = 5
"""Those of an evaluation that are not folded away."""
SHOWN_NAME = 40
"""Characters of a token's name in a list."""


@dataclass
class Samples:
    """The rows of all evaluations, as they are added; what tokens are called is spelled out once."""

    budget: int
    """Tokens of one row."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(looks: Sequence[Look]) -> "Samples":
        num_rows = sum(len(look.evaluation.worst) for look in looks if look.evaluation)
        return Samples(max(LEAST_TOKENS, MAX_TOKENS // max(num_rows, 1)))

    def section(self, look: Look) -> str:
        """The rows of one evaluation."""
        assert look.evaluation is not None
        rows = [self._row(row) for row in look.evaluation.worst]
        more = "\n".join(rows[OPEN_ROWS:])
        folded = f"<details><summary>{len(rows) - OPEN_ROWS} more rows</summary>\n{more}</details>" if more else ""
        return "\n".join([*rows[:OPEN_ROWS], folded])

    def data(self) -> dict[str, Any]:
        return {"names": list(self.names), "rows": self.rows}

    def _row(self, row: Row) -> str:
        number, (begin, end) = len(self.rows), worst_stretch(row, self.budget)
        chosen = [place for place, t in enumerate(row.supervised_P) if begin <= t < end]
        badness = row.ce_P if row.kl_P is None else row.kl_P
        listed = sorted(chosen, key=lambda place: -badness[place])[:LISTED]
        self.rows.append(self._told(row, chosen))
        facts = [row.source, f"{len(row.tokens):,} tokens", f"{len(row.supervised_P):,} supervised"]
        facts.append(f"mean cross-entropy {short(row.ce)}" + ("" if row.kl is None else f", KL {short(row.kl)} nats"))
        return (
            f'<section class="row" aria-label="row {number}">\n<h3>{escaped(row.sample_id)}</h3>\n'
            f'<p class="facts">{escaped(" · ".join(facts))}</p>\n{_worst_tokens(row, listed, number)}'
            f'<div class="text" dir="auto">{_left_out(begin)}{_text(row, begin, end, number, listed)}'
            f"{_left_out(len(row.tokens) - end)}</div>\n</section>"
        )

    def _told(self, row: Row, chosen: Sequence[int]) -> dict[str, Any]:
        def numbers(values: Sequence[float] | None) -> list[float] | None:
            return None if values is None else [float(f"{values[place]:.3g}") for place in chosen]

        def tops(pairs: Sequence[tuple[str, float]] | None) -> dict[str, Any] | None:
            if pairs is None:
                return None
            return {
                "name": [self._name(pairs[place][0]) for place in chosen],
                "p": numbers([p for _, p in pairs]),
            }

        return {
            "supervised": [row.supervised_P[place] for place in chosen],
            "ce": numbers(row.ce_P),
            "kl": numbers(row.kl_P),
            "realised": numbers(row.realised_P),
            "teacher": tops(row.teacher_top_P),
            "student": tops(row.student_top_P),
        }

    def _name(self, name: str) -> int:
        return self.names.setdefault(visible(name), len(self.names))


def worst_stretch(row: Row, budget: int) -> tuple[int, int]:
    """Where the tokens begin and end that are shown: all, or so many neighbours with the largest sum."""
    length = len(row.tokens)
    if length <= budget:
        return 0, length
    value_L = np.zeros(length)
    value_L[row.supervised_P] = row.ce_P if row.kl_P is None else row.kl_P
    sums = np.cumsum(np.concatenate([[0.0], np.maximum(value_L, 0.0)]))
    begin = int(np.argmax(sums[budget:] - sums[:-budget]))
    return begin, begin + budget


def legend(*, has_teacher: bool) -> str:
    """What the colours mean; with a switch where there are two measures."""
    if not has_teacher:
        return f'<p class="legend">Cross-entropy in nats: {_steps(CE_STEPS)}</p>\n'
    return (
        '<input type="radio" name="by" id="by-kl" checked><label for="by-kl">KL to the teacher</label>\n'
        '<input type="radio" name="by" id="by-ce"><label for="by-ce">cross-entropy</label>\n'
        f'<p class="legend kl">KL in nats: {_steps(KL_STEPS)}</p>\n'
        f'<p class="legend ce">Cross-entropy in nats: {_steps(CE_STEPS)}</p>\n'
    )


def _steps(steps: Sequence[float]) -> str:
    labels = [f"< {steps[0]}", *(f"{low:g}–{high:g}" for low, high in pairwise(steps)), f"≥ {steps[-1]:g}"]
    spans = " ".join(f'<span class="s{step}">{escaped(label)}</span>' for step, label in enumerate(labels))
    return f'{spans} <span class="o">not supervised</span>'


def _text(row: Row, begin: int, end: int, number: int, listed: Sequence[int]) -> str:
    """One span for each supervised token, in order: the script knows them by their place."""
    place_of = {t: place for place, t in enumerate(row.supervised_P)}
    linked, parts = set(listed), []
    for t in range(begin, end):
        place, part = place_of.get(t), escaped_token(row.tokens[t])
        if place is None:
            parts.append(part)
            continue
        by_ce = bisect_right(CE_STEPS, row.ce_P[place])
        by_kl = by_ce if row.kl_P is None else bisect_right(KL_STEPS, row.kl_P[place])
        classes = f"k{by_kl} h{by_ce}" + " e" * (not part)
        target = f' id="r{number}t{t}"' if place in linked else ""
        parts.append(f'<span class="{classes}"{target}>{part}</span>')
    return "".join(parts)


def _worst_tokens(row: Row, listed: Sequence[int], number: int) -> str:
    items = []
    for place in listed:
        t, tops = row.supervised_P[place], [f"student {_top(row.student_top_P[place])}"]
        if row.teacher_top_P is not None:
            tops.insert(0, f"teacher {_top(row.teacher_top_P[place])}")
        value = row.ce_P[place] if row.kl_P is None else row.kl_P[place]
        items.append(
            f'<li><a href="#r{number}t{t}"><code>{escaped(_quoted(row.tokens[t]))}</code></a> {short(value)} '
            f"<small>{escaped(', '.join(tops))}</small></li>"
        )
    measure = "cross-entropy" if row.kl_P is None else "KL"
    if not items:
        return ""
    title = f"Tokens of highest {measure}"
    return f'<details class="worst"><summary>{title}</summary>\n<ol>{"".join(items)}</ol></details>\n'


def _top(pair: tuple[str, float]) -> str:
    name, p = pair
    return f"{_quoted(name)} {short(p, 2)}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= SHOWN_NAME else text[:SHOWN_NAME] + "…")


def _left_out(count: int) -> str:
    return f"<i>… {count:,} tokens …</i>" if count else ""
