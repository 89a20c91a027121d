"""What tokens say, each alone and where it stands in a row, also where one character is several tokens."""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

LONGEST_GROUP = 32
"""Tokens that are tried together for one character, so that bytes which never become one cost no quadratic time."""

_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Control characters as pictures of them, for a row must not command the terminal or the page that shows it."""
    return text.translate(_PICTURES)


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
