"""The teacher on plain transformers: one teacher-forced forward pass, the head on supervised positions only.

Shapes: N supervised positions of a batch, D hidden, V vocabulary.
Memory: the body's activations for batch_tokens, and twice chunk_positions × V floats.
"""

from collections.abc import Sequence

import numpy as np
import torch

from shared.batching import PaddedBatch, batches_by_length
from shared.device import pick_device, pick_dtype
from shared.errors import NonFiniteError
from shared.models import load_model, model_identity, split_model
from shared.rows import Positions, Row
from teacher_dump.config import TeacherSettings
from teacher_dump.keep import Threshold, TopK, keep_chunk


class TransformersEngine:
    """Scores rows with a Hugging Face causal language model."""

    def __init__(self, settings: TeacherSettings, rule: TopK | Threshold, temperatures: Sequence[float]) -> None:
        self._settings, self._rule, self._temperatures = settings, rule, tuple(temperatures)
        self._device = pick_device(settings.device)
        dtype = settings.dtype if settings.dtype == "auto" else pick_dtype(settings.dtype)
        model = load_model(settings, dtype=dtype, device=self._device).eval()
        self._body, self._head = split_model(model)
        self.identity = model_identity(settings, model)
        self._vocab_size = self.identity.vocab_size

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> list[Positions]:
        """What the teacher says at every position of every row, in the order of the rows.

        Raises:
            NonFiniteError: NaN or infinite logits; names the row and the token.
        """
        scored: dict[int, Positions] = {}
        for batch in batches_by_length([row.num_tokens for row in rows], self._settings.batch_tokens):
            batch_rows = [rows[index] for index in batch]
            scored.update(zip(batch, self._score_batch(batch_rows), strict=True))
        return [scored[index] for index in range(len(rows))]

    def _score_batch(self, rows: list[Row]) -> list[Positions]:
        batch = PaddedBatch.of(rows, self._device)
        hidden_ND = batch.hidden_at_positions(self._body)
        draws_N = None
        if isinstance(self._rule, Threshold):
            draws_N = np.concatenate([self._rule.draws(row.sample_id, row.num_positions) for row in rows])
        chunks: list[Positions] = []
        for begin in range(0, len(hidden_ND), self._settings.chunk_positions):
            chunk = slice(begin, begin + self._settings.chunk_positions)
            # An engine may pad the vocabulary; what lies beyond config.vocab_size is no outcome.
            logits_NV = self._head.logits(hidden_ND[chunk])[:, : self._vocab_size]
            draws = None if draws_N is None else draws_N[chunk]
            kept = keep_chunk(logits_NV, batch.label_N[chunk], self._rule, self._temperatures, draws)
            if (bad := kept.first_unscorable()) is not None:
                row, token = rows[batch.row_N[begin + bad]], int(batch.source_N[begin + bad]) + 1
                raise NonFiniteError(
                    f"row {row.sample_id!r}, token {token}: log p of the realised token is {kept.realised_logp_N[bad]}",
                    next_step="try teacher.dtype: float32; if it stays, look at the row with this sample id",
                )
            chunks.append(kept.positions())
        return Positions.concatenate(chunks).split([row.num_positions for row in rows])
