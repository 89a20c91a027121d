"""Makes the golden datasets of format version 1, and their damaged twins.  `python -m tests.golden.make`

What lies here once a version is released is never made again: it stands for all the datasets that people have.  So
this refuses to replace them; `--replace` is for the time before.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from shared import shard_writer
from shared.dataset import LogitDataset
from shared.rows import LogitRow
from shared.schema import RowFormat
from tests.shared.forged_parquet import assembled, encode, page, parts, put, runs, with_footer, with_pages
from tests.shared.made_datasets import (
    V,
    edit_manifest,
    made_rows,
    reseal,
    rewrite_shard,
    threshold,
    tiny_tokenizer,
    write_dataset,
)

HERE = Path(__file__).parent
SHARD = "data/part-00000.parquet"
THRESHOLD = {"method": "threshold", "tau": 0.05, "seed": 3, "always": [], "max_kl": 1e-4}


def plain(row: LogitRow, row_format: RowFormat) -> dict[str, Any]:
    """Every value of a row as JSON holds it exactly."""

    def hexes(values: Any) -> list[str]:
        return [float(value).hex() for value in values]

    teacher = row.teacher
    tails = zip(row_format.tail_columns, teacher.tail_logsum_PT.T, strict=True)
    return {
        "sample_id": row.sample_id,
        "source": row.source,
        "input_ids": row.input_ids_L.tolist(),
        "label_mask": row.label_mask_L.astype(int).tolist(),
        "kept_counts": teacher.kept_counts_P.tolist(),
        "kept_ids": teacher.kept_ids_E.tolist(),
        "kept_logprobs": hexes(teacher.kept_logp_E),
        "realised_logprob": hexes(teacher.realised_logp_P),
        "entropy": hexes(teacher.entropy_P),
        **{name: hexes(values) for name, values in tails},
    }


def plain_rows(folder: Path) -> list[list[dict[str, Any]]]:
    """Of every shard."""
    dataset = LogitDataset.open(folder)
    form = dataset.manifest.row_format
    return [[plain(row, form) for row in dataset.read_shard(n)] for n in range(len(dataset.manifest.shards))]


def make_whole(folder: Path) -> None:
    with patch.object(shard_writer, "ROW_GROUP_ENTRIES", 90):  # so that the first shard has several row groups
        topk = write_dataset(folder / "v1-topk", [made_rows(11, 6), made_rows(12, 2)])
    sampled = [made_rows(13, 4, threshold), made_rows(14, 3, threshold)]
    write_dataset(folder / "v1-threshold", sampled, keep=THRESHOLD)
    exact = write_dataset(folder / "v1-exact", [made_rows(15, 2)], max_kl=0.0)
    assert pq.ParquetFile(topk / SHARD).num_row_groups > 2
    expected = {each.name: plain_rows(each) for each in (topk, folder / "v1-threshold", exact)}
    text = json.dumps(expected, ensure_ascii=False).replace('{"sample_id"', '\n{"sample_id"')
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


def flip(find: Callable[[bytes], int]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / SHARD).read_bytes())
        data[find(bytes(data))] ^= 1
        (folder / SHARD).write_bytes(data)

    return damage


def footer_begin(data: bytes) -> int:
    return len(parts(data)[0])


def of_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))


def sealed_again(damage: Callable[[Path], Any], **counts: Any) -> Callable[[Path], None]:
    """With true digests: a writer's mistake or malice, not a damaged disk."""

    def change(folder: Path) -> None:
        damage(folder)
        reseal(folder, **counts)

    return change


def of_rows(edit: Callable[[list[dict[str, Any]]], Any], schema: pa.Schema | None = None) -> Callable[[Path], None]:
    """With true digests and other values."""

    def damage(folder: Path) -> None:
        table = pq.read_table(folder / SHARD)
        rows = table.to_pylist()
        edit(rows)
        table = pa.Table.from_pylist(rows, schema=schema or table.schema)
        pq.write_table(table, folder / SHARD, compression="zstd", write_page_checksum=True, store_schema=False)
        reseal(folder)

    return damage


def nullable(folder: Path) -> None:
    schema = pq.read_schema(folder / SHARD)
    place = schema.get_field_index("entropy")
    schema = schema.set(place, pa.field("entropy", pa.list_(pa.field("element", pa.float32()))))
    of_rows(lambda rows: rows[0]["entropy"].__setitem__(0, None), schema)(folder)


def shift(rows: list[dict[str, Any]]) -> None:
    """Every distribution one token to the left, wherever the mask allows it."""
    for row in rows:
        if not row["label_mask"][1]:
            row["label_mask"] = [*row["label_mask"][1:], False]
        else:
            row["input_ids"] = [*row["input_ids"][1:], row["input_ids"][0]]


def uneven(rows: list[dict[str, Any]]) -> None:
    """As many values as before, one of them in another position."""
    values = rows[0]["kept_logprobs"]
    values[-2].append(values[-1].pop())


def other_tokenizer(folder: Path) -> None:
    text = tiny_tokenizer("zyxwvutsrqponmlkjihgfedcbaäöüß√中").to_str(pretty=True)
    (folder / "tokenizer/tokenizer.json").write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    edit_manifest(folder, lambda m: m["files"].update({"tokenizer/tokenizer.json": digest}))


def bomb(folder: Path) -> None:
    few = LogitDataset.open(folder).manifest.total("tokens")
    pages = [page(b"\0" * 4, 1, 0, dictionary=True), page(b"\x01" + runs((1 << 29, 0)), 1 << 29, 8)]
    rewrite_shard(folder, with_pages("input_ids", pages, few, 100))


def wrong_row_count(data: bytes) -> bytes:
    body, footer = parts(data)
    put(footer, 3, 6, 7)
    return assembled(body, encode(footer))


READ, OPEN, TOKENIZER, VERIFY = "read", "open", "tokenizer", "verify"
DAMAGED, MISALIGNED = "DamagedShardError", "MisalignedRowError"
IS_DAMAGED = "part-00000.parquet: damaged: expected "
DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    # disks and networks
    "flip-in-page": (flip(lambda data: footer_begin(data) // 2), READ, DAMAGED, IS_DAMAGED + "sha256"),
    "flip-in-page-header": (flip(lambda data: 6), READ, DAMAGED, IS_DAMAGED + "sha256"),
    "flip-in-footer": (flip(lambda data: len(data) - 400), READ, DAMAGED, IS_DAMAGED + "sha256"),
    "truncated": (of_bytes(lambda data: data[:-1]), READ, DAMAGED, IS_DAMAGED),
    "extra-bytes": (of_bytes(lambda data: data + b"\0"), READ, DAMAGED, IS_DAMAGED),
    "empty-shard": (of_bytes(lambda data: b""), READ, DAMAGED, IS_DAMAGED),
    "missing-shard": (lambda folder: (folder / SHARD).unlink(), READ, DAMAGED, "part-00000.parquet: is missing"),
    "no-manifest": (
        lambda folder: (folder / "manifest.json").unlink(), OPEN, "UnsealedDatasetError", "no manifest.json",
    ),
    "truncated-manifest": (
        lambda folder: (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:500]),
        OPEN, "DamagedManifestError", "not valid JSON",
    ),
    "damaged-tokenizer": (
        lambda folder: (folder / "tokenizer/tokenizer.json").write_bytes(b"{}"),
        TOKENIZER, "DamagedDataError", "cannot be read",
    ),
    # other programs, other times
    "version-2": (
        lambda folder: edit_manifest(folder, lambda m: m.update(format_version=2)),
        OPEN, "UnknownVersionError", "this release reads version 1",
    ),
    "unknown-key": (
        lambda folder: edit_manifest(folder, lambda m: m.update(surprise=1)), OPEN, "DamagedManifestError", "surprise",
    ),
    "missing-key": (
        lambda folder: edit_manifest(folder, lambda m: m.pop("teacher")), OPEN, "DamagedManifestError", "teacher",
    ),
    "count-of-manifest": (
        lambda folder: edit_manifest(folder, lambda m: m["shards"][0].update(positions=1)),
        READ, DAMAGED, "the manifest has 1 values of realised_logprob",
    ),
    "longest-row-of-manifest": (
        lambda folder: edit_manifest(folder, lambda m: m["shards"][0].update(longest_row=1)),
        READ, DAMAGED, "the manifest says longest_row 1, the file holds",
    ),
    "other-tokenizer": (other_tokenizer, TOKENIZER, "DamagedDataError", "is not the tokenizer that the manifest names"),
    # true digests, untrue contents
    "sealed-flip-in-page": (
        sealed_again(flip(lambda data: footer_begin(data) // 2)), READ, DAMAGED, "CRC checksum verification failed",
    ),
    "sealed-flip-in-page-header": (sealed_again(flip(lambda data: 4)), READ, DAMAGED, "row group 0, column sample_id"),
    "sealed-row-count": (sealed_again(of_bytes(wrong_row_count)), READ, DAMAGED, "footer: 7 rows in row groups of [3]"),
    "sealed-truncated": (sealed_again(of_bytes(lambda d: d[:-100])), READ, DAMAGED, "not readable as Parquet"),
    "sealed-bomb": (bomb, READ, DAMAGED, "pages hold 536870912 values"),
    "encrypted": (
        sealed_again(of_bytes(with_footer(lambda f: put(f, 8, 12, type(f)({}))))), READ, DAMAGED, "encrypted or signed",
    ),
    "nullable": (nullable, READ, DAMAGED, "expected the columns"),
    "id-out-of-range": (
        of_rows(lambda rows: rows[1]["kept_ids"][0].__setitem__(-1, V)),
        READ, DAMAGED, f"kept_ids lie in [0, {V}), got {V}",
    ),
    "token-out-of-range": (
        of_rows(lambda rows: rows[1]["input_ids"].__setitem__(0, -1)),
        READ, DAMAGED, f"input_ids lie in [0, {V}), got -1",
    ),
    "descending-ids": (
        of_rows(lambda rows: rows[1]["kept_ids"][1].reverse()), READ, DAMAGED, "kept_ids ascend within a position",
    ),
    "not-a-number": (
        of_rows(lambda rows: rows[2]["kept_logprobs"][0].__setitem__(0, float("nan"))), READ, DAMAGED,
        "kept_logprobs are finite and at most 0, got nan",
    ),
    "infinite-tail": (
        of_rows(lambda rows: rows[2]["tail_logsum_t2"].__setitem__(0, float("inf"))),
        READ, DAMAGED, "tail_logsum is a number",
    ),
    "huge-tail": (
        of_rows(lambda rows: rows[2]["tail_logsum_t2"].__setitem__(0, 99.0)),
        READ, DAMAGED, f"tail_logsum is a number or -inf, at most log {V}, got 99.0",
    ),
    "huge-entropy": (
        of_rows(lambda rows: rows[2]["entropy"].__setitem__(0, 99.0)),
        READ, DAMAGED, f"entropy is finite and at least 0, at most log {V}, got 99.0",
    ),
    "probable-beyond-one": (
        of_rows(lambda rows: rows[0]["realised_logprob"].__setitem__(0, 0.01)),
        READ, DAMAGED, "realised_logprob is finite and at most 0, got 0.0",
    ),
    "empty-position": (
        of_rows(lambda rows: (rows[0]["kept_ids"][0].clear(), rows[0]["kept_logprobs"][0].clear())),
        READ, DAMAGED, "every position keeps an id, got 0",
    ),
    "negative-loss": (
        of_rows(lambda rows: rows[0]["storage_loss"].__setitem__(0, -1.0)),
        READ, DAMAGED, "storage_loss is not one number",
    ),
    "uneven-rows": (
        of_rows(lambda rows: rows[0]["label_mask"].append(rows[1]["label_mask"].pop())),
        READ, MISALIGNED, "column label_mask does not run beside the others",
    ),
    "uneven-positions": (of_rows(uneven), READ, MISALIGNED, "kept_logprobs does not run beside kept_ids"),
    "supervised-first-token": (
        of_rows(lambda rows: rows[0].update(label_mask=[*rows[0]["label_mask"][1:], False])),
        READ, MISALIGNED, "nothing precedes it",
    ),
    "shifted-by-a-token": (of_rows(shift), VERIFY, "", "realised_logprob does not fit the distributions beside it"),
    "mass-of-a-half": (
        of_rows(lambda rows: [p.__setitem__(slice(None), [x - 0.7 for x in p]) for p in rows[0]["kept_logprobs"]]),
        READ, DAMAGED, "the manifest says kept_mass",
    ),
    "sample-twice": (of_rows(lambda rows: rows[1].update(sample_id=rows[0]["sample_id"])), VERIFY, "", "comes twice"),
}  # fmt: skip


def make_damaged(folder: Path) -> None:
    whole = write_dataset(folder / "whole", [made_rows(16, 3)])
    expected = {}
    for name, (damage, step, error, words) in DAMAGES.items():
        damage(Path(shutil.copytree(whole, folder / name)))
        expected[name] = {"step": step, "error": error, "words": words}
    shutil.rmtree(whole)
    text = json.dumps(expected, indent=1)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


def make(folder: Path) -> None:
    make_whole(folder)
    make_damaged(folder / "v1-damaged")


def main() -> None:
    made = [path for path in HERE.glob("v1-*") if path.is_dir()]
    if made and sys.argv[1:] != ["--replace"]:
        sys.exit(f"{', '.join(path.name for path in made)}: is there already; --replace makes it anew")
    for path in made:
        shutil.rmtree(path)
    make(HERE)


if __name__ == "__main__":
    main()
