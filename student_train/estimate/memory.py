"""Memory of a training step on each device: what lives at once in a fake pass, and what such a pass cannot show.

That is AdamW's moments and what its step works with, blocks of the loss that are larger off the CPU, DDP's buckets and
what FSDP2 gathers: arithmetic on sizes.
"""

from dataclasses import dataclass, replace

import torch

from shared.device import pick_dtype
from student_train.config import TrainSettings
from student_train.estimate.fake_student import FakeStudent, PassShape, Sizes
from student_train.fused_linear import rows_of_block
from student_train.objective import Objective

ASIDE_BYTES = 1 << 30
"""Of a device's memory that torch does not give out: the driver's context, libraries' workspaces, gaps."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device when a step needs most; they add up to `total`."""

    weights: int
    gradients: int
    """That are there before the pass."""
    optimizer: int
    """Both moments."""
    activations: int
    """What the body keeps for the backward pass, copies of weights included."""
    work: int
    """Of the loss, the backward pass or the optimizer's step: whichever needs most beside the above."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.work


def pass_memory(
    student: FakeStudent,
    shape: PassShape,
    objective: Objective,
    settings: TrainSettings,
    *,
    accumulates: bool,
) -> Memory:
    """Of a pass of a step that is not the first, where a device holds all of the student.

    Where a step `accumulates` over several passes, or DDP keeps its buckets, there are gradients before the last pass.
    """
    chunk = settings.loss.chunk_positions
    found = student.peaks(shape, objective, chunk_positions=chunk, accumulates=accumulates)
    in_loss = found.loss + (_larger_blocks(student, shape, objective, chunk) if student.on_accelerator else 0)
    sizes, activations = student.sizes, found.kept - found.before
    return Memory(
        weights=sizes.weights,
        gradients=sizes.trained if accumulates else 0,
        optimizer=2 * sizes.trained,
        activations=activations,
        work=max(found.body, in_loss, found.backward) - found.before - activations,
    )


def whole(own: Sizes, passing: Memory, *, on_accelerator: bool) -> Memory:
    """Of a whole step, where a device holds all of the student."""
    stepping = _optimizer_work(own, on_accelerator)
    return _larger(passing, replace(passing, gradients=own.trained, activations=0, work=stepping))


def sharded(
    own: Sizes, gathered: Sizes, passing: Memory, *, num_ranks: int, sums_in_fp32: bool, on_accelerator: bool
) -> Memory:
    """Spread by FSDP2 over so many devices: `own` are the sizes of what they keep between them.

    `gathered` are those in the dtype that weights are gathered in, and `passing` is of an accumulating step in it.
    Gathered are two layers, and what is in no layer from its use to the end of the pass; gradients are whole until they
    are summed.  Not compared with several devices.
    """
    trained = gathered.trained / max(gathered.weights, 1)  # of the gradients there are as many
    to_sum = 2.0 if sums_in_fp32 else 1.0
    of_layer, of_rest = trained * gathered.layer, trained * gathered.rest
    around = 2 * gathered.layer + gathered.rest + of_rest + max(of_layer * (1 + to_sum), of_rest * to_sum)
    share = Memory(
        weights=own.weights // num_ranks,
        gradients=own.trained // num_ranks,
        optimizer=2 * own.trained // num_ranks,
        activations=passing.activations,
        work=passing.work + int(around),
    )
    stepping = _optimizer_work(own, on_accelerator) // num_ranks
    return _larger(share, replace(share, activations=0, work=stepping))


def _optimizer_work(sizes: Sizes, on_accelerator: bool) -> int:
    """AdamW takes all tensors at once on accelerators, and makes one more for each; else two for one after another."""
    return sizes.trained if on_accelerator else 2 * sizes.largest_trained


def _larger(first: Memory, second: Memory) -> Memory:
    return max(first, second, key=lambda memory: memory.total)


def _larger_blocks(student: FakeStudent, shape: PassShape, objective: Objective, chunk_positions: int | None) -> int:
    """What the loss needs more than on the CPU, where its blocks are made for a cache."""
    dtype, vocab_size = pick_dtype(student.settings.product_dtype), student.vocab_size
    num_rows = student.chunk_rows(shape.num_positions, chunk_positions)
    on_host, elsewhere = (rows_of_block(num_rows, vocab_size, torch.device(each)) for each in ("cpu", "meta"))
    copies = (dtype != torch.float32) + (objective.temperature != 1.0 and shape.num_kept > 0)
    return copies * (elsewhere - on_host) * vocab_size * 4
