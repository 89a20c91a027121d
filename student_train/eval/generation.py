"""What a student writes by itself: replies to prompts of ready token ids, in batches padded on the left.  They are
greedy, or drawn, see `sampling`.

Nothing of the checkpoint's generation_config but its end-of-sequence tokens has a say: a repetition penalty or a
temperature that somebody left there would make another model of it.

Memory: keys and values of `batch_rows` prompts and replies, and the logits of one token each.  Where that is too much,
the batch is halved, and stays so.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from shared.device import free_cached_memory, is_out_of_memory
from shared.errors import LogitferryError
from student_train.attention import VARLEN, evaluating
from student_train.eval.sampling import Draws, Sampling

logger = logging.getLogger("logitferry")


@dataclass(frozen=True, kw_only=True)
class Stops:
    """What ends a reply, and is no part of its text."""

    ids: frozenset[int]
    strings: tuple[str, ...] = ()

    @staticmethod
    def of(model: Any, tokenizer: Any, asked: Sequence[str] = ()) -> "Stops":
        """The end-of-sequence tokens of model and tokenizer, and what was asked for: tokens, or else strings.

        Of the model nothing but its two configs is looked at.
        """
        added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        ids = {added[each] for each in asked if each in added}
        for known in (tokenizer, model.config, model.generation_config):
            eos = getattr(known, "eos_token_id", None)
            ids |= set(eos if isinstance(eos, list | tuple) else [eos])
        return Stops(ids=frozenset(ids - {None}), strings=tuple(each for each in asked if each not in added))

    def and_ids(self, more: set[int]) -> "Stops":
        return Stops(ids=self.ids | more, strings=self.strings)

    def before(self, text: str) -> str:
        """A text up to the first of the strings."""
        ends = [place for each in self.strings if (place := text.find(each)) >= 0]
        return text[: min(ends, default=len(text))]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What followed a prompt."""

    ids: tuple[int, ...]
    """With the token that ended it, where one did."""
    text: str
    """Without what ended it."""
    is_cut: bool
    """Nothing ended it but the limit."""
    nll: float | None = None
    """Mean of −log p over its tokens at T = 1, in nats, by the model itself; known of what was drawn."""

    @property
    def num_tokens(self) -> int:
        """What ended it included."""
        return len(self.ids)


def take_own_attention(model: Any) -> None:
    """Give back to a model that was set to pack rows an attention that knows masks and keeps keys and values.

    `varlen` is chosen only where scaled_dot_product_attention does the same, so transformers' default does as well.
    """
    if model.config._attn_implementation == VARLEN:
        model.set_attn_implementation(model.get_correct_attn_implementation(None))


class Writer:
    """Writes replies with one model; the caller has seen to its attention.

    `context_tokens` is the most that prompt and reply may have together, where there is a limit; `section` is where the
    config has max_new_tokens and batch_rows, for messages.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        stops: Stops,
        max_new_tokens: int,
        batch_rows: int,
        context_tokens: int | None = None,
        compute_dtype: torch.dtype | None = None,
        section: str = "generate.",
    ) -> None:
        self._model, self._tokenizer, self._stops = model, tokenizer, stops
        self._max_new_tokens, self._context_tokens = max_new_tokens, context_tokens
        self._compute_dtype, self._section = compute_dtype, section
        self._device: torch.device = model.get_input_embeddings().weight.device
        self.batch_rows = batch_rows

    def room(self, prompt: Sequence[int]) -> int:
        """Tokens that a reply to it may have."""
        left = self._max_new_tokens if self._context_tokens is None else self._context_tokens - len(prompt)
        return min(self._max_new_tokens, left)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling | None = None,
        keys: Sequence[str] = (),
        on_written: Callable[[list[Reply]], None] = lambda _: None,
    ) -> list[Reply]:
        """A reply to each, in order.  Those of like length share a batch; the longest come first, where memory shows.

        With `sampling` each is drawn by its key, see `Draws`; `on_written` is told of every batch.

        Raises:
            LogitferryError: there is not enough memory for one.
        """
        left = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        replies: dict[int, Reply] = {}
        with evaluating(self._model):
            while left:
                batch = self._first_batch(prompts, left)
                room = self.room(prompts[batch[0]])
                draws = sampling and Draws(sampling, [keys[index] for index in batch], room, self._device)
                written = self._unless_out_of_memory([prompts[index] for index in batch], room, draws)
                if written is not None:
                    replies.update(zip(batch, written, strict=True))
                    left = left[len(batch) :]
                    on_written(written)
        return [replies[index] for index in range(len(prompts))]

    def _first_batch(self, prompts: Sequence[Sequence[int]], left: list[int]) -> list[int]:
        """The first of what is left, all with as much room: near the end of the context none may run past it."""
        room = self.room(prompts[left[0]])
        return list(takewhile(lambda index: self.room(prompts[index]) == room, left[: self.batch_rows]))

    def _unless_out_of_memory(self, prompts: list[Sequence[int]], room: int, draws: Draws | None) -> list[Reply] | None:
        try:
            return self._write_batch(prompts, room, draws)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Not within `except`, where the traceback still holds the tensors.
        if len(prompts) == 1:
            raise LogitferryError(
                f"out of memory on {self._device} with one prompt of {len(prompts[0])} tokens and a reply of {room}",
                next_step=f"lower {self._section}max_new_tokens, or leave more memory free",
            )
        self.batch_rows = len(prompts) // 2
        free_cached_memory(self._device)
        setting = f"{self._section}batch_rows"
        logger.warning("out of memory on %s: %s is %d from now on", self._device, setting, self.batch_rows)
        return None

    @torch.no_grad()
    def _write_batch(self, prompts: list[Sequence[int]], room: int, draws: Draws | None) -> list[Reply]:
        pad_id = min(self._stops.ids, default=0)  # so that what pads a reply behind its end ends it
        width = max(map(len, prompts))
        ids_BL = torch.tensor([[pad_id] * (width - len(each)) + list(each) for each in prompts], device=self._device)
        mask_BL = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=self._device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=room,
            pad_token_id=pad_id,
            eos_token_id=sorted(self._stops.ids) or None,
            stop_strings=list(self._stops.strings) or None,
        )
        device_type, dtype = self._device.type, self._compute_dtype
        with torch.autocast(device_type, dtype) if dtype else nullcontext():
            output_BL = self._generate(config, draws, input_ids=ids_BL, attention_mask=mask_BL)
        replies = [self._reply(ids) for ids in output_BL[:, width:].tolist()]
        if draws is None:
            return replies
        return [
            replace(each, nll=nll)
            for each, nll in zip(replies, draws.nll([each.num_tokens for each in replies]), strict=True)
        ]

    def _generate(self, config: GenerationConfig, draws: Draws | None, **inputs: Tensor) -> Tensor:
        """What is not in `config` would be taken from the model's own."""
        own, self._model.generation_config = self._model.generation_config, config
        more: dict[str, Any] = {} if draws is None else {"logits_processor": LogitsProcessorList([draws])}
        try:
            return self._model.generate(**inputs, **more, tokenizer=self._tokenizer if config.stop_strings else None)
        finally:
            self._model.generation_config = own

    def _reply(self, ids: list[int]) -> Reply:
        kept = list(takewhile(lambda token_id: token_id not in self._stops.ids, ids))
        whole = text_of(self._tokenizer, kept)
        text = self._stops.before(whole)
        by_string, by_token = text != whole, len(kept) < len(ids)
        end = len(kept) + (by_token and not by_string)
        return Reply(ids=tuple(ids[:end]), text=text, is_cut=not (by_string or by_token))


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Control tokens as they are spelled, and every space where it is."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
