"""What a dump will take, before a GPU-hour is spent: a sample is tokenized, scored and encoded, and scaled up.

All records are read, which is cheap beside scoring them, and the sample is drawn from all of them (reservoir
sampling: Vitter, ACM TOMS 11, 1985), so that a file sorted by length or source does not mislead.  With what is scaled
up comes its standard error.
"""

import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.amounts import duration, size
from shared.device import host_peak_bytes, peak_bytes, pick_device, pick_dtype
from shared.manifest import Shard, row_format
from shared.pretrained import context_tokens, load_tokenizer
from shared.progress import progress
from shared.raw_records import BadRecord
from shared.records import Record, RecordReader
from shared.rows import LogitRow, Positions, Row
from shared.shard_writer import encode_shard
from shared.text_rows import Tally, TextRows
from teacher_dump.config import DumpSettings
from teacher_dump.engines import open_engine, require_in_vocabulary, teacher_identity
from teacher_dump.keep import keep_rule
from teacher_dump.scoring import Engine, logits_bytes, require_finite
from teacher_dump.units import storage_of

WARM_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Amount:
    """A number scaled up from the sample, and its standard error."""

    total: int
    error: int

    def __str__(self) -> str:
        return f"{self.total:,} ± {self.error:,}"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    engine: str
    devices: int
    records: int
    sampled: int
    rows: Amount
    tokens: Amount
    positions: Amount
    longest_row: int
    """Of the sample."""
    bytes_per_position: float
    size_bytes: int
    """Of all shards."""
    positions_per_s: float
    """Of the teacher alone."""
    seconds: dict[str, float]
    """read: all records tokenized once, before the teacher; load, teacher, write; total: what a run takes."""
    device_hours: float
    logits_bytes: int
    """What lives at once between hidden states and stored values."""
    device_peak_bytes: int | None
    """Of torch's allocator while the sample was scored; null where the engine has its own processes."""
    host_peak_bytes: int


def estimate(
    settings: DumpSettings,
    *,
    sample: int,
    seed: int = 0,
    load: Callable[..., AbstractContextManager[Engine]] = open_engine,
) -> Estimate:
    """Measure on `sample` records what a dump of all of them will take.

    Raises:
        ConfigError, RecordError, MismatchError: as the dump would.
    """
    tokenizer = load_tokenizer(settings.teacher)
    rule = keep_rule(settings.keep, tokenizer)
    identity = teacher_identity(settings.teacher)
    begin_s = time.monotonic()
    num_records, drawn = draw(RecordReader(settings.data).records(), sample, seed)
    reading_s = time.monotonic() - begin_s
    tally, rows = Tally(), []
    # In this process: others take seconds to start, which a whole run has not to pay for each record.
    alone = settings.data.model_copy(update={"processes": 1})
    with TextRows(tokenizer, alone, context_tokens=context_tokens(settings.teacher)) as text:
        begin_s = time.monotonic()
        rows = list(text.rows(drawn, tally))
        tokenizing_s = (time.monotonic() - begin_s) / min(settings.data.processes, os.cpu_count() or 1)
    tally.require_rows()
    require_in_vocabulary(max(*(int(row.input_ids_L.max()) for row in rows), *rule.always_ids, 0), identity)
    scale = num_records / len(drawn)

    begin_s = time.monotonic()
    longest_row = max(row.num_tokens for row in rows)
    with load(settings.teacher, identity, rule, settings.temperatures, longest_row=longest_row) as engine:
        list(engine.score([rows[:WARM_ROWS]]))
        loading_s, begin_s = time.monotonic() - begin_s, time.monotonic()
        (positions,) = engine.score([rows])
        scoring_s = time.monotonic() - begin_s
        device_peak = peak_bytes(_device(settings)) if settings.teacher.engine == "transformers" else None
    begin_s = time.monotonic()
    shard = _encoded(settings, rows, positions, identity.vocab_size, rule)
    writing_s = time.monotonic() - begin_s

    device = _device(settings)
    seconds = {
        "read": reading_s + tokenizing_s * scale,
        "load": loading_s,
        "teacher": scoring_s * scale,
        "write": writing_s * scale,
    }
    # Reading again and writing go on beside the teacher, unless they all want the same cores.
    beside = [seconds["read"], seconds["teacher"], seconds["write"]]
    seconds["total"] = seconds["read"] + seconds["load"] + (sum(beside) if device.type == "cpu" else max(beside))
    num_devices = settings.teacher.vllm.tensor_parallel * settings.teacher.vllm.pipeline_parallel
    if settings.teacher.device_map is not None:
        num_devices = max(1, torch.accelerator.device_count())
    itemsize = pick_dtype(identity.dtype).itemsize
    return Estimate(
        engine=identity.engine or settings.teacher.engine,
        devices=num_devices,
        records=num_records,
        sampled=len(drawn),
        rows=_scaled([1] * len(rows), len(drawn), num_records),
        tokens=_scaled([row.num_tokens for row in rows], len(drawn), num_records),
        positions=_scaled([row.num_positions for row in rows], len(drawn), num_records),
        longest_row=longest_row,
        bytes_per_position=shard.teacher_bytes / shard.positions,
        size_bytes=round(shard.size_bytes * scale),
        positions_per_s=shard.positions / scoring_s,
        seconds=seconds,
        device_hours=num_devices * (seconds["total"] - seconds["read"]) / 3600,
        logits_bytes=logits_bytes(settings.teacher.chunk_positions, identity.vocab_size, itemsize, device),
        device_peak_bytes=device_peak,
        host_peak_bytes=host_peak_bytes(),
    )


def draw(records: Iterable[Record | BadRecord], size: int, seed: int) -> tuple[int, list[Record | BadRecord]]:
    """How many records there are, and `size` of them in their order, all sets equally probable."""
    generator = random.Random(seed)
    drawn: list[tuple[int, Record | BadRecord]] = []
    number = -1
    with progress("read", None, "records") as ticker:
        for number, record in enumerate(records):
            if number < size:
                drawn.append((number, record))
            elif (place := generator.randrange(number + 1)) < size:
                drawn[place] = number, record
            ticker.advance()
    return number + 1, [record for _, record in sorted(drawn, key=lambda pair: pair[0])]


def _scaled(values: Sequence[int], sampled: int, records: int) -> Amount:
    """The total over all records; a record of the sample that gave no row counts 0."""
    of_record = np.zeros(sampled)
    of_record[: len(values)] = values
    without_rest = max(0.0, 1 - sampled / records)  # nothing is uncertain where the sample is everything
    error = records * of_record.std(ddof=1 if sampled > 1 else 0) / np.sqrt(sampled) * np.sqrt(without_rest)
    return Amount(total=round(records * of_record.mean()), error=round(float(error)))


def _device(settings: DumpSettings) -> torch.device:
    return pick_device(settings.teacher.device)


def _encoded(settings: DumpSettings, rows: list[Row], positions: list[Positions], vocab_size: int, rule: Any) -> Shard:
    scored: list[LogitRow] = []
    for row, of_row in zip(rows, positions, strict=True):
        require_finite(row, of_row)
        scored.append(LogitRow(**vars(row), teacher=of_row))
    columns = row_format(settings.keep.in_force(), settings.temperatures, vocab_size)
    return encode_shard(scored, columns, storage_of(settings, rule), "data/part-00000.parquet")[1]


def describe(found: Estimate) -> list[str]:
    """For people."""
    seconds = {name: duration(value) for name, value in found.seconds.items()}
    speed = f"{found.positions_per_s:,.0f} positions/s"
    memory = f"logits {size(found.logits_bytes)}, host {size(found.host_peak_bytes)}"
    if found.device_peak_bytes:
        memory += f", device {size(found.device_peak_bytes)}"
    return [
        f"records      {found.records:,}, of which {found.sampled:,} were tokenized and scored",
        f"rows         {found.rows}, the longest seen {found.longest_row:,} tokens",
        f"tokens       {found.tokens}",
        f"positions    {found.positions}",
        f"disk         {size(found.size_bytes)}, {found.bytes_per_position:.1f} bytes per position",
        f"teacher      {speed} by {found.engine} on {found.devices} device{'s' * (found.devices > 1)}",
        "time         " + ", ".join([seconds.pop("total"), *(f"{name} {value}" for name, value in seconds.items())]),
        f"device hours {found.device_hours:,.2f}",
        f"peak memory  {memory}",
    ]
