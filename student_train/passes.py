"""The rows of a forward pass as tensors.  The one place of the student where the alignment of `shared.rows` becomes
tensor indices.

A row supervises the hidden states at t − 1 of its own tokens: its positions travel with it to wherever in a line it
stands.  Padding stands at the end of a line, as a document of its own where documents are kept apart; under causal
attention nothing behind a token reaches it, and hidden states are read at supervised positions alone.

Shapes: B lines of a pass, L their tokens, N supervised positions, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from shared.device import pinned
from shared.rows import Row
from student_train.attention import Attention
from student_train.collate import targets_of
from student_train.loss import Targets
from student_train.objective import Objective
from student_train.packing import Pass, Shape, cut_into_passes, shortest, size

POSITIONS_MULTIPLE = 256
"""Where shapes are static, N is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """What the student is given at once."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    """Of each token within its row."""
    source_N: Tensor
    """Index among the B·L tokens of the one whose hidden state predicts the label."""
    targets: Targets
    document_lengths: tuple[int, ...]
    """Of the documents of a single line, padding included."""
    rows: tuple[int, ...]
    """Which of the step's rows are in it, in the order of their positions; none in a silent one."""
    positions: tuple[int, ...]
    """Of each of them; what N has beyond them has weight 0."""

    def to(self, device: torch.device) -> "ForwardPass":
        """Not waiting for it where memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self, device: torch.device) -> "ForwardPass":
        """In memory that `device` can fetch from while the host goes on."""
        return self._each(lambda tensor: pinned(tensor, device))

    def hidden_at_positions(self, body: nn.Module, attention: Attention) -> Tensor:
        """One forward pass of a model's body; its hidden states [N, D] that predict the labels."""
        arguments = attention.arguments(self.position_ids_BL, self.document_lengths)
        hidden_BLD = body(input_ids=self.input_ids_BL, use_cache=False, **arguments).last_hidden_state
        return hidden_BLD.flatten(0, 1)[self.source_N]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "ForwardPass":
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, targets=self.targets.each(change))


def make_pass(
    rows: Sequence[Row], lines: Pass, size: tuple[int, int], objective: Objective, *, vocab_size: int, is_static: bool
) -> ForwardPass:
    """The lines of a pass, each of indices into `rows`, in a rectangle of `size`, on the CPU.

    A pass without lines is silent: it is made of the shortest row, which has weight 0.

    Raises:
        MismatchError, ValueError: the rows' targets cannot be used; see `student_train.collate`.
    """
    height, width = size
    is_silent = not lines
    lines = lines or [[shortest([row.num_tokens for row in rows])]]
    input_ids_BL = np.zeros((height, width), dtype=np.int64)
    position_ids_BL = np.zeros((height, width), dtype=np.int64)
    documents, sources = [], []
    for line in range(height):
        begin = 0
        for index in lines[line] if line < len(lines) else []:
            row, end = rows[index], begin + rows[index].num_tokens
            input_ids_BL[line, begin:end] = row.input_ids_L
            position_ids_BL[line, begin:end] = np.arange(row.num_tokens)
            sources.append(line * width + begin + row.source_index_P)
            documents.append(row.num_tokens)
            begin = end
        if begin < width:
            longest = max(documents)  # as long as a row may be, so that no position is beyond what the model knows
            position_ids_BL[line, begin:] = np.arange(width - begin) % longest
            documents += [longest] * ((width - begin) // longest) + [(width - begin) % longest]
    order = [index for line in lines for index in line]
    targets = targets_of([rows[index] for index in order], objective, vocab_size=vocab_size)
    if is_silent:
        targets, order = replace(targets, weight_N=torch.zeros_like(targets.weight_N)), []
    source_N = np.concatenate(sources)
    if is_static:
        wanted = -(-len(source_N) // POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE
        targets, source_N = targets.padded(wanted), np.pad(source_N, (0, wanted - len(source_N)))
    return ForwardPass(
        input_ids_BL=torch.from_numpy(input_ids_BL),
        position_ids_BL=torch.from_numpy(position_ids_BL),
        source_N=torch.from_numpy(source_N),
        targets=targets,
        document_lengths=tuple(filter(None, documents)),
        rows=tuple(order),
        positions=tuple(rows[index].num_positions for index in order),
    )


@dataclass(frozen=True, kw_only=True)
class PassMaker:
    """Makes the forward passes of rows, for one rank of several."""

    objective: Objective
    shape: Shape
    vocab_size: int
    device: torch.device
    """That the passes will go to."""
    rank: int = 0
    num_ranks: int = 1

    def make(self, rows: Sequence[Row]) -> tuple[list[ForwardPass], float]:
        """This rank's passes, in pinned memory, and the share of all ranks' computed tokens that are padding."""
        lengths = [row.num_tokens for row in rows]
        cut = cut_into_passes(lengths, self.shape, self.num_ranks)
        passes = [
            make_pass(
                rows,
                lines,
                size(lines, lengths, self.shape),
                self.objective,
                vocab_size=self.vocab_size,
                is_static=self.shape.is_static,
            )
            for lines in cut.passes[self.rank]
        ]
        return [each.pinned(self.device) for each in passes], cut.waste
