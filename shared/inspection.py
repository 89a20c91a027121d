"""Rows as the trainer will see them: every token, and which of them are supervised.

On a terminal supervised text is bold and green, its control tokens underlined, and other control tokens are cyan;
elsewhere supervised text stands between ⟦ and ⟧.  A line feed shows as ⏎.  Of a dataset's rows also what the teacher
said at each position.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from shared.rows import LogitRow, Row

SUPERVISED, OTHER = "bold green", "dim"
SUPERVISED_CONTROL, OTHER_CONTROL = "bold green underline", "cyan"
SHOWN_KEPT = 3


class Inspector:
    """Shows rows with the tokenizer that made them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._control_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def lines(self, row: Row, where: str, *, plain: bool, tokens: bool) -> Iterator[Text | Table]:
        """The row for people, `plain` without colours; with `tokens` one line for each token."""
        share = row.num_positions / max(row.num_tokens, 1)
        yield Text(
            f"{where}  id {row.sample_id}: {row.num_tokens:,} tokens, {row.num_positions:,} supervised ({share:.0%})"
        )
        yield self._table(row) if tokens else self._text(row, plain=plain)

    def as_json(self, row: Row, where: str, *, tokens: bool) -> dict[str, Any]:
        """The row for programs: `text` is a list of [supervised?, text]."""
        tree: dict[str, Any] = {
            "sample_id": row.sample_id,
            "where": where,
            "tokens": row.num_tokens,
            "positions": row.num_positions,
            "text": [[mark, self._decode(ids)] for mark, ids in _runs(row, lambda _: 0)],
        }
        if tokens:
            tree |= {"input_ids": row.input_ids_L.tolist(), "label_mask": row.label_mask_L.tolist()}
            if isinstance(row, LogitRow):
                tree["teacher"] = [self._said(row, position, kept=None) for position in range(row.num_positions)]
        return tree

    def _text(self, row: Row, *, plain: bool) -> Text:
        text = Text()
        for mark, ids in _runs(row, lambda token: not plain and token in self._control_ids):
            shown = self._decode(ids).replace("\n", "⏎\n")
            styles = (SUPERVISED, OTHER) if ids[0] not in self._control_ids else (SUPERVISED_CONTROL, OTHER_CONTROL)
            style = styles[0 if mark else 1]
            text.append(f"⟦{shown}⟧" if plain and mark else shown, style="" if plain else style)
        if text.plain.endswith("\n"):
            text.right_crop(1)
        return text

    def _table(self, row: Row) -> Table:
        table = Table("t", "id", "token", "supervised", box=None, pad_edge=False)
        if isinstance(row, LogitRow):
            for name in ("log p", "entropy", f"{SHOWN_KEPT} most probable kept", "tail"):
                table.add_column(name)
        position = 0
        for t, (token, mark) in enumerate(zip(row.input_ids_L.tolist(), row.label_mask_L.tolist(), strict=True)):
            cells = [str(t), str(token), Text(repr(self._decode([token]))), "●" if mark else ""]
            if mark and isinstance(row, LogitRow):
                said = self._said(row, position, kept=SHOWN_KEPT)
                kept = "  ".join(f"{name!r} {np.exp(logp):.3f}" for _, name, logp in said["kept"])
                tail = f"{np.exp(said['tail_logsum'][0]):.2g}"
                cells += [f"{said['realised_logprob']:.3f}", f"{said['entropy']:.3f}", Text(kept), tail]
            position += mark
            table.add_row(*cells, style=SUPERVISED if mark else OTHER)
        return table

    def _said(self, row: LogitRow, position: int, *, kept: int | None) -> dict[str, Any]:
        """What the teacher said at one position, the most probable ids first."""
        (only,) = row.teacher.split([position, 1, row.num_positions - position - 1])[1:2]
        order = np.argsort(-only.kept_logp_E, kind="stable")[:kept]
        return {
            "realised_logprob": float(only.realised_logp_P[0]),
            "entropy": float(only.entropy_P[0]),
            "tail_logsum": only.tail_logsum_PT[0].tolist(),
            "kept": [
                [int(token), self._decode([int(token)]), float(logp)]
                for token, logp in zip(only.kept_ids_E[order], only.kept_logp_E[order], strict=True)
            ],
        }

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _runs(row: Row, kind: Callable[[int], Any]) -> Iterator[tuple[bool, list[int]]]:
    """Tokens of one mark and one kind that lie side by side."""
    pairs = zip(row.label_mask_L.tolist(), row.input_ids_L.tolist(), strict=True)
    for (mark, _), run in groupby(pairs, key=lambda pair: (pair[0], kind(pair[1]))):
        yield mark, [token for _, token in run]
