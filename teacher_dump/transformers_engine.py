"""The teacher on plain transformers: one teacher-forced forward pass, the head on supervised positions only.

Rows of like length share a batch, so that little is computed for padding.  With static shapes, lengths are rounded up
and batches and chunks filled, for devices that compile every new shape.

Memory: the body's activations for batch_tokens, and the logits of a chunk; see `scoring.logits_bytes`.
"""

import logging
from collections.abc import Generator, Iterable, Sequence

import torch
from torch import Tensor

from shared.batching import PaddedBatch, batches_by_length
from shared.device import compiles_every_shape, free_cached_memory, is_out_of_memory, pick_device, pick_dtype
from shared.errors import ConfigError, LogitferryError
from shared.manifest import Teacher
from shared.models import load_model, split_model
from shared.rows import Positions, Row
from teacher_dump.config import TeacherSettings
from teacher_dump.keep import Threshold, TopK
from teacher_dump.scoring import Asked, Scorer

LENGTH_MULTIPLE = 128

logger = logging.getLogger("logitferry")


class TransformersEngine:
    """Scores rows with a Hugging Face causal language model."""

    def __init__(
        self, settings: TeacherSettings, identity: Teacher, rule: TopK | Threshold, temperatures: Sequence[float]
    ) -> None:
        self._rule = rule
        device = pick_device(settings.device)
        model = load_model(
            settings, dtype=pick_dtype(identity.dtype), device=device, device_map=settings.device_map
        ).eval()
        for name, layer in (("first", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
            if layer.weight.is_meta:
                raise ConfigError(
                    f"teacher.device_map puts the {name} layer off the devices, where it cannot be used directly",
                    next_step="keep it on a device: a device_map by hand, as transformers documents it",
                )
        self._body, head = split_model(model)
        # Here, and not of the logits, of which it would make a copy.
        self._head = head.of_vocabulary(identity.vocab_size)
        self._device = model.get_input_embeddings().weight.device
        self._batch_tokens = settings.batch_tokens
        self._is_static = settings.static_shapes
        if self._is_static is None:
            self._is_static = compiles_every_shape(self._device)
        self._scorer = Scorer(
            rule, temperatures, vocab_size=identity.vocab_size, chunk_positions=settings.chunk_positions
        )
        self._num_tokens = self._num_computed = 0

    @torch.inference_mode()
    def score(self, units: Iterable[Sequence[Row]]) -> Generator[list[Positions]]:
        """See `scoring.Engine`.

        Raises:
            LogitferryError: not even one row and one position fit into memory.
        """
        for rows in units:
            lengths = [self._filled(row.num_tokens) for row in rows]
            scored: dict[int, Positions] = {}
            for batch in batches_by_length(lengths, self._batch_tokens):
                scored.update(zip(batch, self._score_batch([rows[index] for index in batch]), strict=True))
            yield [scored[index] for index in range(len(rows))]

    def close(self) -> None:
        """Say how much of the work was padding."""
        if self._num_computed:
            logger.info("padding: %.1f %% of the tokens computed", 100 * (1 - self._num_tokens / self._num_computed))

    def _filled(self, length: int) -> int:
        return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE if self._is_static else length

    def _score_batch(self, rows: list[Row]) -> list[Positions]:
        try:
            return self._forward(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Not within `except`, where the traceback still holds the tensors.
        if len(rows) == 1:
            raise LogitferryError(
                f"out of memory on {self._device} with one row of {rows[0].num_tokens} tokens",
                next_step="set data.max_tokens with on_too_long, or spread the teacher with device_map: auto",
            )
        free_cached_memory(self._device)
        computed = len(rows) * self._filled(max(row.num_tokens for row in rows))
        self._batch_tokens = min(self._batch_tokens, max(1, computed // 2))  # of a unit several batches may fail
        logger.warning("out of memory on %s: teacher.batch_tokens is %d from now on", self._device, self._batch_tokens)
        half = len(rows) // 2
        return self._score_batch(rows[:half]) + self._score_batch(rows[half:])

    def _forward(self, rows: list[Row]) -> list[Positions]:
        counts = [row.num_positions for row in rows]
        asked = Asked.of(rows, self._rule)
        width = self._filled(max(row.num_tokens for row in rows))
        if self._is_static:
            batch = PaddedBatch.of(rows, self._device, width=width, height=max(len(rows), self._batch_tokens // width))
            asked = asked.filled(self._scorer.chunk.size)
        else:
            batch = PaddedBatch.of(rows, self._device, width=width)
        self._num_tokens += sum(row.num_tokens for row in rows)
        self._num_computed += batch.input_ids_BL.numel()
        hidden_ND = batch.hidden_at_positions(self._body).to(self._head.weight_VD.device)
        if (num_more := len(asked.label_N) - len(hidden_ND)) > 0:
            hidden_ND = torch.cat([hidden_ND, hidden_ND[:1].expand(num_more, -1)])
        positions = self._scorer.score(hidden_ND, asked, self._product)
        assert positions is not None, "a head on one device always gives logits"
        return positions.split([*counts, len(asked.label_N) - sum(counts)])[: len(rows)]

    def _product(self, hidden_ND: Tensor) -> Tensor:
        return self._head.logits(hidden_ND)
