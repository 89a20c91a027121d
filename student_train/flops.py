"""Operations of a training step, as the model FLOPs utilisation counts them: those that the model asks for.

After PaLM (Chowdhery et al., arXiv 2204.02311, appendix B): 2 per weight and token forward, 4 backward, and attention's
two products; what is computed again or for padding counts for nothing.  Here, beyond that:

- the output matrix is multiplied at supervised positions alone (`student_train.fused_linear`), and an embedding is
  looked up;
- a frozen weight has no gradient: 4 per weight and token, not 6;
- of a mixture of experts those count that a token is sent to;
- attention is causal and stays within documents: the pairs of a document are ½·L², or W·L − ½·W² in a window of W.

Left out are norms, activations, rotary angles, and what state spaces and linear attention do beside their matrices.
Frozen weights below the first adapter would need no gradient of their input either, which 4 takes them to have.

Multiplication and addition count as one operation each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from student_train.attention import evaluating

PROBE = "logitferry_attention_probe"
PROBE_TOKENS = 8


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer's attention multiplies with."""

    width: int
    """Of queries and values together, summed over the heads that ask."""
    window: int | None = None
    """Tokens that one sees, itself included; None for all before it."""

    def pairs(self, num_tokens: int) -> float:
        """Of tokens that see each other in a document."""
        seen = num_tokens if self.window is None else min(num_tokens, self.window)
        return seen * num_tokens - seen**2 / 2


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of a model, forward and backward."""

    per_token: float
    """Of the body's matrices."""
    per_position: float
    """Of the output matrix."""
    attention: tuple[AttentionLayer, ...]

    @staticmethod
    def of(model: Any) -> "Flops":
        """Counted from the weights that a model has, and from what its layers hand to their attention."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        skipped = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        skipped |= {id(parameter) for parameter in head.parameters()}
        share = _active_share(config)
        per_token = sum(
            _per_use(parameter) * (share if ".experts." in name else 1.0)
            for name, parameter in model.named_parameters()
            if id(parameter) not in skipped and parameter.ndim >= 2 and not name.endswith("bias")
        )
        return Flops(
            per_token=per_token, per_position=_per_use(head.weight), attention=tuple(_attention_layers(model, config))
        )

    def of_step(self, document_lengths: Sequence[int], positions: int) -> float:
        """Of all rows of a step, with so many supervised positions between them."""
        matrices = self.per_token * sum(document_lengths) + self.per_position * positions
        return matrices + self.of_attention(document_lengths)

    def of_attention(self, document_lengths: Sequence[int]) -> float:
        """Of queries with keys and of probabilities with values, forward and twice that backward."""
        return sum(6 * layer.width * layer.pairs(length) for layer in self.attention for length in document_lengths)


def _per_use(weight: Tensor) -> float:
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


def _active_share(config: Any) -> float:
    """Of a layer's experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    counts = [count for name in names if (count := getattr(config, name, None))]
    active = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    return active / counts[0] if counts and active else 1.0


def _attention_layers(model: Any, config: Any) -> list[AttentionLayer]:
    """As found in a forward pass of a few tokens; as its config says where a model has an attention of its own."""
    found: list[AttentionLayer] = []
    own = model.config._attn_implementation
    ids_BL = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad(), evaluating(model):
            model.set_attn_implementation(PROBE)
            model.base_model(input_ids=ids_BL, use_cache=False, taken_down=found)
    except Exception:  # whatever a model's own code raises for what it does not know
        found = []
    finally:
        model.set_attn_implementation(own)
    if found:
        return found
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return [AttentionLayer(2 * width, getattr(config, "sliding_window", None))] * config.num_hidden_layers


def _probe(
    _module: nn.Module,
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    _mask: Tensor | None,
    *,
    taken_down: list[AttentionLayer],
    sliding_window: int | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    num_heads = query_BHLD.shape[1]
    taken_down.append(AttentionLayer(num_heads * (query_BHLD.shape[3] + value_BGLD.shape[3]), sliding_window))
    is_grouped = num_heads != key_BGLD.shape[1]
    attended = F.scaled_dot_product_attention(query_BHLD, key_BGLD, value_BGLD, is_causal=True, enable_gqa=is_grouped)
    return attended.transpose(1, 2), None


AttentionInterface.register(PROBE, _probe)
AttentionMaskInterface.register(PROBE, lambda *_, **__: None)
