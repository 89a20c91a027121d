"""Which tokenizers are of one family, and what mapping ids makes of rows, of the teacher and of the loss."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers

from shared.models import OutputHead
from shared.rows import LogitRow, Positions
from student_train.collate import make_targets
from student_train.fused_linear import fused_linear_loss
from student_train.objective import Objective
from student_train.vocabulary import FirstRows, Vocabulary, why_no_family
from tests.kin import edited, extended, moved, shortened
from tests.student_train.references import Lesson, true_divergence
from tests.tiny import SENTENCES, make_tokenizer

NUM_IDS = 307
NEVER = -1e4
"""A logit of probability 0."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> Tokenizer:
    return tokenizer.backend_tokenizer


@pytest.fixture(scope="module")
def relatives(base: Tokenizer) -> dict[str, Tokenizer]:
    return {
        "moved": moved(base),
        "longer": extended(base, "<tool>", "  "),
        "shorter": moved(shortened(base, 19), seed=3),
        "both": extended(moved(shortened(base, 7), seed=4), "<tool>"),
    }


def by_token(theirs: Tokenizer, ours: Tokenizer) -> Vocabulary:
    return Vocabulary.by_token(theirs, ours, num_ids=NUM_IDS, num_student_ids=NUM_IDS)


def merge_more(tree: Any) -> None:
    """One merge at the end that the other has not."""
    model = tree["model"]
    left, right = next(
        (a, b)
        for a in model["vocab"]
        for b in model["vocab"]
        if a.isalpha() and b.isalpha() and a + b not in model["vocab"]
    )
    model["merges"].append([left, right])
    model["vocab"][left + right] = max(model["vocab"].values()) + 1


def swap_merges(tree: Any) -> None:
    merges = tree["model"]["merges"]
    merges[3], merges[5] = merges[5], merges[3]


def take_space(tree: Any) -> None:
    next(token for token in tree["added_tokens"] if token["content"] == "<|im_end|>")["rstrip"] = True


UNLIKE = {
    r"merge 3 of tokens that both have": swap_merges,
    r"of the dataset's merges \d+ make a token that the student has, which has \d+": merge_more,
    r"the student has 1 tokens more that are no added tokens \('字'\)": lambda tree: tree["model"]["vocab"].update(
        字=306
    ),
    r"their normalizers differ": lambda tree: tree.update(normalizer={"type": "NFKC"}),
    r"their pre-tokenizers differ": lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True),
    r"their options differ": lambda tree: tree["model"].update(ignore_merges=True),
    r"the added token '<\|im_end\|>' is found with other white space around it": take_space,
}


@pytest.mark.parametrize("reason", UNLIKE)
def test_a_tokenizer_that_cuts_text_otherwise_is_of_another_family(base: Tokenizer, reason: str):
    found = why_no_family(base, edited(base, UNLIKE[reason]))
    assert found is not None
    assert re.match(reason, found), found


def flagged(token: str, **flags: bool) -> Any:
    def change(tree: Any) -> None:
        next(each for each in tree["added_tokens"] if each["content"] == token).update(flags)

    return change


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.Prepend("x")])
def test_an_added_token_that_is_found_behind_a_normalizer_is_found_elsewhere(base: Tokenizer, normalizer: Any):
    """A prefix goes before each piece of text that no added token has cut off yet."""
    theirs, text = moved(base), "A<|im_end|>b"
    theirs.normalizer = normalizer
    ours = edited(theirs, flagged("<|im_end|>", normalized=True))
    reason = "the added token '<|im_end|>' is found with other white space around it, or in other text"
    assert why_no_family(theirs, ours) == reason
    if isinstance(normalizer, normalizers.Prepend):
        assert theirs.encode(text).tokens != ours.encode(text).tokens
    theirs.normalizer = ours.normalizer = normalizers.NFC()
    assert why_no_family(theirs, ours) is None


def test_a_token_that_one_may_merge_as_well_is_not_common(base: Tokenizer):
    """As whole words they are found alike, and within others merged by one of them alone."""

    def whole(tree: Any) -> None:
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "special": False}
        token_id = tree["model"]["vocab"][made]
        tree["added_tokens"].append({"id": token_id, "content": made, "single_word": True, **flags})
        tree["added_tokens"].sort(key=lambda token: token["id"])

    made = "".join(json.loads(base.to_str())["model"]["merges"][-1])
    theirs = edited(base, whole)
    ours = edited(shortened(base, 1), lambda tree: None)
    ours.add_tokens([AddedToken(made, single_word=True, normalized=False)])
    assert why_no_family(theirs, ours) is None
    text = f"x{made}"
    assert made in theirs.encode(text).tokens
    assert made not in ours.encode(text).tokens
    assert list(by_token(theirs, ours).lacking.values()) == [made]
    assert not by_token(theirs, moved(theirs)).lacking


def test_tokenizers_of_other_text_or_another_kind_are_of_another_family(base: Tokenizer, tmp_path: Path):
    other = make_tokenizer(tmp_path, sentences=[*SENTENCES, "zebra zebra zebra zebra zebra"]).backend_tokenizer
    assert "merge" in str(why_no_family(base, other))
    words = Tokenizer(models.WordLevel(base.get_vocab(), unk_token="a"))
    assert why_no_family(base, words) == "both must be BPE, the dataset's is BPE and the student's WordLevel"


def test_what_does_not_change_tokens_changes_no_family(base: Tokenizer, relatives: dict[str, Tokenizer]):
    for ours in (base, *relatives.values()):
        assert why_no_family(base, ours) is None
    assert why_no_family(base, edited(base, lambda tree: tree["model"].update(continuing_subword_prefix=""))) is None
    assert why_no_family(base, edited(base, lambda tree: tree["pre_tokenizer"].update(trim_offsets=False))) is None
    # The other way round, the longer one has merges that the other has not.
    assert why_no_family(relatives["shorter"], base) is not None


def test_a_merge_of_tokens_that_the_student_lacks_into_one_that_it_has_is_refused(base: Tokenizer):
    """Another way to a token that both have could be taken by one of them alone."""

    def take_the_part(tree: Any) -> None:
        merges, vocabulary = tree["model"]["merges"], tree["model"]["vocab"]
        made = [left + right for left, right in merges]
        part = next(each for each in made if any(each in pair for pair in merges))
        tree["model"]["merges"] = [pair for pair in merges if part not in pair and "".join(pair) != part]
        del vocabulary[part]

    assert "merge" in str(why_no_family(base, edited(base, take_the_part)))


def texts() -> list[str]:
    """English, code and other scripts."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "shared/rows.py", "student_train/LOSSES.md")]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return [*SENTENCES, *lines, "Ünïcödé 字 и 🦊", "<|im_start|>user\nfox<|im_end|>\n", "a\t\tb  \n c"]


@pytest.mark.parametrize("name", ["moved", "longer", "shorter", "both"])
def test_real_text_is_cut_into_the_same_tokens_by_all_of_a_family(
    base: Tokenizer, relatives: dict[str, Tokenizer], name: str
):
    ours = relatives[name]
    vocabulary = by_token(base, ours)
    num_mapped = 0
    for text in texts():
        if any(token in text for token in vocabulary.added):
            continue
        theirs, own = (each.encode(text, add_special_tokens=False) for each in (base, ours))
        ids = vocabulary.student_ids_V[theirs.ids] if theirs.ids else np.array([], np.int32)
        if (ids >= 0).all():
            assert (theirs.tokens, ids.tolist()) == (own.tokens, own.ids)
            num_mapped += 1
        else:
            assert set(theirs.tokens) & set(vocabulary.lacking.values())
    assert num_mapped > (20 if vocabulary.lacking else 300)


@given(text=st.lists(st.sampled_from([*"abcdefghinorstuwxy .?\n", "the", " fox", "<|im_end|>", "é"]), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_text_of_common_tokens_alone_is_cut_alike(
    base: Tokenizer, relatives: dict[str, Tokenizer], text: list[str]
):
    for ours in relatives.values():
        vocabulary = by_token(base, ours)
        if any(token in "".join(text) for token in vocabulary.added):
            continue
        theirs, own = (each.encode("".join(text), add_special_tokens=False) for each in (base, ours))
        ids = vocabulary.student_ids_V[np.array(theirs.ids, np.int32)]
        assert (ids < 0).any() or ids.tolist() == own.ids


def test_what_is_common_is_counted_and_what_is_not_is_named(base: Tokenizer, relatives: dict[str, Tokenizer]):
    both = by_token(base, relatives["both"])
    assert (len(both.lacking), both.added, both.num_tokens) == (7, ("<tool>",), 300)
    assert both.line().startswith("293 of 300 tokens mapped, 7 the student lacks ('")
    assert both.line().endswith("1 it has more ('<tool>')")
    assert both.record() == {"mapped_tokens": 293, "lacking_tokens": 7, "added_tokens": 1}
    assert both.digest() != by_token(base, relatives["moved"]).digest()
    assert both.digest() == by_token(base, relatives["both"]).digest()


def test_a_token_that_only_one_takes_for_an_added_one_is_not_common(base: Tokenizer):
    """Its letters are the same; the text that it stands for may not be, and it is cut otherwise."""

    def plain(tree: Any) -> None:
        tree["added_tokens"] = [each for each in tree["added_tokens"] if each["content"] != "<|im_start|>"]

    assert list(by_token(base, edited(base, plain)).lacking.values()) == ["<|im_start|>"]


def test_first_rows_tell_of_text_that_spells_out_a_token_of_the_student(base: Tokenizer):
    ours = extended(base, "fox")
    rows = [row_of(base, text) for text in ("a red fox", "a blue bird")]
    found = FirstRows.of(rows, by_token(base, ours), base, ours)
    assert (found.rows, found.mappable, found.cut_alike, found.moved_mass) == (2, 2, 1, 0.0)
    assert "1 of these are cut into the same tokens" in found.line()
    assert found.is_cut_otherwise


def row_of(tokenizer: Tokenizer, text: str) -> LogitRow:
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    mask = np.arange(len(ids)) > 0
    return LogitRow(sample_id=text, input_ids_L=ids, label_mask_L=mask, teacher=said([[1]] * (len(ids) - 1)))


def said(kept: list[list[int]], log_p: Any = -3.0, tails: Any = -1.0) -> Positions:
    num_entries = sum(map(len, kept))
    return Positions(
        kept_counts_P=np.array([len(each) for each in kept], np.int32),
        kept_ids_E=np.array([id_ for each in kept for id_ in each], np.int32),
        kept_logp_E=np.broadcast_to(np.array(log_p, np.float32), num_entries).copy(),
        realised_logp_P=np.full(len(kept), -1.0, np.float32),
        entropy_P=np.ones(len(kept), np.float32),
        tail_logsum_PT=np.broadcast_to(np.array(tails, np.float32), (len(kept), 1)).copy(),
    )


@st.composite
def teachers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Log p [P, V] in fp64, which are kept, the new ids, and how many of those there are."""
    num_ids, num_positions = draw(st.integers(2, 23)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    logits = rng.normal(scale=draw(st.sampled_from([1.0, 6.0])), size=(num_positions, num_ids))
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    log_p = log_p.astype(np.float32).astype(np.float64)
    kept = rng.random((num_positions, num_ids)) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    num_new = num_ids + draw(st.integers(-1, 6))
    new_ids = rng.permutation(max(num_new, num_ids))[:num_ids].astype(np.int32)
    new_ids[(rng.random(num_ids) < draw(st.sampled_from([0.0, 0.3, 1.0]))) | (new_ids >= num_new)] = -1
    return log_p, kept, new_ids, num_new


def positions_of(log_p: np.ndarray, kept: np.ndarray, temperatures: tuple[float, ...]) -> Positions:
    tails = [np.logaddexp.reduce(np.where(kept, -np.inf, log_p / t), axis=1) for t in temperatures]
    return Positions(
        kept_counts_P=kept.sum(axis=1).astype(np.int32),
        kept_ids_E=np.nonzero(kept)[1].astype(np.int32),
        kept_logp_E=log_p[kept].astype(np.float32),
        realised_logp_P=log_p[:, 0].astype(np.float32),
        entropy_P=-(np.exp(log_p) * log_p).sum(axis=1).astype(np.float32),
        tail_logsum_PT=np.stack(tails, axis=1).astype(np.float32),
    )


@given(case=teachers())
@settings(max_examples=300, deadline=None)
def test_mapping_there_and_back_changes_no_common_id_and_loses_no_mass(case: Any):
    log_p, kept, new_ids, num_new = case
    before = positions_of(log_p, kept, (1.0, 2.0))
    after = before.mapped(new_ids, num_new, (1.0, 2.0))
    old_ids = np.full(num_new, -1, np.int32)
    old_ids[new_ids[new_ids >= 0]] = np.flatnonzero(new_ids >= 0)
    has_place = kept & (new_ids >= 0)
    back = after.mapped(old_ids, 10_000, (1.0, 2.0))
    assert back.kept_ids_E.tolist() == np.nonzero(has_place)[1].tolist()
    assert back.kept_logp_E.tolist() == before.kept_logp_E[has_place[kept]].tolist()
    ends = np.cumsum([0, *after.kept_counts_P])
    for position in range(len(log_p)):
        ids = after.kept_ids_E[ends[position] : ends[position + 1]]
        assert (np.diff(ids) > 0).all()
        assert ids.tolist() == sorted(new_ids[has_place[position]])
    for index, temperature in enumerate((1.0, 2.0)):
        tail = np.logaddexp.reduce(np.where(has_place, -np.inf, log_p / temperature), axis=1)
        tail[has_place.sum(axis=1) == num_new] = -np.inf
        np.testing.assert_allclose(np.exp(after.tail_logsum_PT[:, index]), np.exp(tail), rtol=2e-6, atol=1e-7)


def head_of(weight_VD: torch.Tensor) -> OutputHead:
    return OutputHead(weight_VD=weight_VD, bias_V=None, softcap=None, scale=1.0)


OBJECTIVES: list[dict[str, Any]] = [
    *({"divergence": name} for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl")),
    {"tail": "renormalise"},
    {"tail": "drop"},
]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("asked", OBJECTIVES, ids=lambda asked: "-".join(asked.values()))
@pytest.mark.parametrize("student", ["padded less", "padded more", "moved, fewer", "moved, more"])
def test_the_loss_of_mapped_rows_is_that_of_the_whole_teacher_in_the_students_ids(
    student: str, asked: dict[str, Any], temperature: float
):
    """By definition, in fp64: all p at the student's ids, and an outcome for what the student cannot say."""
    num_ids, num_positions, hidden_size = 29, 7, 5
    num_new = {"padded less": 23, "padded more": 37, "moved, fewer": 19, "moved, more": 41}[student]
    rng = np.random.default_rng(5)
    if student.startswith("padded"):
        new_ids = np.where(np.arange(num_ids) < num_new, np.arange(num_ids), -1).astype(np.int32)
    else:
        new_ids = rng.permutation(max(num_new, num_ids))[:num_ids].astype(np.int32)
        new_ids[(new_ids >= num_new) | (np.arange(num_ids) % 5 == 0)] = -1
    log_p = torch.log_softmax(torch.from_numpy(rng.normal(scale=2.0, size=(num_positions, num_ids))), dim=1)
    kept = (log_p.argsort(dim=1, descending=True).argsort(dim=1) < 11).numpy()
    positions = positions_of(log_p.numpy(), kept, (temperature,)).mapped(new_ids, num_new, (temperature,))
    hidden = torch.from_numpy(rng.normal(size=(num_positions, hidden_size))).float().requires_grad_()
    head = head_of(torch.from_numpy(rng.normal(size=(num_new, hidden_size))).float())
    objective = Objective(temperature=temperature, kd_weight=1.0, **asked)
    weight, label = torch.ones(num_positions), torch.from_numpy(new_ids[new_ids >= 0][:num_positions].astype(np.int64))
    targets = make_targets(label.numpy(), weight.numpy(), positions, temperature=temperature, vocab_size=num_new)
    loss = fused_linear_loss(hidden, head, targets, objective, denominator=float(num_positions))
    loss.total.backward()

    # Both in one space: the student's ids, and behind them a place for each of the teacher's that the student lacks.
    places = np.where(new_ids >= 0, new_ids, num_new + np.arange(num_ids))
    teacher = torch.full((num_positions, num_new + num_ids), NEVER, dtype=torch.float64)
    teacher[:, places] = log_p
    kept_here = torch.zeros(teacher.shape, dtype=torch.bool)
    kept_here[:, places] = torch.from_numpy(kept & (new_ids >= 0))
    exact = hidden.detach().double().requires_grad_()
    nowhere = torch.full((num_positions, num_ids), NEVER, dtype=torch.float64)
    logits = torch.cat([exact @ head.weight_VD.double().T, nowhere], dim=1)
    whole = Lesson(
        teacher_NV=teacher, kept_NV=kept_here, weights_NV=teacher, label_N=label, weight_N=weight, targets=targets
    )
    truth = temperature**2 * true_divergence(logits, whole, objective).sum() / num_positions
    truth.backward()
    assert loss.total.item() == pytest.approx(truth.item(), rel=2e-5, abs=1e-6)
    assert hidden.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(hidden.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


def test_where_all_ids_of_the_student_are_kept_the_teacher_is_what_it_says_of_them():
    """Nothing of the student could have the mass of the others: by the tail, KL would be infinite."""
    rng = np.random.default_rng(6)
    log_p = torch.log_softmax(torch.from_numpy(rng.normal(size=(3, 9))), dim=1)
    positions = positions_of(log_p.numpy(), np.ones((3, 9), bool), (1.0,))
    new_ids = np.where(np.arange(9) < 7, np.arange(9), -1).astype(np.int32)
    after = positions.mapped(new_ids, 7, (1.0,))
    targets = make_targets(np.arange(3), np.ones(3), after, vocab_size=7)
    head, hidden = head_of(torch.randn(7, 4)), torch.randn(3, 4)
    found = fused_linear_loss(hidden, head, targets, Objective(kd_weight=1.0), denominator=3.0)
    p, log_q = torch.softmax(log_p[:, :7], dim=1), torch.log_softmax((hidden @ head.weight_VD.T).double(), dim=1)
    assert found.total.item() == pytest.approx(float((p * (p.log() - log_q)).sum() / 3), rel=1e-5)


def test_of_a_sample_weights_at_padding_are_dropped_and_the_gradient_is_of_what_is_left():
    """−Σ w log q over the student's ids: (1 − m) times the gradient of KL of the teacher given that it says one."""
    rng = np.random.default_rng(7)
    log_p = torch.log_softmax(torch.from_numpy(rng.normal(size=(4, 13))), dim=1)
    sample = positions_of(log_p.numpy(), np.ones((4, 13), bool), (1.0,))
    sample = Positions(**{**vars(sample), "tail_logsum_PT": np.zeros((4, 0), np.float32)})
    after = sample.mapped(np.where(np.arange(13) < 11, np.arange(13), -1).astype(np.int32), 11, ())
    targets = make_targets(np.arange(4), np.ones(4), after, vocab_size=11)
    head, hidden = head_of(torch.randn(11, 4)), torch.randn(4, 4, requires_grad=True)
    objective = Objective(kd_weight=1.0, tail="none")
    fused_linear_loss(hidden, head, targets, objective, denominator=1.0).total.backward()
    exact = hidden.detach().double().requires_grad_()
    log_q = torch.log_softmax(exact @ head.weight_VD.double().T, dim=1)
    share = log_p[:, :11].exp().sum(dim=1, keepdim=True)
    given_p = log_p[:, :11].exp() / share
    (share * given_p * (given_p.log() - log_q)).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(hidden.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


def test_the_table_of_an_unmapped_dataset_is_json_for_people(base: Tokenizer):
    padded = Vocabulary.padded(307, num_tokens=300, num_student_ids=303)
    assert padded.line() == (
        "307 ids for 300 tokens, the student has 303; what the teacher gave to padding beyond them is tail"
    )
    assert json.dumps(padded.record())
