"""The fused loss against its definition in fp64: value and every gradient, everywhere the numbers are hard."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shared.models import OutputHead
from student_train.fused_linear import fused_linear_loss
from student_train.loss import Targets
from student_train.objective import Objective
from tests.student_train.references import Lesson, fused, lesson, plain_logits, true_loss

N, D, V = 11, 7, 53
UNEVEN = [1, V, 3, 10, 2, 52, 5, 1, 7, 53, 20]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "forward_kl-renormalise": {"tail": "renormalise"},
    "forward_kl-drop": {"tail": "drop"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "jsd-0.1": {"divergence": "jsd", "jsd_beta": 0.1},
    "skew_kl": {"divergence": "skew_kl"},
    "skew_kl-0.7": {"divergence": "skew_kl", "skew_alpha": 0.7},
}


def teacher(seed: int, *, spread: float = 4.0, num_positions: int = N) -> Tensor:
    return torch.randn(num_positions, V, generator=torch.Generator().manual_seed(seed)) * spread


def student(*, dtype: torch.dtype = torch.float32, bias: bool = False, scale: float = 1.0, **head: Any) -> Any:
    torch.manual_seed(5)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias_V = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    return hidden, OutputHead(weight_VD=weight, bias_V=bias_V, softcap=head.get("softcap"), scale=scale)


def assert_true(hidden: Tensor, head: OutputHead, said: Lesson, objective: Objective, **settings: Any) -> None:
    sums = fused(hidden, head, said, objective, **settings)
    sums.total.backward()
    logits, leaves = plain_logits(hidden, head, torch.float64)
    expected, ce, kd = true_loss(logits, said, objective)
    expected.backward()
    for got, true in zip((sums.total, sums.ce, sums.kd), (expected, ce, kd), strict=True):
        assert float(got.detach()) == pytest.approx(float(true.detach()), rel=2e-5, abs=2e-6)
    ours = [x.grad for x in (hidden, head.weight_VD, head.bias_V) if x is not None]
    for got, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("counts", [[1] * N, [10] * N, [V] * N, UNEVEN], ids=["one", "ten", "all", "uneven"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_are_those_of_the_definition(name: str, counts: list[int], temperature: float):
    said = lesson(teacher(1), counts, temperature=temperature, weight_N=torch.linspace(0.1, 2.0, N))
    objective = Objective(kd_weight=0.7, temperature=temperature, z_loss=1e-2, **OBJECTIVES[name])
    assert_true(*student(), said, objective)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_with_everything_kept_it_is_torchs_dense_kl(temperature: float):
    """And the T² is in the gradient, not only in the reported value."""
    said = lesson(teacher(0), [V] * N, temperature=temperature)
    hidden, head = student()
    fused(hidden, head, said, Objective(kd_weight=1.0, temperature=temperature)).total.backward()
    logits, (leaf_hidden, leaf_weight) = plain_logits(hidden, head, torch.float64)
    log_q, p = torch.log_softmax(logits / temperature, 1), torch.softmax(said.teacher_NV / temperature, 1)
    (F.kl_div(log_q, p, reduction="batchmean") * temperature**2).backward()
    torch.testing.assert_close(hidden.grad.double(), leaf_hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.weight_VD.grad.double(), leaf_weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_the_slope_of_the_reported_value(name: str, temperature: float):
    """By differences of the fused operation's own values: no reference has a say in it."""
    said = lesson(teacher(10), UNEVEN, temperature=temperature)
    objective = Objective(kd_weight=1.0, temperature=temperature, **OBJECTIVES[name])
    hidden, head = student()
    fused(hidden, head, said, objective).total.backward()
    for leaf in (hidden, head.weight_VD):
        direction = torch.sign(leaf.grad)
        values, step = [], 1e-2 if leaf is hidden else 2e-3
        for side in (step, -step):
            moved = leaf.detach() + side * direction
            args = (moved, head) if leaf is hidden else (hidden, OutputHead(**{**vars(head), "weight_VD": moved}))
            values.append(float(fused(*args, said, objective).total.detach()))
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float((leaf.grad * direction).sum()), rel=3e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "head", [{"bias": True}, {"softcap": 2.0}, {"scale": 0.3}, {"bias": True, "softcap": 5.0, "scale": 1.7}]
)
def test_heads_with_bias_softcap_and_scale(head: dict[str, Any], temperature: float):
    said = lesson(teacher(2), [9] * N, temperature=temperature)
    for settings in ({}, {"divergence": "reverse_kl"}):
        objective = Objective(kd_weight=0.7, temperature=temperature, z_loss=1e-3, **settings)
        assert_true(*student(**head), said, objective)


@pytest.mark.parametrize("chunk_positions", [None, 1, 4, 11, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_chunk_nor_block_changes_anything(
    chunk_positions: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    said, objective = lesson(teacher(3), [6] * N), Objective(kd_weight=0.5)
    hidden, head = student(dtype=dtype)
    fused(hidden, head, said, objective, chunk_positions=N).total.backward()
    monkeypatch.setattr("student_train.fused_linear.SMALLEST_ROWS", 2)
    monkeypatch.setattr("student_train.fused_linear.block_bytes", lambda _device: 2 * 4 * V)
    monkeypatch.setattr("student_train.fused_linear.WEIGHT_ROWS", 10)
    again, same_head = student(dtype=dtype)
    fused(again, same_head, said, objective, chunk_positions=chunk_positions).total.backward()
    # In bf16 the output matrix's gradient is rounded once a chunk.
    rtol, atol = (1e-5, 1e-7) if dtype == torch.float32 else (2e-2, 2e-3)
    torch.testing.assert_close(again.grad, hidden.grad, rtol=rtol, atol=atol)
    torch.testing.assert_close(same_head.weight_VD.grad, head.weight_VD.grad, rtol=rtol, atol=atol)


def test_a_step_has_a_handful_of_shapes_whatever_its_length(monkeypatch: pytest.MonkeyPatch):
    """A device that compiles for shapes compiles once for each."""
    shapes = set()
    mm = torch.mm

    def watched(a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        shapes.add(tuple(a.shape))
        return mm(a, b, **kwargs)

    monkeypatch.setattr("torch.mm", watched)
    for num_positions in range(1, 300, 7):
        said = lesson(teacher(3, num_positions=num_positions), [6] * num_positions)
        weight = torch.randn(V, D, requires_grad=True)
        head = OutputHead(weight_VD=weight, bias_V=None, softcap=None, scale=1.0)
        hidden = torch.randn(num_positions, D, requires_grad=True)
        fused(hidden, head, said, Objective(kd_weight=0.5), chunk_positions=64).total.backward()
    assert {rows for rows, columns in shapes if columns == D} == {16, 32, 64}


def identity_head() -> OutputHead:
    """With the identity as output matrix, hidden states are the logits."""
    return OutputHead(weight_VD=torch.eye(V), bias_V=None, softcap=None, scale=1.0)


def assert_gradient_of_logits(logits_NV: Tensor, said: Lesson, objective: Objective) -> None:
    """Number by number: a gradient that is small because a probability is must still be right."""
    hidden = logits_NV.clone().requires_grad_()
    sums = fused(hidden, identity_head(), said, objective)
    sums.total.backward()
    leaf = logits_NV.double().requires_grad_()
    expected, _, _ = true_loss(leaf, said, objective)
    expected.backward()
    assert float(sums.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-7)
    # Relative to the larger of the two sides that each number is a difference of.
    T = objective.temperature
    sides = [torch.softmax(z.double() / T, dim=1) for z in (logits_NV, said.teacher_NV)]
    assert ((hidden.grad.double() - leaf.grad).abs() <= 2e-5 * T * torch.maximum(*sides) * 50).all()
    torch.testing.assert_close(hidden.grad.double(), leaf.grad, rtol=1e-4, atol=1e-7)


def certain_of(kept: list[int]) -> Tensor:
    """A teacher with most of its mass on these ids and a real tail."""
    logits = torch.zeros(1, V)
    logits[0, kept] = 3.0
    return logits


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("log_q", [-4.0, -16.0, -25.0, -40.0, -60.0])
def test_the_students_tail_keeps_its_gradient_down_to_nothing(log_q: float, name: str):
    """The student puts all but e^log_q on the kept ids; the teacher's tail is real.  1 − Σ q would be NaN or 0."""
    said = lesson(certain_of([0, 1, 2]), [3])
    logits_1V = torch.full((1, V), log_q - torch.log(torch.tensor(V - 3.0)).item())
    logits_1V[0, :3] = torch.log(torch.tensor(1 / 3))
    assert_gradient_of_logits(logits_1V, said, Objective(kd_weight=1.0, **OBJECTIVES[name]))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("log_q", [-16.0, -40.0])
def test_a_kept_id_that_the_student_rules_out_keeps_its_gradient(log_q: float, name: str):
    """The student is certain of something else, which is off the kept ids or another of them."""
    for certain in (9, 1):
        logits_1V = torch.zeros(1, V)
        logits_1V[0, 0], logits_1V[0, certain] = log_q, 30.0
        said = lesson(certain_of([0, 1, 2]), [3])
        assert_gradient_of_logits(logits_1V, said, Objective(kd_weight=1.0, **OBJECTIVES[name]))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("log_tail", [-27.6, -60.0, -100.0])
def test_a_tiny_teacher_tail_is_taken_at_its_word(log_tail: float, name: str):
    """e^-27.6 is 1e-12."""
    teacher_1V = torch.full((1, V), log_tail - torch.log(torch.tensor(V - 4.0)).item())
    teacher_1V[0, :4] = 0.0
    logits_1V = torch.randn(1, V, generator=torch.Generator().manual_seed(4))
    assert_gradient_of_logits(logits_1V, lesson(teacher_1V, [4]), Objective(kd_weight=1.0, **OBJECTIVES[name]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "reverse_kl"])
def test_an_empty_teacher_tail_drops_its_term_and_nothing_else(name: str, temperature: float):
    """The teacher rules all but four ids out for certain; the student does not."""
    teacher_1V = torch.full((1, V), -torch.inf)
    teacher_1V[0, :4] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    said = lesson(teacher_1V.clamp(min=-1e6), torch.arange(V)[None] < 4, temperature=temperature)
    assert torch.isneginf(said.targets.tail_logsum_N).all() or float(said.targets.tail_logsum_N) < -1e5
    empty = Targets(**{**vars(said.targets), "tail_logsum_N": torch.tensor([-torch.inf])})
    said = Lesson(**{**vars(said), "targets": empty})
    logits_1V = torch.randn(1, V, generator=torch.Generator().manual_seed(4))
    objective = Objective(kd_weight=1.0, temperature=temperature, **OBJECTIVES[name])
    assert_gradient_of_logits(logits_1V, said, objective)


@pytest.mark.parametrize("shift", [-3e4, 1e3, 3e4])
def test_what_all_logits_have_in_common_does_not_matter(shift: float):
    """Nothing compares a logit with a constant, and no sum loses the digits of their differences."""
    said = lesson(teacher(11), UNEVEN)
    logits_NV = torch.round(teacher(12) * 64) / 64  # so that adding the shift is exact in fp32
    for name in OBJECTIVES:
        grads = []
        for added in (0.0, shift):
            hidden = (logits_NV + added).requires_grad_()
            fused(hidden, identity_head(), said, Objective(kd_weight=0.9, **OBJECTIVES[name])).total.backward()
            grads.append(hidden.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-9)


def test_a_position_of_weight_zero_has_exactly_no_influence():
    weights = torch.ones(N)
    weights[3] = 0.0
    said = lesson(teacher(7), [5] * N, weight_N=weights)
    results = []
    for shift in (0.0, 100.0):
        hidden, head = student()
        with torch.no_grad():
            hidden[3] += shift
        fused(hidden, head, said, Objective(kd_weight=0.5)).total.backward()
        assert not hidden.grad[3].any()
        results.append((hidden.grad, head.weight_VD.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_what_padding_of_the_kept_ids_holds_does_not_matter():
    said = lesson(teacher(8), [2, 9] * 5 + [4])
    padding = ~said.targets.is_kept_NK
    assert padding.any()
    for name in OBJECTIVES:
        grads = []
        for value in (0.0, -3.0):
            logp = said.targets.kept_logp_NK.masked_fill(padding, value)
            changed = Lesson(**{**vars(said), "targets": Targets(**{**vars(said.targets), "kept_logp_NK": logp})})
            hidden, head = student()
            fused(hidden, head, changed, Objective(kd_weight=1.0, **OBJECTIVES[name])).total.backward()
            grads.append((hidden.grad, head.weight_VD.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])


def test_without_a_teacher_it_is_cross_entropy():
    hidden, head = student()
    said = lesson(teacher(0), [5] * N)
    none = {name: getattr(said.targets, name)[:, :0] for name in ("kept_ids_NK", "kept_logp_NK", "is_kept_NK")}
    labels = Lesson(**{**vars(said), "targets": Targets(**{**vars(said.targets), **none})})
    sums = fused(hidden, head, labels, Objective(kd_weight=0.0, temperature=2.0))
    sums.total.backward()
    logits, (leaf_hidden, leaf_weight) = plain_logits(hidden, head, torch.float64)
    F.cross_entropy(logits, said.label_N).backward()
    torch.testing.assert_close(hidden.grad.double(), leaf_hidden.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(head.weight_VD.grad.double(), leaf_weight.grad, rtol=1e-4, atol=1e-7)
    assert float(sums.kd) == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_positions_at_all_is_zero_and_not_nan(name: str):
    said = lesson(teacher(0), [5] * N)
    hidden, head = student()
    objective = Objective(kd_weight=1.0, **OBJECTIVES[name])
    sums = fused_linear_loss(hidden[:0], head, said.targets[:0], objective, denominator=1.0)
    sums.total.backward()
    assert float(sums.total.detach()) == 0.0
    assert not head.weight_VD.grad.any()
    assert not hidden.grad.any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_position_that_keeps_nothing_says_nothing(name: str):
    """Its whole mass is the tail's, on both sides: no divergence, no gradient, no NaN."""
    said = lesson(teacher(13), [0, 5] * 5 + [0])
    assert_true(*student(), said, Objective(kd_weight=0.7, **OBJECTIVES[name]))
    kd_only = Objective(kd_weight=1.0, **OBJECTIVES[name])
    hidden, head = student()
    fused(hidden, head, said, kd_only).total.backward()
    assert not hidden.grad[::2].any()


def test_a_frozen_output_matrix_gets_no_gradient_and_costs_no_product(monkeypatch: pytest.MonkeyPatch):
    said, objective = lesson(teacher(9), [5] * N), Objective(kd_weight=0.5)
    hidden, head = student()
    fused(hidden, head, said, objective).total.backward()
    again, frozen = student()
    frozen.weight_VD.requires_grad_(False)
    monkeypatch.setattr("student_train.fused_linear._accumulate", None)  # would fail if called
    fused(again, frozen, said, objective).total.backward()
    assert frozen.weight_VD.grad is None
    assert torch.equal(again.grad, hidden.grad)


def test_an_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    said, objective = lesson(teacher(9), [5] * N), Objective(kd_weight=0.5)
    hidden, head = student()
    with_gradient = fused(hidden, head, said, objective)
    monkeypatch.setattr("torch.autograd.grad", None)  # would fail if called
    with torch.no_grad():
        without = fused(hidden, head, said, objective)
    assert not without.total.requires_grad
    assert torch.equal(without.total, with_gradient.total.detach())


def test_the_loss_can_be_scaled_and_is_differentiated_once():
    said, objective = lesson(teacher(9), [5] * N), Objective(kd_weight=0.5)
    hidden, head = student()
    fused(hidden, head, said, objective).total.backward()
    scaled, same_head = student()
    total = fused(scaled, same_head, said, objective).total * 8.0
    total.backward(retain_graph=True)
    torch.testing.assert_close(scaled.grad, hidden.grad * 8.0, rtol=0, atol=0)
    torch.testing.assert_close(same_head.weight_VD.grad, head.weight_VD.grad * 8.0, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="differentiated once"):
        total.backward()


def test_a_tied_matrix_gets_the_gradients_of_both_its_uses():
    """As embedding and as output matrix: autograd adds what the fused operation and the body hand it."""
    said, objective = lesson(teacher(14), UNEVEN), Objective(kd_weight=0.7)
    _, head = student()
    ids, mix = torch.arange(N) * 3 % V, torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    fused(head.weight_VD[ids] @ mix, head, said, objective).total.backward()
    weight = head.weight_VD.detach().double().requires_grad_()
    true_loss(weight[ids] @ mix.double() @ weight.T, said, objective)[0].backward()
    torch.testing.assert_close(head.weight_VD.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_a_gradient_of_the_gradient_is_refused():
    """It would be zero without a word."""
    hidden, head = student()
    total = fused(hidden, head, lesson(teacher(9), [5] * N), Objective(kd_weight=0.5)).total
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_under_a_checkpoint_the_body_runs_again_once():
    """And not for every block of the loss: its own differentiation is none of the checkpoint's business."""
    said, objective, runs = lesson(teacher(9), [5] * N), Objective(kd_weight=0.5), []
    hidden, head = student()

    def body_and_loss(x: Tensor) -> Tensor:
        runs.append(len(x))
        return fused(x.exp(), head, said, objective, chunk_positions=2).total

    checkpoint(body_and_loss, hidden, use_reentrant=False).backward()
    assert len(runs) == 2
    again, same_head = student()
    fused(again.exp(), same_head, said, objective, chunk_positions=2).total.backward()
    assert torch.equal(hidden.grad, again.grad)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_has_no_say(default: torch.dtype):
    said, objective = lesson(teacher(9), [5] * N, temperature=2.0), Objective(kd_weight=0.5, temperature=2.0)
    hidden, head = student()
    expected = fused(hidden, head, said, objective)
    torch.set_default_dtype(default)
    try:
        found = fused(hidden, head, said, objective)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.total.dtype == torch.float32
    assert torch.equal(found.total.detach(), expected.total.detach())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_rules_out_all_that_is_not_kept_has_an_empty_tail(temperature: float):
    """As one whose padding rows have a bias of −∞: it is a student of the smaller vocabulary."""
    small, objective = 50, Objective(kd_weight=0.5, temperature=temperature)
    bias = torch.zeros(V).masked_fill(torch.arange(V) >= small, -torch.inf)
    head = OutputHead(weight_VD=torch.eye(V), bias_V=bias, softcap=None, scale=1.0)
    said = lesson(teacher(16)[:, :small], [small] * N, temperature=temperature)
    hidden = teacher(15).requires_grad_()
    total = fused(hidden, head, said, objective).total
    total.backward()
    leaf = teacher(15)[:, :small].double().requires_grad_()
    expected, _, _ = true_loss(leaf, said, objective)
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(hidden.grad[:, :small].double(), leaf.grad, rtol=1e-4, atol=1e-6)
    assert not hidden.grad[:, small:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (N - 1, D)}, "11 targets and a weight of .* need hidden states of"),
        ({"hidden": (N, D + 1)}, r"hidden states of \(11, 7\), got \(11, 8\)"),
        ({"hidden": (1, N, D)}, r"got \(1, 11, 7\)"),
        ({"objective": {"temperature": 2.0}}, "needs targets with tail_at 2.0 .*, got 1.0"),
        ({"objective": {"tail": "none"}}, "tail: none .* tail_at None .*, got 1.0"),
        ({"dtype": torch.float16}, "got float16"),
        ({"denominator": 0.0}, "denominator is above 0"),
        ({"chunk_positions": 0}, "chunk_positions at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_cut_to_fit(change: dict[str, Any], message: str):
    said, dtype = lesson(teacher(9), [5] * N), change.get("dtype", torch.float32)
    hidden = torch.zeros(change.get("hidden", (N, D)), dtype=dtype)
    head = OutputHead(weight_VD=torch.zeros(V, D, dtype=dtype), bias_V=None, softcap=None, scale=1.0)
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(
            hidden,
            head,
            said.targets,
            Objective(kd_weight=0.5, **change.get("objective", {})),
            denominator=change.get("denominator", 1.0),
            chunk_positions=change.get("chunk_positions"),
        )


def test_sampled_targets_are_not_taken_for_kept_ones():
    said = lesson(teacher(9), [], sampled_NV=torch.softmax(teacher(9), dim=1))
    with pytest.raises(ValueError, match=r"tail: bucket .* tail_at 1.0 .*, got None"):
        fused(*student(), said, Objective(kd_weight=0.5))
