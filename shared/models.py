"""Loading Hugging Face models and tokenizers, and taking a model apart into its body and its output head.

Both phases apply the head by hand, chunk by chunk, so that logits of all positions never live at once.
That is right only if nothing else happens between hidden states and logits, so `split_model` compares the two
with the model's own forward pass on a few tokens and refuses a model where they differ.

Shapes: N rows of hidden states, D hidden size, V = config.vocab_size.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from shared.errors import ConfigError, MismatchError
from shared.models_config import ModelSettings
from shared.pretrained import foreign_errors, has_softcap, load_config

PROBE_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """From hidden states to logits: softcap(scale · (hidden @ weightᵀ + bias)).

    `softcap` is Gemma's c · tanh(z / c); `scale` is Cohere's logit_scale or the inverse of Granite's logits_scaling.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    scale: float

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]

    def of_vocabulary(self, vocab_size: int) -> "OutputHead":
        """Without the rows of the matrix that lie beyond, which are padding."""
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, weight_VD=self.weight_VD[:vocab_size], bias_V=bias_V)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits [N, V].  The matrix product runs in the model's dtype, all that follows in fp32."""
        return self.finish_(nn.functional.linear(hidden_ND, self.weight_VD).float())

    def finish_(self, product_NV: Tensor) -> Tensor:
        """Logits of fp32 hidden @ weightᵀ, in place of it."""
        if self.bias_V is not None:
            product_NV.add_(self.bias_V)
        if self.scale != 1.0:
            product_NV.mul_(self.scale)
        if self.softcap is not None:
            product_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return product_NV


def load_model(
    settings: ModelSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    device_map: str | dict[str, int | str] | None = None,
) -> Any:
    """A causal language model from safetensors, every weight accounted for; with a `device_map` spread as it says.

    Raises:
        ConfigError: no such model, or one that needs remote code.
        MismatchError: weights are missing or have other shapes; transformers alone would fill them with noise.
    """
    if device_map is not None and find_spec("accelerate") is None:
        raise ConfigError(
            "device_map needs accelerate, which is not installed", next_step="pip install 'logitferry[device-map]'"
        )
    attention = "eager" if has_softcap(load_config(settings)) else None
    with foreign_errors("model", settings.model):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            settings.model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, report = loaded
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise MismatchError(
            f"the checkpoint {settings.model!r} lacks {len(lacking)} weights of its architecture, first {lacking[0]}",
            next_step="check that config.json and the weights belong to one model",
        )
    return model if device_map is not None else model.to(device)


def split_model(model: Any) -> tuple[nn.Module, OutputHead]:
    """The model's body (token ids to hidden states) and its head, checked against the model itself.

    Raises:
        MismatchError: body and head together do not give the model's own logits.
    """
    body, head = model.base_model, output_head(model)
    probe = torch.arange(PROBE_TOKENS, device=head.weight_VD.device)[None] % head.vocab_size
    hidden: list[Tensor] = []
    hook = body.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.last_hidden_state))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=probe).logits.float()
            got = head.logits(hidden[0].to(head.weight_VD.device)) if hidden else expected.new_zeros(0)
            expected = expected.to(got.device)
    finally:
        hook.remove()
        model.train(was_training)
    # As a whole, not number by number: rounding averages out, a factor of 0.99 does not.
    tolerance = max(1e-5, torch.finfo(head.weight_VD.dtype).eps)
    same_shape = expected.shape == got.shape
    difference = float((expected - got).norm() / expected.norm()) if same_shape else float("inf")
    if not difference <= tolerance:
        raise MismatchError(
            f"{type(model).__name__} does more between its hidden states and its logits than a matrix, a bias, a scale "
            f"and a softcap: by hand {tuple(got.shape)}, its own {tuple(expected.shape)}, relative difference "
            f"{difference:.1e} where rounding explains {tolerance:.1e}",
            next_step="this architecture is not supported yet; please report it with its config.json",
        )
    return body, head


def output_head(model: Any) -> OutputHead:
    """The head as the config describes it; `split_model` checks that the description is complete."""
    config = model.config.get_text_config()
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise MismatchError(f"{type(model).__name__} has no linear output layer")
    scale = getattr(config, "logit_scale", None) or 1.0
    return OutputHead(
        weight_VD=layer.weight,
        bias_V=layer.bias,
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
    )
