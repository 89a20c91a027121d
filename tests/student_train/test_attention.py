"""Packed rows: hidden states and gradients are those of each row alone, and a model that mixes rows is found out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from shared.batching import PaddedBatch
from shared.errors import MismatchError
from shared.models import load_model
from shared.models_config import ModelSettings
from shared.rows import Row
from student_train.attention import Attention, settle_attention, varlen_attention
from student_train.objective import Objective
from student_train.packing import Shape
from student_train.passes import PassMaker
from tests.tiny import FAMILIES, make_model

CPU = torch.device("cpu")
LENGTHS = [9, 1, 30, 17, 2, 24, 5]


def load(folder: Path) -> Any:
    return load_model(ModelSettings(model=str(folder)), dtype=torch.float32, device=CPU)


def made_rows(lengths: list[int] = LENGTHS) -> list[Row]:
    random = np.random.default_rng(3)
    return [
        Row(
            sample_id=str(n),
            input_ids_L=random.integers(300, size=length).astype(np.int32),
            label_mask_L=(random.random(length) < 0.7) & (np.arange(length) > 0),
        )
        for n, length in enumerate(lengths)
    ]


def maker(shape: Shape) -> PassMaker:
    return PassMaker(objective=Objective(kd_weight=0.0), shape=shape, vocab_size=307, device=CPU)


def gradients(model: Any, passes: list[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Of a sum over hidden states that gives each number of each position a weight of its own."""
    model.zero_grad()
    for hidden in passes:
        out = hidden()
        (out.tanh() * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


SHAPES = {
    "varlen": Shape(batch_tokens=40, line_tokens=40),
    "varlen static": Shape(batch_tokens=40, line_tokens=40, is_static=True),
    "sdpa": Shape(batch_tokens=90, line_tokens=32),
    "sdpa static": Shape(batch_tokens=90, line_tokens=32, is_static=True),
    "eager": Shape(batch_tokens=90, line_tokens=32),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("family", ["qwen2", "gemma2_softcap", "phi_bias", "mistral_window"])
def test_packed_rows_have_the_hidden_states_and_gradients_of_each_row_alone(family: str, kind: str, tmp_path: Path):
    """In the window's case the longest rows exceed it."""
    name, shape = kind.split()[0], SHAPES[kind]
    if family == "mistral_window":
        config = transformers.MistralConfig(
            vocab_size=307, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=12, sliding_window=8,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    else:
        make_model(tmp_path, family=family)
    model, rows = load(tmp_path), made_rows()
    if family == "gemma2_softcap" and name != "eager":
        pytest.skip("its softcap is applied by eager attention alone")
    alone = [PaddedBatch.of([row], CPU) for row in rows]
    expected = gradients(model, [lambda batch=batch: batch.hidden_at_positions(model.base_model) for batch in alone])
    by_label = torch.cat([batch.hidden_at_positions(model.base_model) for batch in alone])

    attention = settle_attention(model, name, is_static=False)  # pyright: ignore[reportArgumentType]
    passes, waste = maker(shape).make(rows)
    assert len(passes) > 1
    assert (waste > 0) == shape.is_static
    got = gradients(model, [lambda each=each: each.hidden_at_positions(model.base_model, attention)
                            [: int(each.targets.weight_N.sum())] for each in passes])  # fmt: skip
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            got[parameter], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=parameter: f"{n}: {m}"
        )

    hidden = torch.cat([each.hidden_at_positions(model.base_model, attention) for each in passes])
    counted = torch.cat([each.targets.weight_N for each in passes]) > 0
    labels = torch.cat([each.targets.label_N for each in passes])[counted]
    assert sorted(labels.tolist()) == sorted(label for row in rows for label in row.label_ids_P.tolist())
    # Rows lie in another order: match them by their hidden states.
    distances = torch.cdist(hidden[counted], by_label, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distances.min(dim=0).values.max().detach()) < 1e-3
    if shape.is_static:
        assert len({tuple(each.input_ids_BL.shape) for each in passes}) == 1
        assert len({len(each.source_N) for each in passes}) == 1


def test_padding_never_asks_for_a_position_beyond_the_longest_row():
    """GPT-2 and its kin have an embedding for each position, and no more."""
    passes, _ = maker(Shape(batch_tokens=64, line_tokens=64, is_static=True)).make(made_rows([5, 7]))
    assert int(passes[0].position_ids_BL.max()) == 6
    assert sum(passes[0].document_lengths) == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_left_to_itself_it_takes_the_quickest_that_is_right(family: str, tmp_path: Path):
    model = load(make_model(tmp_path, family=family))
    has_softcap = family == "gemma2_softcap"
    own = model.config._attn_implementation
    assert settle_attention(model, "auto", is_static=False).name == (None if has_softcap else "varlen")
    assert (model.config._attn_implementation == own) == has_softcap
    model = load(tmp_path)
    assert settle_attention(model, "auto", is_static=True).name == ("eager" if has_softcap else "sdpa")


def test_a_softcap_is_never_left_out(tmp_path: Path):
    """In bfloat16 a few tokens would not show it: their difference drowns in rounding."""
    folder = make_model(tmp_path, family="gemma2_softcap", attn_logit_softcapping=5.0)
    model = load_model(ModelSettings(model=str(folder)), dtype=torch.bfloat16, device=CPU)
    with pytest.raises(MismatchError, match="knows nothing of softcap"):
        settle_attention(model, "varlen", is_static=False)
    assert settle_attention(model, "auto", is_static=False) == Attention(None)


def test_a_window_that_is_a_masks_alone_is_found(tmp_path: Path):
    """Phi's experts never tell their attention of it; it would be left out without a word."""
    config = transformers.PhimoeConfig(
        vocab_size=307, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=32, max_position_embeddings=512, num_local_experts=2, bos_token_id=None,
    )  # fmt: skip
    transformers.PhimoeForCausalLM(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(MismatchError, match="its sliding_window of 32 is a mask's"):
        settle_attention(model, "varlen", is_static=False)
    assert settle_attention(model, "auto", is_static=True).name == "sdpa"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row_are_not_packed(kind: str, tmp_path: Path):
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, **factors}
    model = load(make_model(tmp_path, rope_parameters=rope))
    assert settle_attention(model, "auto", is_static=False) == Attention(None)
    with pytest.raises(MismatchError, match=f"cannot be packed: its {kind} positions depend on the longest row"):
        settle_attention(model, "sdpa", is_static=False)


def test_a_context_shorter_than_the_trial_is_tried_within_it(tmp_path: Path):
    config = transformers.GPT2Config(vocab_size=307, n_embd=24, n_layer=1, n_head=2, n_positions=4, bos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert settle_attention(load(tmp_path), "auto", is_static=False).name in ("varlen", None)


def mixing(model: Any) -> Any:
    """A model with a convolution along the line, as state space models have one: attention is not all that mixes."""
    layer = model.base_model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda hidden: forward(hidden + 1e-3 * F.pad(hidden, (0, 0, 1, 0))[:, :-1])
    return model


def test_a_model_that_mixes_rows_is_not_packed_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = mixing(load(make_model(tmp_path)))
    own = model.config._attn_implementation
    with caplog.at_level("INFO", "logitferry"):
        assert settle_attention(model, "auto", is_static=False) == Attention(None)
    assert "attention varlen cannot pack Qwen2ForCausalLM: a document" in caplog.text
    assert "rows are padded, not packed" in caplog.text
    assert model.config._attn_implementation == own
    with pytest.raises(MismatchError, match=r"attention sdpa: Qwen2ForCausalLM cannot be packed with it: a document"):
        settle_attention(model, "sdpa", is_static=False)


def test_an_influence_too_small_for_a_tolerance_is_found_by_its_bits(tmp_path: Path):
    model = load(make_model(tmp_path))
    layer = model.base_model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda hidden: forward(hidden + 1e-6 * F.pad(hidden, (0, 0, 5, 0))[:, :-5])
    with pytest.raises(MismatchError, match="a document has an influence on those behind it"):
        settle_attention(model, "varlen", is_static=False)


def test_a_kernel_that_is_not_there_is_told_with_its_reason(tmp_path: Path):
    model = load(make_model(tmp_path))
    with pytest.raises(MismatchError, match=r"attention flash_attention_2: (.|\n)*next: take student.attention: auto"):
        settle_attention(model, "flash_attention_2", is_static=False)
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()


@pytest.mark.parametrize("window", [None, 3, 100])
def test_attention_within_documents_is_that_of_a_mask_written_out(window: int | None):
    torch.manual_seed(0)
    lengths, heads, groups, width = (4, 1, 9), 6, 2, 5
    query = torch.randn(1, heads, sum(lengths), width)
    key, value = torch.randn(2, 1, groups, sum(lengths), width)
    got, _ = varlen_attention(
        nn.Module(), query, key, value, None, document_lengths=lengths, scaling=0.3, sliding_window=window
    )
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    sees = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        sees &= place[:, None] - place < window
    scores = (query @ key.repeat_interleave(heads // groups, dim=1).mT * 0.3).masked_fill(~sees, -torch.inf)
    expected = (scores.softmax(-1) @ value.repeat_interleave(heads // groups, dim=1)).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_mask_is_refused_by_what_knows_documents_alone():
    with pytest.raises(ValueError, match="takes documents, not a mask"):
        varlen_attention(nn.Module(), *torch.randn(3, 1, 2, 4, 5), torch.ones(1, 4))


def test_a_trained_model_is_saved_without_the_name_of_our_attention(tmp_path: Path):
    model = load(make_model(tmp_path / "start"))
    assert settle_attention(model, "auto", is_static=False).name == "varlen"
    model.save_pretrained(tmp_path / "end")
    assert "logitferry" not in (tmp_path / "end/config.json").read_text()
