"""Rows as the trainer will see them: every token, which are supervised, and how much each surprised the teacher.

On a terminal supervised text is bold: green, or where a teacher has spoken coloured by its surprise, −log p of the
token that came, from calm blue to hot red.  Its control tokens are underlined, other control tokens are cyan.
Elsewhere supervised text stands between ⟦ and ⟧.  A line feed shows as ⏎.  Either way the most surprising positions
are listed, and `--at` shows all that the teacher said at one of them.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from rich.table import Column, Table
from rich.text import Text
from tokenizers import Tokenizer

from shared.rows import Row
from shared.spoken import Said, Spoken, require_spoken
from shared.token_text import TokenText, visible

SUPERVISED, OTHER, OTHER_CONTROL = "bold green", "dim", "cyan"
SURPRISE_STEPS = (0.1, 0.7, 2.3, 4.6)
"""Where the next colour begins, in nats: at a probability of 90, 50, 10 and 1 %."""
SURPRISE_STYLES = (  # of the fixed 256 colours, and of a lightness that can be read on black and on white
    "bold color(32)",
    "bold color(28)",
    "bold color(136)",
    "bold color(166)",
    "bold color(231) on color(160)",
)
SHOWN_KEPT = 3
SHOWN_SURPRISES = 5
SHOWN_BEFORE = 60
"""Characters of what precedes a token."""
BAR_CELLS = 24


def surprise_step(surprise: float) -> int:
    """0 (calm) to 4 (hot)."""
    return bisect_right(SURPRISE_STEPS, surprise)


def surprise_labels() -> list[str]:
    """The five steps in nats."""
    between = [f"{begin}–{end}" for begin, end in pairwise(SURPRISE_STEPS)]
    return [f"< {SURPRISE_STEPS[0]}", *between, f"≥ {SURPRISE_STEPS[-1]}"]


class Inspector:
    """Shows rows with the tokenizer that made them; `temperatures` are those a dataset declares."""

    def __init__(self, tokenizer: Tokenizer, temperatures: Sequence[float] = ()) -> None:
        self.tokens = TokenText(tokenizer)
        self.temperatures = list(temperatures)

    def heading(self, row: Row, where: str) -> str:
        share = row.num_positions / max(row.num_tokens, 1)
        counts = f"{row.num_tokens:,} tokens, {row.num_positions:,} supervised ({share:.0%})"
        return visible(f"{where}  id {row.sample_id}: {counts}")

    def lines(
        self, row: Row, where: str, *, plain: bool, tokens: bool, at: int | None = None
    ) -> Iterator[Text | Table]:
        """The row for people, `plain` without colours; with `tokens` one line for each token.

        With `at` instead all that the teacher said about token number `at`; raises ConfigError where it said nothing.
        """
        if at is not None:
            said = require_spoken(row, where).at(at, where)
            yield Text(self.heading(row, where))
            yield from self._at(row, said)
            return
        spoken = Spoken.of(row)
        yield Text(self.heading(row, where))
        if spoken is not None and spoken.said_P:
            yield _legend(spoken, plain=plain)
        yield self._table(row, spoken) if tokens else self._text(row, spoken, plain=plain)
        if spoken is not None and spoken.said_P:
            yield Text("most surprising (--at T shows all of one)", style="bold")
            yield self._surprises(spoken)

    def _at(self, row: Row, said: Said) -> Iterator[Text | Table]:
        parts = [visible(part) for part in self.tokens.of_row(row.input_ids_L[: said.t].tolist())]
        before = "".join(parts).replace("\n", "⏎")
        told = f"…{before[-SHOWN_BEFORE:]}" if len(before) > SHOWN_BEFORE else before
        yield Text().append(told, OTHER).append(f" ⟦{self.tokens.quoted(said.token)}⟧", _style(said))
        p = "weight" if said.is_weighted else "p"
        table = Table("", "id", Column("token", overflow="fold"), p, f"log {p}", "", box=None, pad_edge=False)
        for rank, (token, logp) in enumerate(said.kept()):
            name, mass = Text(self.tokens.quoted(token)), math.exp(logp)
            cells = [str(token), name, f"{mass:.4g}", f"{logp:.3f}", Text(_bar(mass))]
            here = rank == said.rank
            table.add_row("▶" if here else "", *cells, style="bold" if here else "")
        yield table
        yield from (Text(line) for line in self._rest(said))

    def as_json(self, row: Row, where: str, *, tokens: bool, at: int | None = None) -> dict[str, Any]:
        """The row for programs: `text` is a list of [supervised?, text]."""
        spoken = Spoken.of(row) if at is None else require_spoken(row, where)
        parts = zip(row.label_mask_L.tolist(), self.tokens.of_row(row.input_ids_L.tolist()), strict=True)
        runs = groupby(parts, key=lambda part: part[0])
        tree: dict[str, Any] = {
            "sample_id": row.sample_id,
            "where": where,
            "tokens": row.num_tokens,
            "positions": row.num_positions,
            "text": [[mark, "".join(text for _, text in run)] for mark, run in runs],
        }
        if spoken is not None and spoken.said_P:
            tree |= {"mean_surprise": spoken.mean_surprise, "perplexity": spoken.perplexity}
            tree["most_surprising"] = [self._json(said, kept=1) for said in spoken.most_surprising(SHOWN_SURPRISES)]
        if tokens:
            tree |= {"input_ids": row.input_ids_L.tolist(), "label_mask": row.label_mask_L.tolist()}
            if spoken is not None:
                tree["teacher"] = [self._json(said, kept=None) for said in spoken.said_P]
        if at is not None and spoken is not None:
            tree["at"] = self._json(spoken.at(at, where), kept=None)
        return tree

    def _json(self, said: Said, *, kept: int | None) -> dict[str, Any]:
        return {
            "t": said.t,
            "token": [said.token, self.tokens.name(said.token)],
            "realised_logprob": said.realised_logp,
            "realised_rank": said.rank,
            "entropy": said.entropy,
            "tail_logsum": said.tail_logsum_T.tolist(),
            "kept_are": "log weights" if said.is_weighted else "log probabilities",
            "kept": [[token, self.tokens.name(token), logp] for token, logp in said.kept(kept)],
        }

    def _text(self, row: Row, spoken: Spoken | None, *, plain: bool) -> Text:
        text = Text()
        ids, marks = row.input_ids_L.tolist(), row.label_mask_L.tolist()
        parts = self.tokens.of_row(ids)
        styles = [""] * len(ids) if plain else self._styles(row, spoken, parts)
        for (mark, style), run in groupby(zip(marks, styles, parts, strict=True), key=lambda token: token[:2]):
            shown = visible("".join(part for _, _, part in run)).replace("\n", "⏎\n")
            text.append(f"⟦{shown}⟧" if plain and mark else shown, style=style)
        if text.plain.endswith("\n"):
            text.right_crop(1)
        return text

    def _styles(self, row: Row, spoken: Spoken | None, parts: list[str]) -> list[str]:
        """One for each token; of the tokens of one character the most surprising counts, since it is shown once."""
        styles = []
        surprise_at = {said.t: said.surprise for said in spoken.said_P} if spoken else {}
        hottest = 0.0
        for t, (token, mark) in enumerate(zip(row.input_ids_L.tolist(), row.label_mask_L.tolist(), strict=True)):
            hottest = max(hottest, surprise_at.get(t, 0.0))
            style = SURPRISE_STYLES[surprise_step(hottest)] if spoken else SUPERVISED
            if parts[t]:
                hottest = 0.0
            if token in self.tokens.control_ids:
                styles.append(f"{style} underline" if mark else OTHER_CONTROL)
            else:
                styles.append(style if mark else OTHER)
        return styles

    def _table(self, row: Row, spoken: Spoken | None) -> Table:
        table = Table("t", "id", Column("token", overflow="fold"), "supervised", box=None, pad_edge=False)
        if spoken is not None:
            for name in ("log p", "entropy", "Σ weight" if spoken.is_weighted else "tail"):
                table.add_column(name)
            table.add_column(f"{SHOWN_KEPT} most probable kept", overflow="fold")
        said_at = {said.t: said for said in spoken.said_P} if spoken else {}
        for t, (token, mark) in enumerate(zip(row.input_ids_L.tolist(), row.label_mask_L.tolist(), strict=True)):
            cells: list[str | Text] = [str(t), str(token), Text(self.tokens.quoted(token)), "●" if mark else ""]
            style = SUPERVISED if mark else OTHER
            if (said := said_at.get(t)) is not None:
                style = _style(said)
                kept = "  ".join(f"{self.tokens.quoted(i)} {math.exp(logp):.3f}" for i, logp in said.kept(SHOWN_KEPT))
                rest = _weight_sum(said) if said.is_weighted else math.exp(said.tail_logsum_T[0])
                cells += [f"{said.realised_logp:.3f}", f"{said.entropy:.3f}", f"{rest:.2g}", Text(kept)]
            table.add_row(*cells, style=style)
        return table

    def _surprises(self, spoken: Spoken) -> Table:
        table = Table("t", Column("token", overflow="fold"), "log p", "most probable instead", box=None, pad_edge=False)
        for said in spoken.most_surprising(SHOWN_SURPRISES):
            other = said.instead()
            instead = f"{self.tokens.quoted(other[0])} {math.exp(other[1]):.3g}" if other else ""
            token = Text(self.tokens.quoted(said.token), style=_style(said))
            table.add_row(str(said.t), token, f"{said.realised_logp:.3f}", Text(instead))
        return table

    def _rest(self, said: Said) -> Iterator[str]:
        """What is known of a position beside the kept."""
        if said.is_weighted:
            yield f"no tail: the kept are a sample, unbiased, of the whole; Σ weight = {_weight_sum(said):.4f}"
        else:
            yield f"tail      mass {math.exp(said.tail_logsum_T[0]):.4g} on the ids that are not kept"
            for temperature, logsum in zip(self.temperatures, said.tail_logsum_T.tolist(), strict=True):
                yield f"          log Σ p^(1/T) = {logsum:.3f} at T = {temperature:g}"
        yield f"entropy   {said.entropy:.3f} nats"
        line = f"realised  {said.token} {self.tokens.quoted(said.token)}  p {math.exp(said.realised_logp):.4g}"
        line += f", log p {said.realised_logp:.3f}: "
        if said.rank is not None:
            yield line + f"number {said.rank + 1} of the {len(said.kept_ids_K)} kept"
        else:
            yield line + ("not kept" if said.is_weighted else "not kept, part of the tail")


def _legend(spoken: Spoken, *, plain: bool) -> Text:
    legend = Text(f"surprise: mean {spoken.mean_surprise:.3f} nats (perplexity {spoken.perplexity:.4g})")
    if not plain:
        legend.append("; nats ")
        for label, style in zip(surprise_labels(), SURPRISE_STYLES, strict=True):
            legend.append(f" {label} ", style=style)
    return legend


def _style(said: Said) -> str:
    return SURPRISE_STYLES[surprise_step(said.surprise)]


def _weight_sum(said: Said) -> float:
    return float(np.exp(said.kept_logp_K, dtype=np.float64).sum())


def _bar(share: float) -> str:
    """Of eighths of a cell; never empty, for what is kept is more than nothing."""
    eighths = max(1, round(min(share, 1.0) * BAR_CELLS * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
