"""The student: model, tokenizer, and the loss of some rows, one forward pass at a time."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.batching import PaddedBatch, batches_by_length
from shared.device import pick_dtype
from shared.files import sync_folder, sync_tree
from shared.models import load_model, output_head, split_model
from shared.pretrained import context_tokens, load_tokenizer
from shared.rows import Row
from student_train.collate import targets_of
from student_train.config import DataSettings, StudentSettings
from student_train.fused_linear import LossSums, fused_linear_loss
from student_train.objective import Objective
from student_train.sources import Source, open_source


class Student:
    """A causal language model that is trained or measured.

    Raises:
        ConfigError, MismatchError: the model or its tokenizer cannot be used; see `shared.models`.
    """

    def __init__(
        self, settings: StudentSettings, *, device: torch.device, batch_tokens: int, chunk_positions: int | None
    ) -> None:
        self.tokenizer: Any = load_tokenizer(settings)
        self.model: Any = load_model(settings, dtype=pick_dtype(settings.dtype), device=device)
        self._body, head = split_model(self.model)
        self._vocab_size = head.vocab_size
        self._context_tokens = context_tokens(settings)
        self._device = device
        self._batch_tokens = batch_tokens
        self._chunk_positions = chunk_positions

    def open_source(self, settings: DataSettings) -> Source:
        """Rows that are checked against this student's tokenizer, vocabulary and context."""
        return open_source(settings, self.tokenizer, vocab_size=self._vocab_size, context_tokens=self._context_tokens)

    def losses(
        self, rows: Sequence[Row], objective: Objective, *, temperature_index: int | None, denominator: float
    ) -> Iterator[LossSums]:
        """The loss of the rows, cut into forward passes of at most `batch_tokens` tokens; one lives at a time.

        `temperature_index` is the place of the objective's temperature among the dataset's; None leaves the teacher
        out.  `denominator` is Σ c over all that the gradient is taken over, so the cut changes nothing.
        """
        head = output_head(self.model)
        for indices in batches_by_length([row.num_tokens for row in rows], self._batch_tokens):
            batch = [rows[index] for index in indices]
            yield fused_linear_loss(
                PaddedBatch.of(batch, self._device).hidden_at_positions(self._body),
                head,
                targets_of(
                    batch,
                    objective,
                    temperature_index=temperature_index,
                    vocab_size=self._vocab_size,
                    device=self._device,
                ),
                objective,
                denominator=denominator,
                chunk_positions=self._chunk_positions,
            )

    def save(self, folder: Path) -> None:
        """A Hugging Face model with its tokenizer, written aside and renamed: what has the name is whole."""
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        self.model.save_pretrained(aside)
        self.tokenizer.save_pretrained(aside)
        sync_tree(aside)
        aside.rename(folder)
        sync_folder(folder.parent)
