"""The answer within a text, and when two of them are the same.

Whoever writes 1,000 and whoever writes $1000.00 mean one number; so numbers are compared by value, and anything else
letter by letter.
"""

import re
from decimal import Decimal

CURRENCIES = "$€£¥₹"
NUMBER = re.compile(
    rf"[{CURRENCIES}]? ?(?P<sign>[-+−]?) ?[{CURRENCIES}]? ?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?P<fraction>\.[0-9]+)?"
    rf" ?[{CURRENCIES}]?"
)


def find_answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The one group of the last match in which it takes part; the whole text without a pattern; None where none is."""
    if pattern is None:
        return text.strip()
    found = [match[1] for match in pattern.finditer(text) if match[1] is not None]
    return found[-1].strip() if found else None


def is_same(expected: str, got: str | None, *, by_value: bool) -> bool:
    """Whether a reply's answer is the reference's: as numbers, where both are and `by_value`."""
    if got is None:
        return False
    return plain(expected) == plain(got) if by_value else expected == got


def plain(answer: str) -> Decimal | str:
    """A number without thousands commas and currency, or a text without spaces around it; neither with a last dot."""
    text = answer.strip().removesuffix(".").rstrip()
    number = NUMBER.fullmatch(text)
    if number is None or not (number["digits"] or number["fraction"]):
        return text
    digits = (number["digits"] or "0").replace(",", "") + (number["fraction"] or "")
    return Decimal(number["sign"].replace("−", "-") + digits)
