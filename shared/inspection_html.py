"""`inspect --html`: rows as one page that needs nothing else, see `shared.page`.

The page stays small: each distinct token is spelled out once, the most frequent with the lowest numbers, and
log-probabilities are whole thousandths of a nat.  Above MAX_KEPT the least probable of every position are left out,
and the page says so.

Shapes: L tokens of a row, P positions of a row, K kept of one position, U distinct tokens of the page.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared import page
from shared.errors import ConfigError
from shared.inspection import Inspector, surprise_labels, surprise_step
from shared.page import escaped, escaped_token
from shared.rows import Int32, Row
from shared.spoken import Said, Spoken
from shared.token_text import visible

MAX_TOKENS = 100_000
MAX_KEPT = 512_000
LISTED_SURPRISES = 10

STYLE = page.STYLE + Path(__file__).with_name("inspection_page.css").read_text(encoding="utf-8")
SCRIPT = page.SCRIPT + Path(__file__).with_name("inspection_page.js").read_text(encoding="utf-8")


def html_page(inspector: Inspector, shown: Sequence[tuple[Row, str]], *, title: str) -> str:
    """The rows, each with its place, as one page.

    Raises:
        ConfigError: more tokens than a browser shows with ease.
    """
    num_tokens = sum(row.num_tokens for row, _ in shown)
    if num_tokens > MAX_TOKENS:
        raise ConfigError(
            f"{len(shown)} rows with {num_tokens:,} tokens are too many for one page, which holds {MAX_TOKENS:,}",
            next_step="choose fewer with --row, --count or --id, or see them with --tokens",
        )
    spoken_rows = [(row, where, Spoken.of(row)) for row, where in shown]
    num_kept = _kept_that_fit([spoken for *_, spoken in spoken_rows])
    ids_U = _distinct([_ids_of(row, spoken, num_kept) for row, _, spoken in spoken_rows])
    number_of = {token: number for number, token in enumerate(ids_U)}
    data = {
        "temperatures": inspector.temperatures,
        "ids": ids_U,
        "names": [visible(inspector.tokens.name(token)) for token in ids_U],
        "rows": [_row_data(row, spoken, num_kept, number_of) for row, _, spoken in spoken_rows],
    }
    parts = [_section(inspector, row, where, spoken, n) for n, (row, where, spoken) in enumerate(spoken_rows)]
    if num_kept is not None:
        note = f"Too much for one page: of each position the {num_kept} most probable of the kept are shown."
        parts.insert(0, f'<p class="note">{note}  <code>--at T</code> shows all of one.</p>')
    legend = _legend(any(spoken is not None for *_, spoken in spoken_rows))
    rows = "\n".join(parts)
    body = (
        f"<header>\n<h1>{escaped(title)}</h1>\n{legend}\n</header>\n"
        f'<div class="columns">\n<main>\n{rows}\n</main>\n<aside id="panel" aria-live="polite" hidden></aside>\n</div>'
    )
    return page.html_document(title=title, body=body, data=data, style=STYLE, script=SCRIPT)


def _kept_that_fit(all_spoken: Sequence[Spoken | None]) -> int | None:
    """How many of the kept of a position the page has room for; None for all of them."""
    said = [said for spoken in all_spoken if spoken is not None for said in spoken.said_P]
    if sum(len(each.kept_ids_K) for each in said) <= MAX_KEPT:
        return None
    return max(1, MAX_KEPT // len(said))


def _ids_of(row: Row, spoken: Spoken | None, num_kept: int | None) -> Int32:
    """Ids of the row's tokens and of the kept that are shown."""
    kept = [said.kept_ids_K[:num_kept] for said in spoken.said_P] if spoken is not None else []
    return np.concatenate([row.input_ids_L, *kept])


def _distinct(ids: Sequence[Int32]) -> list[int]:
    """The most frequent first: they get the shortest numbers."""
    ids_U, count_U = np.unique(np.concatenate(ids), return_counts=True)
    return ids_U[np.argsort(-count_U, kind="stable")].tolist()


def _row_data(row: Row, spoken: Spoken | None, num_kept: int | None, number_of: dict[int, int]) -> dict[str, Any]:
    """What the page's script knows of a row; all kept entries of its positions lie one after the other."""
    tree: dict[str, Any] = {
        "tokens": [number_of[token] for token in row.input_ids_L.tolist()],
        "supervised": (row.source_index_P + 1).tolist(),
        "teacher": None,
    }
    if spoken is not None:
        kept_P = [said.kept(num_kept) for said in spoken.said_P]
        tree["teacher"] = {
            "weighted": spoken.is_weighted,
            "realised": [_thousandths(said.realised_logp) for said in spoken.said_P],
            "entropy": [_thousandths(said.entropy) for said in spoken.said_P],
            "tail": [[_thousandths(logsum) for logsum in said.tail_logsum_T.tolist()] for said in spoken.said_P],
            "counts": [len(kept) for kept in kept_P],
            "all": [len(said.kept_ids_K) for said in spoken.said_P],
            "kept": [number_of[token] for kept in kept_P for token, _ in kept],
            "logp": [_thousandths(logp) for kept in kept_P for _, logp in kept],
        }
    return tree


def _thousandths(nats: float) -> int | None:
    """None for −inf: an empty tail."""
    return round(nats * 1000) if math.isfinite(nats) else None


def _legend(has_teacher: bool) -> str:
    if not has_teacher:
        return '<p class="legend"><span class="y">supervised</span> <span class="o">not supervised</span></p>'
    steps = " ".join(f'<span class="s{step}">{escaped(label)}</span>' for step, label in enumerate(surprise_labels()))
    note = "Surprise of the teacher, −log p of the token that came, in nats:"
    return f'<p class="legend">{note} {steps} <span class="o">not supervised</span></p>'


def _section(inspector: Inspector, row: Row, where: str, spoken: Spoken | None, number: int) -> str:
    """A row as coloured text, which can be read without the script."""
    facts = [where, f"{row.num_tokens:,} tokens", f"{row.num_positions:,} supervised"]
    listed: list[Said] = []
    if spoken is not None and spoken.said_P:
        facts += [f"mean surprise {spoken.mean_surprise:.3f} nats", f"perplexity {spoken.perplexity:.4g}"]
        listed = spoken.most_surprising(LISTED_SURPRISES)
    return (
        f'<section class="row" aria-label="row {number}">\n<h2>{escaped(row.sample_id)}</h2>\n'
        f'<p class="facts">{escaped(" · ".join(fact for fact in facts if fact))}</p>\n'
        f"{_surprises(inspector, listed, number)}"
        f'<div class="text" dir="auto">{_text(inspector, row, spoken, number, {said.t for said in listed})}</div>\n'
        "</section>"
    )


def _text(inspector: Inspector, row: Row, spoken: Spoken | None, number: int, targets: set[int]) -> str:
    """One span for each token, in order: the script knows them by their place."""
    said_at = {said.t: said for said in spoken.said_P} if spoken is not None else {}
    ids, marks = row.input_ids_L.tolist(), row.label_mask_L.tolist()
    spans = []
    for t, (token, mark, part) in enumerate(zip(ids, marks, inspector.tokens.of_row(ids), strict=True)):
        said = said_at.get(t)
        classes = ([f"s{surprise_step(said.surprise)}"] if said else ["y"]) if mark else []
        classes += ["c"] * (token in inspector.tokens.control_ids) + ["e"] * (not part)
        attributes = f' class="{" ".join(classes)}"' if classes else ""
        attributes += f' id="r{number}t{t}"' if t in targets else ""
        attributes += f' title="{escaped(_tooltip(inspector, said))}"' if said else ""
        spans.append(f"<span{attributes}>{escaped_token(part)}</span>")
    return "".join(spans)


def _tooltip(inspector: Inspector, said: Said) -> str:
    tip = f"t {said.t} · {inspector.tokens.quoted(said.token)} p {math.exp(said.realised_logp):.3g}"
    return f"{tip} · {_instead(inspector, said)}"


def _instead(inspector: Inspector, said: Said) -> str:
    other = said.instead()
    return f"instead {inspector.tokens.quoted(other[0])} {math.exp(other[1]):.3g}" if other else "no other kept"


def _surprises(inspector: Inspector, listed: Sequence[Said], number: int) -> str:
    items = [
        f'<li><a href="#r{number}t{said.t}"><code>{escaped(inspector.tokens.quoted(said.token))}</code></a> '
        f'<span class="s{surprise_step(said.surprise)}">{said.surprise:.2f}</span> '
        f"<small>t {said.t}, {escaped(_instead(inspector, said))}</small></li>"
        for said in listed
    ]
    if not items:
        return ""
    return f'<details class="worst" open><summary>Most surprising</summary>\n<ol>{"".join(items)}</ol></details>\n'
