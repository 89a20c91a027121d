"""What a dataset's token ids are in the student's vocabulary.

**One tokenizer, padded to unlike sizes** (Qwen2.5 has 152,064 ids at 7B and 151,936 at 0.5B, for the same tokens): ids
are the same, and what the teacher gave to ids beyond the student's goes to the tail.  That needs no setting.

**Two tokenizers of one family** are mapped by token where `map_vocabulary` says so.  They are of one family where

1. both are BPE with the same options, normalizer and pre-tokenizer;
2. the student's merges, in their order, are the dataset's merges that make a token which the student has;
3. what the student has more are added tokens alone;
4. an added token that both have is found alike: with the white space around it, as a whole word alone, and before or
   after a normalizer.

A token is *common* where both have it with the same spelling, and come by it in the same way: as an added token, as one
of the BPE's, or as either.

*Why that suffices:* a text in which neither finds an added token that the other has not is cut into the same words by
1 and 4.  Within a word BPE applies the first merge of its list that can be applied, again and again.  By 2 whatever is
made of a token that the student lacks is itself such a token, for the merge that makes it would be in the one list and
not in the other.  So where every token of a word is common, no merge that the student lacks was ever applied to it;
the others stand in the same order, the student has no more of them, and it takes the very same ones.  By 3 no token
that needs no merge gets in between.  Hence rows whose tokens are all common are, token by token, what the student's
tokenizer makes of their text; but for text that spells out an added token which the dataset's tokenizer had not.

*Why not more:* a student that merges further cuts the same text otherwise, and would learn to write in pieces that it
is never given.  A student with merges of its own, or another tokenizer altogether, needs a divergence between
distributions over unlike texts; that is another method, which this tool does not have.

Shapes: V ids of the dataset, L tokens of a row, E kept entries.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers

from shared.dataset import LogitDataset
from shared.errors import ForeignTokenizerError
from shared.fingerprint import TRAIN_ANOTHER, require_same_tokenizer
from shared.rows import Int32, LogitRow, Positions

NO_ID = -1
SHOWN_TOKENS = 4
SET_IT = "set map_vocabulary: true beside `dataset`, which maps ids by token, or "
NO_METHOD = "; distilling from one tokenizer to another is not among what logitferry does"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Each id of a dataset in the student's vocabulary."""

    student_ids_V: Int32
    """`NO_ID` where the student has none."""
    num_student_ids: int
    """Its output matrix has so many."""
    num_tokens: int
    """Of the dataset's tokenizer; other ids are padding."""
    lacking: Mapping[int, str] = field(default_factory=dict, repr=False)
    """Tokens of the dataset that the student has not, by the dataset's ids."""
    added: tuple[str, ...] = field(default=(), repr=False)
    """The student's tokens that the dataset has not."""
    is_same_tokenizer: bool = False

    @staticmethod
    def padded(num_ids: int, *, num_tokens: int, num_student_ids: int) -> "Vocabulary":
        """Of one tokenizer, where the student has fewer ids than the dataset."""
        ids_V = np.arange(num_ids, dtype=np.int32)
        ids_V[num_student_ids:] = NO_ID
        return Vocabulary(
            student_ids_V=ids_V, num_student_ids=num_student_ids, num_tokens=num_tokens, is_same_tokenizer=True
        )

    @staticmethod
    def by_token(theirs: Tokenizer, ours: Tokenizer, *, num_ids: int, num_student_ids: int) -> "Vocabulary":
        """Of two tokenizers of one family: `theirs` made the dataset, `ours` is the student's."""
        known, own = theirs.get_vocab(with_added_tokens=True), ours.get_vocab(with_added_tokens=True)
        ways, own_ways = _ways(theirs), _ways(ours)
        common = {token for token in known.keys() & own.keys() if ways[token] == own_ways[token]}
        common = {token for token in common if known[token] < num_ids and own[token] < num_student_ids}
        ids_V = np.full(num_ids, NO_ID, dtype=np.int32)
        ids_V[[known[token] for token in common]] = [own[token] for token in common]
        return Vocabulary(
            student_ids_V=ids_V,
            num_student_ids=num_student_ids,
            num_tokens=len(known),
            lacking=dict(sorted((known[token], token) for token in known.keys() - common)),
            added=tuple(sorted(own.keys() - common, key=own.__getitem__)),
        )

    def row(self, row: LogitRow) -> LogitRow | None:
        """With the student's ids of its text, not yet of what the teacher said; None where the student lacks one."""
        ids_L = self.student_ids_V[row.input_ids_L]
        return None if (ids_L == NO_ID).any() else replace(row, input_ids_L=ids_L)

    def first_unknown(self, row: LogitRow) -> str:
        """For people: the first token of a row that the student has not."""
        token_id = int(row.input_ids_L[(self.student_ids_V[row.input_ids_L] == NO_ID).argmax()])
        token = f"{self.lacking[token_id]!r}, " if token_id in self.lacking else ""
        return f"row {row.sample_id} has {token}id {token_id}"

    def teacher(self, said: Positions, temperatures: Sequence[float]) -> Positions:
        """What a teacher said, in the student's ids; see `Positions.mapped`."""
        return said.mapped(self.student_ids_V, self.num_student_ids, temperatures)

    def moved_mass(self, said: Positions) -> float:
        """Σ over positions of the probability, at T = 1, of kept ids that the student has not."""
        is_gone_E = self.student_ids_V[said.kept_ids_E] == NO_ID
        return float(np.exp(said.kept_logp_E[is_gone_E].astype(np.float64)).sum())

    def digest(self) -> str:
        return hashlib.sha256(self.student_ids_V.astype("<i4").tobytes()).hexdigest()

    def line(self) -> str:
        """For people: how many tokens have an id, and which have none."""
        if self.is_same_tokenizer:
            return (
                f"{len(self.student_ids_V):,} ids for {self.num_tokens:,} tokens, the student has "
                f"{self.num_student_ids:,}; what the teacher gave to padding beyond them is tail"
            )
        return (
            f"{self.num_tokens - len(self.lacking):,} of {self.num_tokens:,} tokens mapped, "
            f"{len(self.lacking):,} the student lacks{_some(list(self.lacking.values()))}, "
            f"{len(self.added):,} it has more{_some(self.added)}"
        )

    def record(self) -> dict[str, Any]:
        """For people."""
        return {
            "mapped_tokens": self.num_tokens - len(self.lacking),
            "lacking_tokens": len(self.lacking),
            "added_tokens": len(self.added),
        }


@dataclass(frozen=True, kw_only=True)
class FirstRows:
    """What becomes of a dataset's first rows where they are mapped by token."""

    rows: int
    mappable: int
    """Those with tokens of the student alone."""
    cut_alike: int
    """Of these, whose text the student's tokenizer cuts into the same tokens."""
    moved_mass: float
    """Share of the teacher's probability, at T = 1, that is kept at tokens which the student lacks."""

    @staticmethod
    def of(rows: Sequence[LogitRow], vocabulary: Vocabulary, theirs: Tokenizer, ours: Tokenizer) -> "FirstRows":
        mappable = [row for row in rows if vocabulary.row(row) is not None]
        return FirstRows(
            rows=len(rows),
            mappable=len(mappable),
            cut_alike=sum(_cut_alike(theirs, ours, row) for row in mappable),
            moved_mass=sum(vocabulary.moved_mass(row.teacher) for row in rows)
            / max(1, sum(row.num_positions for row in rows)),
        )

    @property
    def is_cut_otherwise(self) -> bool:
        """Do any spell out a token that the student has, in pieces that it would not make of their text?"""
        return self.cut_alike < self.mappable

    def line(self) -> str:
        """For people."""
        return (
            f"of the first {self.rows} rows {self.mappable} have tokens of the student alone, {self.cut_alike} of "
            "these are cut into the same tokens by its own tokenizer; "
            f"{self.moved_mass:.3g} of the teacher's probability is kept at tokens that it lacks, and goes to the tail"
        )


def vocabulary_of(
    dataset: LogitDataset, tokenizer: Tokenizer, *, num_student_ids: int, is_mapped: bool
) -> Vocabulary | None:
    """The student's ids of a dataset's; None where they are the same.

    Raises:
        ForeignTokenizerError: the tokenizers differ, and are not of one family or are not to be mapped.
    """
    theirs, num_ids = dataset.tokenizer(), dataset.manifest.vocab_size
    try:
        require_same_tokenizer(theirs, tokenizer, expected_name=f"the dataset {dataset.name}", got_name="the student")
    except ForeignTokenizerError as error:
        if reason := why_no_family(theirs, tokenizer):
            raise ForeignTokenizerError(
                f"{error.args[0]}; ids cannot be mapped by token: {reason}", next_step=TRAIN_ANOTHER + NO_METHOD
            ) from None
        found = Vocabulary.by_token(theirs, tokenizer, num_ids=num_ids, num_student_ids=num_student_ids)
        if not is_mapped:
            raise ForeignTokenizerError(
                f"{error.args[0]}; they are of one family: {found.line()}", next_step=SET_IT + TRAIN_ANOTHER
            ) from None
        return found
    if num_student_ids >= num_ids:
        return None
    num_tokens = theirs.get_vocab_size(with_added_tokens=True)
    return Vocabulary.padded(num_ids, num_tokens=num_tokens, num_student_ids=num_student_ids)


def why_no_family(theirs: Tokenizer, ours: Tokenizer) -> str | None:
    """Which part of the rule above does not hold; None where all of it does."""
    one, other = (json.loads(each.to_str()) for each in (theirs, ours))
    types = one["model"]["type"], other["model"]["type"]
    if types != ("BPE", "BPE"):
        return f"both must be BPE, the dataset's is {types[0]} and the student's {types[1]}"
    for name, of in PARTS:
        if of(one) != of(other):
            return f"their {name} differ"
    our_tokens, added = other["model"]["vocab"], _added(ours)
    expected = [pair for pair, made in _merges(one) if made in our_tokens]
    for place, (pair, got) in enumerate(zip(expected, (pair for pair, _ in _merges(other)), strict=False)):
        if pair != got:
            return f"merge {place} of tokens that both have is {pair} in the dataset, {got} in the student"
    if (lengths := (len(expected), len(other["model"]["merges"])))[0] != lengths[1]:
        return f"of the dataset's merges {lengths[0]:,} make a token that the student has, which has {lengths[1]:,}"
    if more := sorted(our_tokens.keys() - one["model"]["vocab"].keys() - added.keys()):
        return f"the student has {len(more):,} tokens more that are no added tokens{_some(more)}"
    for token, found in _added(theirs).items():
        if added.get(token, found) != found:
            return f"the added token {token!r} is found with other white space around it, or in other text"
    return None


def cut_otherwise(rows: Callable[[], Sequence[LogitRow]], theirs: Tokenizer, ours: Tokenizer) -> str | None:
    """Of two tokenizers with the same tokens and merges: does ours cut the text of rows otherwise?

    For people; None where it does not, and without reading rows where nothing says that it could.
    """
    one, other = (json.loads(each.to_str()) for each in (theirs, ours))
    unlike = [name for name, of in PARTS if of(one) != of(other)]
    looked = rows() if unlike else []
    others = sum(not _cut_alike(theirs, ours, row) for row in looked)
    if not others:
        return None
    return (
        f"the student's tokenizer has the same tokens, but other {' and '.join(unlike)}: it cuts {others} of the first "
        f"{len(looked)} rows into other tokens than it would learn from here"
    )


def _cut_alike(theirs: Tokenizer, ours: Tokenizer, row: LogitRow) -> bool:
    """`row` has the dataset's ids."""
    text = theirs.decode(row.input_ids_L.tolist(), skip_special_tokens=False)
    one, other = (each.encode(text, add_special_tokens=False).tokens for each in (theirs, ours))
    return one == other


def _options(tree: dict[str, Any]) -> dict[str, Any]:
    """Of BPE; what is empty is as good as what is not there."""
    return {name: value or None for name, value in tree["model"].items() if name not in ("vocab", "merges")}


def _normalizer(tree: dict[str, Any]) -> Any:
    return tree["normalizer"]


def _pre_tokenizer(tree: dict[str, Any]) -> Any:
    return _without_offsets(tree["pre_tokenizer"])


def _without_offsets(tree: Any) -> Any:
    """`trim_offsets` says where a token stands, not which it is."""
    if isinstance(tree, list):
        return [_without_offsets(each) for each in tree]
    if isinstance(tree, dict):
        return {name: _without_offsets(value) for name, value in tree.items() if name != "trim_offsets"}
    return tree


PARTS = (("options", _options), ("normalizers", _normalizer), ("pre-tokenizers", _pre_tokenizer))
"""What of a tokenizer, beside tokens and merges, decides into which tokens a text is cut."""


def _merges(tree: dict[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """Each pair, with what it becomes."""
    prefix = tree["model"].get("continuing_subword_prefix") or ""
    for pair in tree["model"]["merges"]:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        yield (left, right), left + right.removeprefix(prefix)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """How an added token is found in a text."""

    strips: tuple[bool, bool]
    is_word: bool
    """As a whole word alone."""
    is_normalized: bool
    """In text that a normalizer has changed, in which it may not be what it was."""

    @property
    def is_sure(self) -> bool:
        """Wherever it is spelled out."""
        return not (self.is_word or self.is_normalized)


def _added(tokenizer: Tokenizer) -> dict[str, _Found]:
    """All added tokens."""
    # NFC leaves them as they are; what they are found before or after matters under other normalizers.
    changes = not isinstance(tokenizer.normalizer, NoneType | normalizers.NFC)
    return {
        token.content: _Found(
            strips=(token.lstrip, token.rstrip),
            is_word=token.single_word,
            is_normalized=changes and token.normalized,
        )
        for token in tokenizer.get_added_tokens_decoder().values()
    }


def _ways(tokenizer: Tokenizer) -> dict[str, tuple[bool, bool]]:
    """How it comes by each token: as an added one, and by BPE, where it is not always the former."""
    ways = dict.fromkeys(tokenizer.get_vocab(with_added_tokens=False), (False, True))
    return ways | {token: (True, token in ways and not found.is_sure) for token, found in _added(tokenizer).items()}


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:SHOWN_TOKENS]))
    return f" ({shown}{', …' if len(tokens) > SHOWN_TOKENS else ''})" if tokens else ""
