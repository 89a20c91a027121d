"""How often a student's own replies to the prompt of a row were right.

Replies that were not kept to train on count as well: a student that fails is often cut, or wrong, and just that is
asked here.  Those that nobody could mark do not.

Shapes: R rows of a source.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import ConfigError, RecordError
from shared.raw_records import BadRecord, raw_records
from shared.records import ROLLOUT_SUFFIX
from shared.rows import Int32
from shared.text_files import TextFile, find_text_files

REPLY_FOLDERS = ("data", "dropped")
COLUMNS = ("prompt_id", "right")

logger = logging.getLogger("logitferry")


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Of all prompts that replies were marked of."""

    prompt_ids: pa.ChunkedArray = field(repr=False)
    num_right: Int32 = field(repr=False)
    num_samples: Int32 = field(repr=False)

    def of(self, sample_ids: Sequence[pa.StringArray]) -> tuple[Int32, Int32]:
        """Right and marked replies to each row's prompt, [R] and [R]."""
        options = pc.ReplaceSubstringOptions(ROLLOUT_SUFFIX, "")  # a row may be a rollout itself
        asked = pc.call_function("replace_substring_regex", [pa.chunked_array(list(sample_ids), pa.string())], options)
        places: Any = pc.call_function("index_in", [asked], pc.SetLookupOptions(self.prompt_ids))
        place_R = places.fill_null(-1).to_numpy()
        return (
            np.where(place_R >= 0, self.num_right[place_R], 0).astype(np.int32),
            np.where(place_R >= 0, self.num_samples[place_R], 0).astype(np.int32),
        )


def read_marks(rollouts: str) -> Marks:
    """The marks of all replies that a folder or glob holds.

    Raises:
        ConfigError: there are no records, or none is marked.
        RecordError, DamagedDataError: a record cannot be read, or is of another kind.
    """
    tables = [_marked(file) for file in find_text_files(_patterns(rollouts))]
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise ConfigError(
            f"rollouts: {rollouts}: no reply is marked right or wrong",
            next_step="run `student-train rollout` with verify",
        )
    sums = table.group_by("prompt_id").aggregate([("right", "sum"), ("right", "count")])
    logger.info("%s: %d marked replies to %d prompts", rollouts, table.num_rows, sums.num_rows)
    return Marks(
        prompt_ids=sums["prompt_id"],
        num_right=sums["right_sum"].to_numpy().astype(np.int32),
        num_samples=sums["right_count"].to_numpy().astype(np.int32),
    )


def _patterns(rollouts: str) -> list[str]:
    folders = [Path(rollouts) / name for name in REPLY_FOLDERS if (Path(rollouts) / name).is_dir()]
    found = [str(folder) for folder in folders if any(folder.glob("*.jsonl*"))]
    return found or [rollouts]


def _marked(file: TextFile) -> pa.Table:
    prompt_ids, rights = [], []
    for record in raw_records(file, COLUMNS):
        if isinstance(record, BadRecord):
            raise record.error
        prompt_id, right = (record.fields.get(name) for name in COLUMNS)
        if not isinstance(prompt_id, str) or not (right is None or isinstance(right, bool)):
            raise RecordError(
                f"{record.where}: expected a prompt_id and right: true, false or null, got {prompt_id!r:.80} and "
                f"{right!r:.80}",
                next_step="name what `student-train rollout` has written",
            )
        if right is not None:
            prompt_ids.append(prompt_id)
            rights.append(right)
    return pa.table({"prompt_id": pa.array(prompt_ids, pa.string()), "right": pa.array(rights, pa.bool_())})
