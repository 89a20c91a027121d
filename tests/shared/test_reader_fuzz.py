"""Whatever is done to the bytes of a dataset: it reads as what any Parquet reader sees in it, or ends in our error.

Digests are made true again after each change, so that only what stands behind them is tested.  Shards are read in
processes of their own: neither a crash nor gigabytes would be an error of ours.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shared.errors
from shared.dataset import LogitDataset
from shared.errors import LogitferryError
from shared.rows import LogitRow
from shared.verification import verify
from tests.shared.made_datasets import made_rows, reseal, threshold, write_dataset
from tests.shared.small_process import FINE, outcome

SHARD = "data/part-00000.parquet"
CLASSES = [kind for kind in vars(shared.errors).values() if isinstance(kind, type)]
OURS = {kind.__name__ for kind in CLASSES if issubclass(kind, LogitferryError)}

Change = Callable[[bytes], bytes]
place = st.floats(0, 1, exclude_max=True)
length = st.integers(1, 64)


def at(data: bytes, where: float) -> int:
    """Half of the places lie in the last 1,500 bytes, where the footer is."""
    near_end = max(len(data) - 1500, 0)
    return int(where * 2 * len(data)) if where < 0.5 else near_end + int((where * 2 - 1) * (len(data) - near_end))


def flip(where: float, bits: int) -> Change:
    return lambda d: d[: (n := at(d, where))] + bytes([d[n] ^ bits]) + d[n + 1 :] if d else d


def overwrite(where: float, new: bytes) -> Change:
    return lambda d: d[: (n := at(d, where))] + new + d[n + len(new) :]


def insert(where: float, new: bytes) -> Change:
    return lambda d: d[: (n := at(d, where))] + new + d[n:]


def delete(where: float, count: int) -> Change:
    return lambda d: d[: (n := at(d, where))] + d[n + count :]


def duplicate(where: float, count: int) -> Change:
    return lambda d: d[: (n := at(d, where)) + count] + d[n:]


def swap(one: float, other: float, count: int) -> Change:
    def change(data: bytes) -> bytes:
        a, b = sorted((at(data, one), at(data, other)))
        b = max(b, a + count)
        return data[:a] + data[b : b + count] + data[a + count : b] + data[a : a + count] + data[b + count :]

    return change


def truncate(where: float) -> Change:
    return lambda d: d[: at(d, where)]


def footer_length(change: int) -> Change:
    return lambda d: d[:-8] + max(int.from_bytes(d[-8:-4], "little") + change, 0).to_bytes(5, "little")[:4] + d[-4:]


def splice(where: float, elsewhere: float, other: bytes) -> Change:
    return lambda d: d[: at(d, where)] + other[at(other, elsewhere) :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("whole") / "set", [made_rows(1, 4)])


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> st.SearchStrategy[list[Change]]:
    other = write_dataset(tmp_path_factory.mktemp("other") / "set", [made_rows(2, 4)])
    others = st.sampled_from([(folder / SHARD).read_bytes() for folder in (whole, other)])
    some = st.binary(min_size=1, max_size=12)
    return st.lists(
        st.one_of(
            st.builds(flip, place, st.integers(1, 255)),
            st.builds(overwrite, place, some),
            st.builds(insert, place, some),
            st.builds(delete, place, length),
            st.builds(duplicate, place, length),
            st.builds(swap, place, place, length),
            st.builds(truncate, place),
            st.builds(footer_length, st.integers(-2000, 2000) | st.sampled_from([1 << 31, 1 << 24, 1 << 16])),
            st.builds(splice, place, place, others),
        ),
        min_size=1,
        max_size=3,
    )


def as_we_have_it(row: LogitRow) -> list[Any]:
    teacher = row.teacher
    values = [row.input_ids_L, row.label_mask_L, teacher.kept_ids_E, teacher.kept_logp_E, teacher.realised_logp_P]
    values += [teacher.entropy_P, *teacher.tail_logsum_PT.T]
    return [row.sample_id, row.source, *(each.tolist() for each in values)]


def as_parquet_has_it(row: dict[str, Any]) -> list[Any]:
    kept = [[value for position in row[name] for value in position] for name in ("kept_ids", "kept_logprobs")]
    others = [row[name] for name in ("realised_logprob", "entropy", "tail_logsum_t1", "tail_logsum_t2")]
    return [row["sample_id"], row["source"], row["input_ids"], row["label_mask"], *kept, *others]


def read_and_compare(folder: Path) -> None:
    dataset = LogitDataset.open(folder)
    ids = dataset.sample_ids()[0]
    rows = dataset.read_shard(0)
    seen = [as_parquet_has_it(row) for row in pq.read_table(folder / SHARD).to_pylist()]
    assert [as_we_have_it(row) for row in rows] == seen, "another reader sees other rows"
    assert ids == [row.sample_id for row in rows]


def holds(whole: Path, folder: Path, change: Change) -> str:
    """The outcome of reading the changed shard; fails unless it is an error of ours or what the file says."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))
    reseal(folder)
    told = outcome(lambda: read_and_compare(folder))
    assert told == FINE or told.split(":")[0] in OURS, told
    if told != FINE:
        assert SHARD in told
        assert "next: " in told
    return told


def fuzz(whole: Path, folder: Path, changes: st.SearchStrategy[list[Change]], max_examples: int) -> dict[str, int]:
    counts: dict[str, int] = {}

    @settings(max_examples=max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(chain=changes)
    def run(chain: list[Change]) -> None:
        told = holds(whole, folder, lambda data: reduce(lambda d, change: change(d), chain, data)).split(":")[0]
        counts[told] = counts.get(told, 0) + 1

    run()
    return counts


def test_changed_bytes_read_as_what_they_say_or_end_in_our_error(whole: Path, changes: Any, tmp_path: Path):
    counts = fuzz(whole, tmp_path / "copy", changes, 40)
    assert counts["DamagedShardError"] > 20


@pytest.mark.full
def test_many_changed_bytes_read_as_what_they_say_or_end_in_our_error(whole: Path, changes: Any, tmp_path: Path):
    assert sum(fuzz(whole, tmp_path / "copy", changes, 5000).values()) > 1000


@pytest.mark.full
def test_every_flipped_bit_under_a_true_digest_reads_the_same_or_ends_in_our_error(whole: Path, tmp_path: Path):
    """What no checksum covers: page headers, footer and the gaps between.  Nothing may be read as other rows."""
    (tmp_path / "copy").mkdir()
    before = [as_we_have_it(row) for row in LogitDataset.open(whole).read_shard(0)]
    data = (whole / SHARD).read_bytes()
    folder = Path(shutil.copytree(whole, tmp_path / "flipped"))

    def read_all() -> None:
        for place in range(len(data)):
            for bit in range(8):
                (folder / SHARD).write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
                reseal(folder)
                with suppress(LogitferryError):
                    assert [as_we_have_it(row) for row in LogitDataset.open(folder).read_shard(0)] == before

    assert outcome(read_all, seconds=300) == FINE


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400) | st.integers(-3, 70),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from(["\ud800", "\x1b[31m", "../../etc/passwd", "a\0b", "topk", "threshold", "0" * 64, SHARD]),
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)
deep = st.integers(1, 1200).map(lambda depth: reduce(lambda tree, _: [tree], range(depth), 0))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in [(*path, key), *places(tree[key], (*path, key))]]


@st.composite
def edits(draw: Any) -> Callable[[Any], str]:
    """Other values, missing and added keys, and now and then broken text."""
    where_what_value = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 5), junk | deep)
    choices = draw(st.lists(where_what_value, min_size=1, max_size=3))
    cut = draw(st.none() | st.integers(0, 3000))

    def edit(tree: Any) -> str:
        for where, what, value in choices:
            if not (found := places(tree)):
                break
            *parents, key = found[int(where * len(found))]
            owner = reduce(lambda branch, name: branch[name], parents, tree)
            if what == 0:
                del owner[key]
            elif what == 1 and isinstance(owner, dict):
                owner["unknown" if len(owner) % 2 else ""] = value
            elif what == 2 and isinstance(owner, list):
                owner.append(value)
            else:
                owner[key] = value
        text = json.dumps(tree)
        return text if cut is None else text[:cut] + text[cut + 1 :]

    return edit


@pytest.fixture(scope="module", params=["topk", "threshold"])
def either(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("either") / "set"
    if request.param == "topk":
        return write_dataset(folder, [made_rows(1, 2)])
    keep = {"method": "threshold", "tau": 0.05, "seed": 3, "max_kl": 1e-4}
    return write_dataset(folder, [made_rows(1, 2, threshold)], keep=keep)


@settings(deadline=None, max_examples=50, database=None, suppress_health_check=list(HealthCheck))
@given(edit=edits())
def test_a_changed_manifest_means_something_or_ends_in_our_error(edit: Callable[[Any], str], either: Path):
    path = either / "manifest.json"
    before = path.read_bytes()
    try:
        with suppress(RecursionError):  # of writing it
            path.write_text(edit(json.loads(before)))
        told = open_and_verify(either)
        assert any(name in told for name in ("manifest", SHARD, "tokenizer", "README.md")), told
    finally:
        path.write_bytes(before)


def open_and_verify(folder: Path) -> str:
    try:
        dataset = LogitDataset.open(folder)
    except LogitferryError as error:
        return str(error)
    json.dumps(dataset.info(), ensure_ascii=False).encode()
    faults = verify(dataset, deep=True).faults + verify(dataset, deep=False).faults
    return "; ".join(faults) or "the manifest means something"
