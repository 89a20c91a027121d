"""Operations of a step, against torch's own counter on real models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shared.device import peak_flops, peak_flops_of
from student_train.attention import evaluating
from student_train.config import LoraSettings
from student_train.flops import AttentionLayer, Flops
from student_train.lora import add_adapters
from tests.tiny import FAMILIES, SHAPE, make_model

DOCUMENTS = (37, 5, 64)
POSITIONS = (16, 2, 31)


def counted(model: Any) -> int:
    """Of one forward and backward pass, by torch, which takes attention to see what lies ahead as well."""
    vocab_size = model.config.vocab_size
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, evaluating(model):
        for length, positions in zip(DOCUMENTS, POSITIONS, strict=True):
            ids = torch.arange(length)[None] % vocab_size
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :positions]
            # Not by the fused loss, which multiplies the very same, but in place, where the counter does not look.
            F.cross_entropy(model.get_output_embeddings()(hidden), ids[0, :positions]).backward()
    return counter.get_total_flops()


def family(name: str, **changes: Any) -> Any:
    kind, extra = FAMILIES[name]
    return getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**{**SHAPE, **extra, **changes})
    )


@pytest.mark.parametrize("name", ["qwen2", "llama_tied", "gemma2_softcap", "granite_scale", "phi_bias"])
def test_flops_are_those_that_torch_counts(name: str):
    model = family(name)
    flops = Flops.of(model)
    # Half of attention's pairs lie ahead of a token.  torch counts them, and rotary angles: 1 % of so small a model.
    expected = flops.of_step(DOCUMENTS, sum(POSITIONS)) + flops.of_attention(DOCUMENTS)
    assert flops.of_attention(DOCUMENTS) > 0.05 * expected
    assert counted(model) == pytest.approx(expected, rel=0.01)


def test_flops_of_frozen_weights_are_four_and_not_six():
    model = family("qwen2", num_hidden_layers=6)
    whole = Flops.of(model)
    add_adapters(model, LoraSettings(rank=4))
    flops = Flops.of(model)
    expected = flops.of_step(DOCUMENTS, sum(POSITIONS)) + flops.of_attention(DOCUMENTS)
    # Below the first adapter nothing has a gradient: of six layers that is a third of one layer's input projections.
    assert counted(model) == pytest.approx(expected, rel=0.02)
    assert flops.per_position == pytest.approx(4 / 6 * whole.per_position)


def test_flops_of_a_mixture_are_those_of_the_experts_that_a_token_is_sent_to():
    shape = {**SHAPE, "num_hidden_layers": 2, "moe_intermediate_size": 40}
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**shape, num_experts=6, num_experts_per_tok=2, tie_word_embeddings=False)
    )
    model.set_experts_implementation("eager")
    flops = Flops.of(model)
    expected = flops.of_step(DOCUMENTS, sum(POSITIONS)) + flops.of_attention(DOCUMENTS)
    assert counted(model) == pytest.approx(expected, rel=0.01)


def test_flops_of_tied_and_untied_models_are_the_same():
    assert Flops.of(family("qwen2")) == Flops.of(family("qwen2", tie_word_embeddings=True))


def test_flops_leave_a_model_as_it_was():
    model = family("qwen2").train()
    before = model.config._attn_implementation
    Flops.of(model)
    assert model.training
    assert model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flops_know_a_sliding_window():
    flops = Flops.of(family("gemma2_softcap", sliding_window=16))
    assert {layer.window for layer in flops.attention} == {16, None}


def test_flops_grow_with_the_supervised_positions():
    flops = Flops.of(family("qwen2"))
    assert flops.of_step([100], 60) - flops.of_step([100], 10) == 50 * 6 * 307 * 24


def test_pairs_are_half_of_the_square_and_stop_at_the_window():
    assert AttentionLayer(1).pairs(100) == 5000
    assert AttentionLayer(1, window=100).pairs(100) == 5000
    # Exactly Σ min(t, 10) but for the diagonal: what a token sees of itself counts half.
    assert AttentionLayer(1, window=10).pairs(100) == 950


def test_flops_of_what_torch_knows_nothing_about_come_from_the_config(monkeypatch: pytest.MonkeyPatch):
    model, other = family("llama_tied"), family("llama_tied")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda *_: None)
    assert Flops.of(model).attention == Flops.of(other).attention
    assert len(Flops.of(model).attention) == 2


def test_flops_of_a_saved_model(tmp_path: Path):
    """What stands in the file is what counts, whatever made it."""
    saved = transformers.AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    assert Flops.of(saved) == Flops.of(family("qwen2"))


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 NVL", torch.float16, 835.5e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, 67e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H20", torch.bfloat16, 148e12),
        ("NVIDIA GB200", torch.bfloat16, 2500e12),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362.05e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB", torch.float64, None),
        ("NVIDIA A1000", torch.bfloat16, None),
        ("Ascend910B3", torch.bfloat16, None),
        ("", torch.bfloat16, None),
    ],
)
def test_peak_is_that_of_the_device_and_dtype(name: str, dtype: torch.dtype, expected: float | None):
    assert peak_flops_of(name, dtype) == expected


def test_peak_of_a_cpu_is_not_known():
    assert peak_flops(torch.device("cpu"), torch.float32) is None
