"""What a run of a config needs, and whether it fits: nothing is loaded but configs, the tokenizer and some rows."""

from dataclasses import dataclass

from shared.pretrained import context_tokens, load_config, load_tokenizer
from student_train.config import TrainSettings
from student_train.data import num_steps
from student_train.estimate.fake_student import FakeStudent
from student_train.estimate.memory import ASIDE_BYTES, Memory
from student_train.estimate.needs import Change, Needs
from student_train.estimate.place import Place
from student_train.estimate.rows import RunRows, read_rows
from student_train.flops import Flops

ASSUMED_MFU = 0.4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    parameters: int
    trained: int
    attention: str | None
    """null where rows are padded."""
    device: str
    ranks: int
    memory: Memory
    """Of one device, in bytes."""
    total_bytes: int
    aside_bytes: int
    """What a device's memory holds besides."""
    device_memory_bytes: int | None
    fits: bool | None
    """null where the device's memory is not known."""
    changes: list[Change]
    """Where it does not fit."""
    rows: int
    """Of an epoch."""
    sampled: int
    tokens: int
    """Of an epoch."""
    positions: int
    """Of an epoch."""
    longest_row: int
    steps: int
    epochs: float
    passes_per_step: float
    """Of each process."""
    padding: float
    """Share of the computed tokens."""
    pass_tokens: int
    """Of the fullest forward pass."""
    operations: float
    """Of the whole run, as the model FLOPs utilisation counts them."""
    peak_flops: float | None
    """Of one device, per second."""
    assumed_mfu: float
    seconds: float | None
    checkpoint_bytes: int
    checkpoints_bytes: int
    """Of as many as are kept, and the one that is being written."""
    model_bytes: int


def estimate(settings: TrainSettings, *, memory_bytes: int | None = None, num_ranks: int = 1) -> Estimate:
    """What every one of so many processes needs; with `memory_bytes`, on an accelerator that has so much.

    Raises:
        ConfigError, MismatchError, RecordError, DamagedDataError: as the run would.
        MismatchError: what the model keeps of a pass cannot be told; see `FakeStudent`.
    """
    place = Place.of(settings, memory_bytes, num_ranks)
    vocab_size = load_config(settings.student).get_text_config().vocab_size
    context = context_tokens(settings.student)
    tokenizer = load_tokenizer(settings.student)
    rows, objective = read_rows(settings, tokenizer, vocab_size=vocab_size, context_tokens=context)
    steps = num_steps(settings, rows.num_rows)
    needs = Needs(settings, place, rows, objective)
    passes, memory = needs.passes, needs.memory
    room = None if place.memory_bytes is None else place.memory_bytes - ASIDE_BYTES
    fits = None if room is None else memory.total <= room
    operations = _operations(needs.student, rows) * steps
    peak, own = place.peak_flops(settings), needs.student.sizes
    checkpoint_bytes = 3 * own.trained
    return Estimate(
        parameters=sum(parameter.numel() for parameter in needs.student.model.parameters()),
        trained=sum(each.numel() for each in needs.student.model.parameters() if each.requires_grad),
        attention=needs.student.attention.name,
        device=place.name,
        ranks=num_ranks,
        memory=memory,
        total_bytes=memory.total,
        aside_bytes=ASIDE_BYTES,
        device_memory_bytes=place.memory_bytes,
        fits=fits,
        changes=[] if fits is not False or room is None else needs.changes(room),
        rows=rows.num_rows,
        sampled=rows.sampled,
        tokens=round(rows.num_rows * rows.tokens_per_row),
        positions=round(rows.num_rows * rows.positions_per_row),
        longest_row=rows.longest_row,
        steps=steps,
        epochs=steps * settings.rows_per_step / rows.num_rows,
        passes_per_step=passes.per_step,
        padding=passes.padding,
        pass_tokens=passes.fullest.num_tokens,
        operations=operations,
        peak_flops=peak,
        assumed_mfu=ASSUMED_MFU,
        seconds=None if peak is None else operations / (peak * ASSUMED_MFU * num_ranks),
        checkpoint_bytes=checkpoint_bytes,
        checkpoints_bytes=checkpoint_bytes * (settings.checkpoint.keep + 1),
        model_bytes=own.weights,
    )


def _operations(student: FakeStudent, rows: RunRows) -> float:
    """Of a step, on average."""
    with student.without_numbers():
        flops = Flops.of(student.model)
    lengths = [row.num_tokens for step in rows.steps for row in step]
    steps, rows_per_step = len(rows.steps), len(rows.steps[0])
    attention = flops.of_attention(lengths) / steps
    return (
        rows_per_step * (flops.per_token * rows.tokens_per_row + flops.per_position * rows.positions_per_row)
        + attention
    )
