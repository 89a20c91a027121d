"""Rows as the trainer will see them: every token, which are supervised, and how much each surprised the teacher.

On a terminal supervised text is bold: green, or where a teacher has spoken coloured by its surprise, −log p of the
token that came, from calm blue to hot red.  Its control tokens are underlined, other control tokens are cyan.
Elsewhere supervised text stands between ⟦ and ⟧.  A line feed shows as ⏎.  Either way the most surprising positions
are listed, and `--at` shows all that the teacher said at one of them.

Shapes: L tokens of a row, P positions, K kept of one position, T declared temperatures.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from rich.table import Column, Table
from rich.text import Text
from tokenizers import Tokenizer

from shared.errors import ConfigError
from shared.rows import Float32, Int32, LogitRow, Row

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
LONGEST_GROUP = 32
"""Tokens that are tried together for one character, so that bytes which never become one cost no quadratic time."""

_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Control characters as pictures of them, for a row must not command the terminal or the page that shows it."""
    return text.translate(_PICTURES)


def surprise_step(surprise: float) -> int:
    """0 (calm) to 4 (hot)."""
    return bisect_right(SURPRISE_STEPS, surprise)


def surprise_labels() -> list[str]:
    """The five steps in nats."""
    between = [f"{begin}–{end}" for begin, end in pairwise(SURPRISE_STEPS)]
    return [f"< {SURPRISE_STEPS[0]}", *between, f"≥ {SURPRISE_STEPS[-1]}"]


class TokenText:
    """What tokens say, each alone and where it stands in a row."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = _byte_alphabet()
        self.control_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def name(self, token: int) -> str:
        """The token alone; the bytes of one that is only part of a character stand as `\\xf0\\x9f`."""
        if (data := self._part(token)) is not None:
            return data.decode("utf-8", "backslashreplace")
        if (piece := self._tokenizer.id_to_token(token)) is None:
            return "<no token>"  # padding of the teacher's vocabulary
        text = self.decode([token])
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text  # decoders strip the first

    def quoted(self, token: int) -> str:
        """The token alone as a Python string, so that spaces and line feeds can be seen."""
        return repr(self.name(token)) if (data := self._part(token)) is None else repr(data)[1:]

    def of_row(self, ids: Sequence[int]) -> list[str]:
        """The row's text in as many parts as it has tokens; the parts joined are the decoded row.

        Tokens that are parts of one character are empty but for the last, which holds what they say together.  Each
        is decoded behind the tokens before it, since decoders treat the beginning of a text in their own way; of
        these only the last whole group is needed, so that the time is linear.
        """
        parts = [""] * len(ids)
        before, begin, told = 0, 0, ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[before:end])
            if text.endswith("\ufffd") and end < len(ids) and end - begin < LONGEST_GROUP:
                continue
            parts[end - 1] = text[len(told) :]
            before, begin = begin, end
            told = self.decode(ids[before:end])
        return parts

    def _part(self, token: int) -> bytes | None:
        """The bytes of a token that is no whole text, in either byte-level family of tokenizers."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or "\ufffd" not in self.decode([token]):
            return None
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        if all(character in self._bytes for character in piece):
            return bytes(self._bytes[character] for character in piece)
        return None


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with (GPT-2's `bytes_to_unicode`, backwards)."""
    as_they_are = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in as_they_are]
    return {chr(byte): byte for byte in as_they_are} | {chr(256 + n): byte for n, byte in enumerate(others)}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the teacher said at the position of token t, the most probable ids first."""

    t: int
    token: int
    realised_logp: float
    entropy: float
    kept_ids_K: Int32
    kept_logp_K: Float32
    tail_logsum_T: Float32

    @property
    def is_weighted(self) -> bool:
        """A threshold sample: the kept carry log weights, unbiased for p, and nothing is known of the rest."""
        return not len(self.tail_logsum_T)

    @property
    def surprise(self) -> float:
        return max(0.0, -self.realised_logp)

    @property
    def rank(self) -> int | None:
        """Of the realised token among the kept, from 0."""
        found = np.flatnonzero(self.kept_ids_K == self.token)
        return int(found[0]) if len(found) else None

    def instead(self) -> tuple[int, float] | None:
        """The most probable other token with its log p (or log weight)."""
        return next((pair for pair in self.kept(2) if pair[0] != self.token), None)

    def kept(self, count: int | None = None) -> list[tuple[int, float]]:
        """The first so many, or all: ids with their log p (or log weight)."""
        return list(zip(self.kept_ids_K[:count].tolist(), self.kept_logp_K[:count].tolist(), strict=True))


@dataclass(frozen=True)
class Spoken:
    """All that the teacher said about one row."""

    said_P: list[Said]

    @staticmethod
    def of(row: Row) -> "Spoken | None":
        """None for a row of text."""
        if not isinstance(row, LogitRow):
            return None
        said_P = []
        only_P = row.teacher.split([1] * row.num_positions)
        for t, token, only in zip((row.source_index_P + 1).tolist(), row.label_ids_P.tolist(), only_P, strict=True):
            order_K = np.argsort(-only.kept_logp_E, kind="stable")
            said = Said(
                t=t,
                token=token,
                realised_logp=float(only.realised_logp_P[0]),
                entropy=float(only.entropy_P[0]),
                kept_ids_K=only.kept_ids_E[order_K],
                kept_logp_K=only.kept_logp_E[order_K],
                tail_logsum_T=only.tail_logsum_PT[0],
            )
            said_P.append(said)
        return Spoken(said_P)

    @cached_property
    def mean_surprise(self) -> float:
        return sum(said.surprise for said in self.said_P) / len(self.said_P) if self.said_P else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean_surprise, 700.0))  # NaN stays NaN

    @property
    def is_weighted(self) -> bool:
        return any(said.is_weighted for said in self.said_P)

    def most_surprising(self, count: int) -> list[Said]:
        return sorted(self.said_P, key=lambda said: -said.surprise)[:count]

    def at(self, t: int, where: str) -> Said:
        """What was said about token t.

        Raises:
            ConfigError: it is not supervised.
        """
        for said in self.said_P:
            if said.t == t:
                return said
        if not self.said_P:
            raise ConfigError(f"{where}: has no supervised token", next_step="choose another --row")
        nearest = min(self.said_P, key=lambda said: abs(said.t - t)).t
        raise ConfigError(
            f"{where}: token {t} is not supervised; {len(self.said_P):,} are, "
            f"the first at t = {self.said_P[0].t}, the last at t = {self.said_P[-1].t}",
            next_step=f"--at {nearest} is the nearest; --tokens lists all",
        )


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
            said = _spoken(row, where).at(at, where)
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
        spoken = Spoken.of(row) if at is None else _spoken(row, where)
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


def _spoken(row: Row, where: str) -> Spoken:
    spoken = Spoken.of(row)
    if spoken is None:
        raise ConfigError(
            f"{where}: is text, of which no teacher has said anything yet",
            next_step="logit-shards inspect DATASET --at T, once it is dumped",
        )
    return spoken


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
