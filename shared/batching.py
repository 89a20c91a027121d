"""Rows to padded batches.  The one place where the alignment of `shared.rows` becomes tensor indices.

Padding stands on the right: under causal attention nothing to the right of a token reaches it, and hidden states
are read at supervised positions only.  So no attention mask is needed, with which attention would be slower.

Shapes: B rows of a batch, L its longest, N its supervised positions, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.rows import Row


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows, longest first, cut so that rows × longest stays within `max_tokens`; a longer row goes alone."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first row of a batch is its longest, so it sets the width.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Rows side by side, and where their positions are.

    `row_N`, `source_N` say whose hidden state at which input position (t-1) belongs to each position;
    `label_N` is the realised token there.
    """

    input_ids_BL: Tensor
    row_N: Tensor
    source_N: Tensor
    label_N: Tensor

    @staticmethod
    def of(
        rows: Sequence[Row], device: torch.device, *, width: int | None = None, height: int | None = None
    ) -> "PaddedBatch":
        """As wide as the longest row and as high as there are rows, or more where that is asked for."""
        width = width or max(row.num_tokens for row in rows)
        input_ids_BL = np.zeros((height or len(rows), width), dtype=np.int64)
        for index, row in enumerate(rows):
            input_ids_BL[index, : row.num_tokens] = row.input_ids_L
        arrays = {
            "input_ids_BL": input_ids_BL,
            "row_N": np.repeat(np.arange(len(rows)), [row.num_positions for row in rows]),
            "source_N": np.concatenate([row.source_index_P for row in rows]),
            "label_N": np.concatenate([row.label_ids_P for row in rows]).astype(np.int64),
        }
        return PaddedBatch(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})

    def hidden_at_positions(self, body: torch.nn.Module) -> Tensor:
        """One forward pass of a model's body; its hidden states [N, D] that predict the labels."""
        hidden_BLD = body(input_ids=self.input_ids_BL, use_cache=False).last_hidden_state
        device = hidden_BLD.device  # the last one, where a model is spread over several
        return hidden_BLD[self.row_N.to(device), self.source_N.to(device)]
