"""Answers are found where they stand, and are the same when they mean the same."""

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.eval.answers import find_answer, is_same, plain

HASHES = re.compile(r"####\s*(.+)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 5\n#### 5", "5"),
        ("#### 4\nno: #### 5 ", "5"),  # the last word counts
        ("it is 5", None),
        ("", None),
    ],
)
def test_find_answer_takes_the_last_match(text, expected):
    assert find_answer(text, HASHES) == expected


def test_find_answer_skips_a_match_without_its_group():
    assert find_answer("is 5, none", re.compile(r"is (\d+)|none")) == "5"
    assert find_answer("none", re.compile(r"is (\d+)|none")) is None


def test_find_answer_without_a_pattern_is_the_text():
    assert find_answer(" so\n5 \n", None) == "so\n5"


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ("18", "18.00"),
        ("18", "18."),
        ("1,234", "1234"),
        ("1,234,567.50", "$1234567.5"),
        ("$ 18", "18 €"),
        ("-3", "−3.0"),
        ("-$3", "$-3"),
        (".5", "0.50"),
        ("+7", "7"),
        ("-0", "0"),
        ("007", "7"),
        ("Paris.", " Paris"),
        ("", " "),
    ],
)
def test_answers_are_the_same(expected, got):
    assert is_same(expected, got, by_value=True)
    assert is_same(got, expected, by_value=True)


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ("18", "18.01"),
        ("18", "-18"),
        ("1,234", "1,2345"),  # no thousands comma
        ("12,34", "1234"),
        ("1 234", "1234"),
        ("18", "18 %"),
        ("18", "eighteen"),
        ("18", "1.8e1"),
        ("Paris", "paris"),
        ("0", "."),
        ("0", "$"),
        ("0", ""),
        ("0", None),
        ("10000000000000000000000000000001", "10000000000000000000000000000002"),
        ("18", "¹8"),
    ],
)
def test_answers_are_not_the_same(expected, got):
    assert not is_same(expected, got, by_value=True)


def test_is_same_without_values_compares_letters():
    assert is_same("18", "18", by_value=False)
    assert not is_same("18", "18.0", by_value=False)


amounts = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3)


@given(amounts, st.sampled_from("$€£¥₹"), st.sampled_from(["", "0", "000"]))
def test_plain_reads_every_way_to_write_a_number(amount, currency, zeros):
    for text in (f"{amount}{zeros}", f"{amount:,}{zeros}", f" {currency}{amount}. ", f"{amount} {currency}"):
        assert plain(text) == amount, text


@given(amounts, amounts)
def test_is_same_exactly_where_the_values_are(one, other):
    assert is_same(f"{one:,}", f"{other}", by_value=True) == (one == other)


@given(st.text())
def test_plain_takes_any_text(text):
    assert isinstance(plain(text), Decimal | str)


@pytest.mark.parametrize("text", ["9" * 100_000, "$" + " " * 100_000 + "1x", "1" + ",000" * 30_000 + ","])
def test_plain_has_no_text_that_it_never_comes_to_an_end_with(text):
    assert plain(text) == (Decimal(text) if text.isdecimal() else text)
