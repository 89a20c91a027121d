"""The student: model, tokenizer, and the loss of some rows, one forward pass at a time."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from shared.device import compiles_every_shape, pick_dtype
from shared.files import sync_folder, sync_tree
from shared.fingerprint import tokenizer_fingerprint
from shared.models import load_model, output_head, split_model
from shared.pretrained import context_tokens, load_tokenizer, model_identity
from student_train.attention import Attention, settle_attention
from student_train.config import DataSettings, StudentSettings
from student_train.fused_linear import LossSums, fused_linear_loss
from student_train.objective import Objective
from student_train.packing import Shape
from student_train.passes import ForwardPass, PassMaker
from student_train.ranks import Ranks
from student_train.sources import Source, open_source

LINE_MULTIPLE = 64
"""Masked lines are as long as the longest row, rounded up to it."""


class Student:
    """A causal language model that is trained or measured, on one device.

    Raises:
        ConfigError, MismatchError: the model or its tokenizer cannot be used; see `shared.models`.
    """

    def __init__(
        self,
        settings: StudentSettings,
        device: torch.device,
        *,
        batch_tokens: int,
        chunk_positions: int | None = None,
        packing: bool = True,
        static_shapes: bool | None = None,
    ) -> None:
        self._settings, self._device = settings, device
        self._batch_tokens, self._chunk_positions = batch_tokens, chunk_positions
        self.tokenizer: Any = load_tokenizer(settings)
        self.model: Any = load_model(settings, dtype=pick_dtype(settings.dtype), device=device)
        self._body, head = split_model(self.model)
        self._vocab_size = head.vocab_size
        self._context_tokens = context_tokens(settings)
        self._is_static = compiles_every_shape(device) if static_shapes is None else static_shapes
        self.attention = (
            settle_attention(self.model, settings.attention, is_static=self._is_static) if packing else Attention(None)
        )

    def open_sources(self, settings: DataSettings) -> list[Source]:
        """Rows that are checked against this student's tokenizer, vocabulary and context."""
        return [
            open_source(
                source,
                self.tokenizer,
                vocab_size=self._vocab_size,
                context_tokens=self._context_tokens,
                cache=settings.cache,
            )
            for source in settings.sources()
        ]

    def pass_maker(self, objective: Objective, *, longest_row: int, ranks: Ranks) -> PassMaker:
        """Makes the forward passes of rows of at most so many tokens."""
        batch_tokens = self._batch_tokens
        if self.attention.name is None:
            line_tokens = None
        elif self.attention.takes_one_line:
            line_tokens = max(batch_tokens, longest_row) if self._is_static else batch_tokens
        else:  # whose cost grows with the square of a line's length
            line_tokens = -(-longest_row // LINE_MULTIPLE) * LINE_MULTIPLE
        is_static = self._is_static and line_tokens is not None
        return PassMaker(
            objective=objective,
            shape=Shape(batch_tokens=batch_tokens, line_tokens=line_tokens, is_static=is_static),
            vocab_size=self._vocab_size,
            device=self._device,
            rank=ranks.rank,
            num_ranks=ranks.count,
        )

    def losses(self, passes: Iterable[ForwardPass], objective: Objective, *, denominator: float) -> Iterator[LossSums]:
        """The loss of each pass; one lives at a time.

        `denominator` is Σ c over all that the gradient is taken over, so how rows were cut into passes changes nothing.
        """
        head = output_head(self.model)
        for each in passes:
            on_device = each.to(self._device)
            yield fused_linear_loss(
                on_device.hidden_at_positions(self._body, self.attention),
                head,
                on_device.targets,
                objective,
                denominator=denominator,
                chunk_positions=self._chunk_positions,
            )

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: the weights it began with, and the tokenizer."""
        model = model_identity(self._settings, dtype=self._settings.dtype, engine="transformers")
        digests = {"config_sha256": model.config_sha256, "weights_sha256": model.weights_sha256}
        known = {"name": model.name, "revision": model.revision} if model.weights_sha256 is None else digests
        return {
            "model": known | {"dtype": model.dtype},
            "tokenizer": tokenizer_fingerprint(self.tokenizer.backend_tokenizer),
        }

    def save(self, folder: Path) -> None:
        """A Hugging Face model with its tokenizer, written aside and renamed: what has the name is whole."""
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        self.model.save_pretrained(aside)
        self.tokenizer.save_pretrained(aside)
        sync_tree(aside)
        aside.rename(folder)
        sync_folder(folder.parent)
