"""A tokenizer is its vocabulary and merges: equal size proves nothing, and another file need not be another one."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from shared.errors import MismatchError
from shared.fingerprint import require_same_tokenizer, sha256_of_json, sha256_of_text, tokenizer_fingerprint
from tests.tiny import SENTENCES, make_tokenizer

FILE = "tokenizer.json"


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("ours")
    make_tokenizer(folder)
    return Tokenizer.from_file(str(folder / FILE))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Tokenizer:
    """Of the same size, trained on other text."""
    folder = tmp_path_factory.mktemp("theirs")
    make_tokenizer(folder, sentences=[sentence[::-1] for sentence in SENTENCES])
    return Tokenizer.from_file(str(folder / FILE))


def edit(tokenizer: Tokenizer, change) -> Tokenizer:
    tree = json.loads(tokenizer.to_str())
    change(tree)
    return Tokenizer.from_str(json.dumps(tree))


def swap_last_merges(tree) -> None:
    merges = tree["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def refusal(expected: Tokenizer, got: Tokenizer) -> str:
    with pytest.raises(MismatchError) as caught:
        require_same_tokenizer(expected, got, expected_name="the dataset", got_name="the student")
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_fingerprint_survives_saving_and_loading(ours, tmp_path):
    ours.save(str(tmp_path / FILE))
    again = Tokenizer.from_file(str(tmp_path / FILE))
    again.save(str(tmp_path / FILE), pretty=False)
    assert tokenizer_fingerprint(Tokenizer.from_file(str(tmp_path / FILE))) == tokenizer_fingerprint(ours)
    require_same_tokenizer(ours, again, expected_name="a", got_name="b")


def test_fingerprint_is_the_same_for_two_trainings_on_the_same_text(ours, tmp_path):
    make_tokenizer(tmp_path)
    assert tokenizer_fingerprint(Tokenizer.from_file(str(tmp_path / FILE))) == tokenizer_fingerprint(ours)


def test_fingerprint_takes_merges_in_the_old_and_the_new_spelling(ours):
    def spell_as_before(tree) -> None:
        tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]

    class Old:
        """What an old `tokenizers` release would answer."""

        def to_str(self) -> str:
            tree = json.loads(ours.to_str())
            spell_as_before(tree)
            return json.dumps(tree)

        def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
            return ours.get_vocab(with_added_tokens)

    assert tokenizer_fingerprint(edit(ours, spell_as_before)) == tokenizer_fingerprint(ours)
    assert tokenizer_fingerprint(Old()) == tokenizer_fingerprint(ours)


def test_fingerprint_leaves_truncation_and_padding_out(ours):
    cut = edit(ours, lambda tree: None)
    cut.enable_truncation(7)
    cut.enable_padding(length=9)
    assert tokenizer_fingerprint(cut) == tokenizer_fingerprint(ours)


def test_fingerprint_differs_for_another_vocabulary_of_the_same_size(ours, theirs):
    assert ours.get_vocab_size() == theirs.get_vocab_size()
    assert tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs)


def test_fingerprint_differs_for_another_order_of_the_merges_alone(ours):
    reordered = edit(ours, swap_last_merges)
    assert reordered.get_vocab() == ours.get_vocab()
    assert tokenizer_fingerprint(reordered) != tokenizer_fingerprint(ours)


def test_require_same_names_both_fingerprints_and_the_first_token_that_differs(ours, theirs):
    message = refusal(ours, theirs)
    first = min(i for i in range(ours.get_vocab_size()) if ours.id_to_token(i) != theirs.id_to_token(i))
    assert f"the dataset has {tokenizer_fingerprint(ours)[:16]}…" in message
    assert f"the student has {tokenizer_fingerprint(theirs)[:16]}…" in message
    one, other = ours.id_to_token(first), theirs.id_to_token(first)
    assert f"first at id {first}: {one!r} (id {first}) against {other!r} (id {first})" in message
    assert "next: train a student that has the teacher's tokenizer" in message


def test_require_same_names_a_token_that_moved_to_another_id(ours):
    def leave_a_hole(tree) -> None:
        vocabulary = tree["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary[last] += 5

    size = ours.get_vocab_size()
    last = ours.id_to_token(size - 1)
    message = refusal(ours, edit(ours, leave_a_hole))
    assert f"first at id {size - 1}: {last!r} (id {size - 1}) against {last!r} (id {size + 4})" in message


def test_require_same_says_where_the_shorter_vocabulary_ends(ours):
    longer = edit(ours, lambda tree: None)
    longer.add_special_tokens([AddedToken("<|extra|>")])
    size = ours.get_vocab_size()
    assert f"they agree on {size} tokens, then one ends: {size} against {size + 1}" in refusal(ours, longer)
    assert f"they agree on {size} tokens, then one ends: {size + 1} against {size}" in refusal(longer, ours)


def test_require_same_says_that_the_merges_alone_differ(ours):
    assert "the tokens agree, the merges do not" in refusal(ours, edit(ours, swap_last_merges))


def test_sha256_does_not_depend_on_the_order_of_keys():
    assert sha256_of_json({"a": 1, "b": [2, "é"]}) == sha256_of_json({"b": [2, "é"], "a": 1})
    assert sha256_of_json([1, 2]) != sha256_of_json([2, 1])
    assert sha256_of_text("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
