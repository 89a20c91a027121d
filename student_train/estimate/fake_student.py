"""A student without numbers, and what lives at once while it goes through a pass.

The very forward pass, loss and backward pass run on fake tensors.  So attention counts as what it keeps, a frozen
weight has no gradient, and gradient checkpointing, autocast's copies of weights and the loss's chunks are what they
are.

Shapes: B lines of a pass, L their tokens, N supervised positions, K kept.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.device import pick_dtype
from shared.errors import MismatchError
from shared.interruption import held_back
from shared.models import output_head
from shared.pretrained import foreign_errors, has_softcap, load_config
from student_train.attention import VARLEN, Attention
from student_train.config import StudentSettings
from student_train.estimate.live import Live
from student_train.fused_linear import fused_linear_loss, rows_of_chunk
from student_train.lora import add_adapters
from student_train.loss import Targets
from student_train.objective import Objective
from student_train.parallel import layers_of

KERNEL = "logitferry_kernel"
"""Attention that keeps what flash-attn's kernels keep: queries, keys, values, its result and a number per query."""


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """A forward pass, as far as memory is concerned."""

    num_lines: int
    line_tokens: int
    document_lengths: tuple[int, ...]
    """Of all lines, one behind the other, padding included."""
    num_positions: int
    num_kept: int

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return self.num_lines * self.line_tokens

    @property
    def extent(self) -> tuple[int, int]:
        """To tell the fuller one of two."""
        return self.num_tokens, self.num_positions


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of what a model consists of."""

    weights: int
    trained: int
    largest_trained: int
    layer: int
    """Of the largest layer."""
    rest: int
    """Of what is in no layer."""

    @staticmethod
    def of(model: nn.Module) -> "Sizes":
        parameters = list(model.parameters())
        trained = [parameter.nbytes for parameter in parameters if parameter.requires_grad]
        layers = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers_of(model)]
        weights = sum(parameter.nbytes for parameter in parameters)
        return Sizes(
            weights=weights + sum(buffer.nbytes for buffer in model.buffers()),
            trained=sum(trained),
            largest_trained=max(trained, default=0),
            layer=max(layers, default=0),
            rest=weights - sum(layers),
        )


class FakeStudent:
    """A model without numbers, from its config alone.

    Raises:
        ConfigError: there is no such config, or it needs remote code.
        MismatchError: a fake step of it cannot be computed.
    """

    def __init__(
        self,
        settings: StudentSettings,
        attention: Attention,
        *,
        on_accelerator: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.settings, self.attention, self.on_accelerator = settings, attention, on_accelerator
        self._mode = FakeTensorMode()
        config = load_config(settings)
        with torch.device("meta"), foreign_errors("model", settings.model):
            self.model: Any = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype or pick_dtype(settings.dtype), trust_remote_code=settings.trust_remote_code
            )
            if settings.lora:
                add_adapters(self.model, settings.lora)
        with self._mode:
            _fake_(self.model)
            if name := {"varlen": VARLEN, "flash_attention_2": KERNEL}.get(attention.name or "", attention.name):
                self.model.set_attn_implementation(name)
            elif has_softcap(config):
                self.model.set_attn_implementation("eager")
            if settings.gradient_checkpointing:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.sizes = Sizes.of(self.model)
        self.vocab_size = output_head(self.model).vocab_size

    def without_numbers(self) -> AbstractContextManager[Any]:
        """Within, tensors that are made have shapes alone, as those of the model."""
        return self._mode

    def peaks(
        self, shape: PassShape, objective: Objective, *, chunk_positions: int | None, accumulates: bool
    ) -> "PassPeaks":
        """Of one forward and backward pass; where it `accumulates`, there are gradients of another pass already."""
        try:
            # An interrupt would be lost where Python lets go of a tensor.
            with held_back() as interruption, self.without_numbers():
                found = self._peaks(shape, objective, chunk_positions, accumulates)
            interruption.hand_on()
            return found
        except Exception as error:  # whatever a model's own code raises where it looks at numbers
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MismatchError(
                f"what {type(self.model).__name__} keeps of a pass cannot be told beforehand: {reason}",
                next_step="run it for two steps, with --set steps=2, and watch the device's memory",
            ) from error

    def _peaks(
        self, shape: PassShape, objective: Objective, chunk_positions: int | None, accumulates: bool
    ) -> "PassPeaks":
        if self.attention.name == "varlen" and self._keeps_probabilities():
            shape = _as_lines(shape)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if accumulates else None
        # FSDP2 gathers weights in the dtype of the products; then nothing is cast in the pass.
        asked = pick_dtype(self.settings.product_dtype)
        is_mixed = next(self.model.parameters()).dtype != asked
        kernels = sdpa_kernel(SDPBackend.MATH) if self._keeps_probabilities() else nullcontext()
        with kernels, Live() as live:
            live.see([*self.model.parameters(), *self.model.buffers(), *(each.grad for each in parameters)])
            before = live.mark()
            ids_BL = torch.empty(shape.num_lines, shape.line_tokens, dtype=torch.int64)
            source_N = torch.empty(shape.num_positions, dtype=torch.int64)
            targets = _targets(shape, objective)
            with torch.autocast("cpu", asked) if is_mixed else nullcontext():
                arguments = self._arguments(ids_BL, shape.document_lengths)
                hidden_BLD = self.model.base_model(input_ids=ids_BL, use_cache=False, **arguments).last_hidden_state
                hidden_ND = hidden_BLD.flatten(0, 1)[source_N]
                del hidden_BLD
                kept, in_body = live.now, live.mark()
                # One chunk needs as much as all, but for the gradient of the other hidden states.
                num_rows = min(shape.num_positions, self.chunk_rows(shape.num_positions, chunk_positions))
                rest = torch.empty_like(hidden_ND[num_rows:])
                loss = fused_linear_loss(
                    hidden_ND[:num_rows],
                    output_head(self.model),
                    targets[:num_rows],
                    objective,
                    denominator=1.0,
                    chunk_positions=chunk_positions,
                )
            in_loss = live.mark()
            del rest, hidden_ND
            loss.total.backward()
            in_backward = live.mark()
        for parameter in parameters:
            parameter.grad = None
        return PassPeaks(before=before, kept=kept, body=in_body, loss=in_loss, backward=in_backward)

    def chunk_rows(self, num_positions: int, chunk_positions: int | None) -> int:
        """Positions whose logits live at once; as the loss has it."""
        dtype = pick_dtype(self.settings.product_dtype)
        return rows_of_chunk(num_positions, self.vocab_size, dtype, asked=chunk_positions)

    def _arguments(self, ids_BL: Tensor, document_lengths: tuple[int, ...]) -> dict[str, Any]:
        if self.attention.name is None:
            return {}
        position_ids_BL = torch.zeros_like(ids_BL)
        if self.attention.name in ("sdpa", "eager"):
            # transformers looks at the positions to make this mask of them; without numbers it is given.
            num_lines, line_tokens = ids_BL.shape
            is_seen = torch.ones(num_lines, 1, line_tokens, line_tokens, dtype=torch.bool)
            dtype = self.model.dtype
            mask = is_seen if self.attention.name == "sdpa" else torch.zeros_like(is_seen, dtype=dtype)
            return {"position_ids": position_ids_BL, "attention_mask": mask}
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        lengths = _as_few(document_lengths, window if self.attention.name == "varlen" else None)
        return {"position_ids": position_ids_BL, "document_lengths": lengths}

    def _keeps_probabilities(self) -> bool:
        """Whether attention of all pairs is kept: torch has no kernel off the CPU for fp32 and heads that share keys.

        Source: torch.nn.functional.scaled_dot_product_attention, on enable_gqa.
        """
        config = self.model.config.get_text_config()
        shares_keys = (getattr(config, "num_key_value_heads", None) or math.inf) < config.num_attention_heads
        is_fp32 = self.settings.product_dtype == "float32"
        return self.on_accelerator and is_fp32 and shares_keys and self.attention.name in (None, "varlen")


@dataclass(frozen=True, kw_only=True)
class PassPeaks:
    """Bytes that live at once: before a pass, behind the body, and at most in each of its three parts."""

    before: int
    kept: int
    body: int
    loss: int
    backward: int


def _as_few(lengths: Sequence[int], window: int | None) -> list[int]:
    """Documents that need as much memory, and are sooner gone through: what needs no mask may as well be one."""
    if window is None:
        return [sum(lengths)]
    masked = [length for length in lengths if length > window]
    rest = sum(lengths) - sum(masked)
    return masked + [window] * (rest // window) + [rest % window] * (rest % window > 0)


def _as_lines(shape: PassShape) -> PassShape:
    """Its documents as lines of one length, with as many tokens and pairs; they are gone through at once."""
    tokens, pairs = sum(shape.document_lengths), sum(length**2 for length in shape.document_lengths)
    num_lines = max(1, round(tokens**2 / pairs))
    length = -(-tokens // num_lines)
    return replace(shape, num_lines=num_lines, line_tokens=length, document_lengths=(length,))


def _fake_(model: nn.Module) -> None:
    """Put fake tensors on the CPU, where autocast works, in place of those on no device."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False):
            if id(own) not in fakes:  # as those that are tied stay so
                fakes[id(own)] = nn.Parameter(torch.empty(own.shape, dtype=own.dtype), own.requires_grad)
            setattr(module, name, fakes[id(own)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _targets(shape: PassShape, objective: Objective) -> Targets:
    num_positions, num_kept = shape.num_positions, shape.num_kept
    number_N = torch.empty(num_positions)
    return Targets(
        label_N=torch.empty(num_positions, dtype=torch.int64),
        weight_N=number_N,
        kept_ids_NK=torch.empty(num_positions, num_kept, dtype=torch.int64),
        kept_logp_NK=torch.empty(num_positions, num_kept),
        is_kept_NK=torch.empty(num_positions, num_kept, dtype=torch.bool),
        tail_logsum_N=number_N,
        entropy_N=number_N,
        tail_at=None if objective.tail == "none" else objective.temperature,
    )


def _kernel_attention(
    _module: nn.Module,
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    _mask: Tensor | None,
    **_others: Any,
) -> tuple[Tensor, None]:
    is_grouped = query_BHLD.shape[1] != key_BGLD.shape[1]
    attended = F.scaled_dot_product_attention(query_BHLD, key_BGLD, value_BGLD, is_causal=True, enable_gqa=is_grouped)
    return attended.transpose(1, 2), None


transformers.AttentionInterface.register(KERNEL, _kernel_attention)
transformers.AttentionMaskInterface.register(KERNEL, lambda *_, **__: None)
