"""Folders made to harm: links, pipes and folders in place of files, names and manifests that no writer makes.

Each ends in one of our errors, at once, and says which file it is about.
"""

import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.dataset import LogitDataset
from shared.manifest import MAX_MANIFEST_BYTES
from shared.verification import verify
from tests.shared.made_datasets import edit_manifest, made_rows, reseal, tiny_tokenizer, write_dataset
from tests.shared.small_process import FINE, ended_in, outcome, outcomes

SHARD = "data/part-00000.parquet"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("whole") / "set", [made_rows(1, 3), made_rows(2, 2)])


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def opened(folder: Path) -> str:
    return ended_in(lambda: LogitDataset.open(folder))


def read_by_all_ways(folder: Path) -> list[str]:
    """Rows, names, and both kinds of `verify`, whose faults are as good as an error."""

    def verified(deep: bool) -> None:
        if faults := verify(LogitDataset.open(folder), deep=deep).faults:
            raise OSError("; ".join(faults))

    dataset = LogitDataset.open(folder)
    return outcomes(lambda: dataset.read_shard(0), dataset.sample_ids, lambda: verified(False), lambda: verified(True))


def instead(name: str, make: Damage) -> Damage:
    """Something else in place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        make(folder / name)

    return damage


def listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


STRANGE_FILES = {
    "missing": (lambda path: None, "is missing"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is missing"),
    "link out of the dataset": (lambda path: path.symlink_to("../../elsewhere"), "leads outside"),
    "absolute link": (lambda path: path.symlink_to("/etc/hostname"), "leads outside"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "leads outside"),
    "folder": (lambda path: path.mkdir(), "not a file"),
    "pipe": (os.mkfifo, "not a file"),
    "socket": (listen, "not a file"),
    "nothing in it": (lambda path: path.touch(), "got 0"),
}


@pytest.mark.parametrize("kind", STRANGE_FILES)
def test_what_is_no_shard_is_refused(kind: str, copy: Path):
    make, words = STRANGE_FILES[kind]
    instead(SHARD, make)(copy)
    for message in read_by_all_ways(copy):
        assert "part-00000.parquet: " in message
        assert words in message
        assert "next: " in message


def test_a_pipe_of_no_bytes_that_the_manifest_knows_is_not_waited_for(copy: Path):
    instead(SHARD, os.mkfifo)(copy)
    edit_manifest(copy, lambda m: m["shards"][0].update(size_bytes=0))
    for message in read_by_all_ways(copy):
        assert "is a folder, pipe or device, not a file" in message


def test_an_empty_file_that_the_manifest_knows_is_no_shard(copy: Path):
    (copy / SHARD).write_bytes(b"")
    reseal(copy)
    for message in read_by_all_ways(copy):
        assert "not readable as Parquet" in message


def test_a_link_inside_the_dataset_is_followed(copy: Path):
    (copy / SHARD).rename(copy / "data/elsewhere")
    (copy / SHARD).symlink_to("elsewhere")
    assert outcome(lambda: LogitDataset.open(copy).read_shard(0)) == FINE


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "UnsealedDatasetError"),
        (lambda path: path.symlink_to("nowhere"), "UnsealedDatasetError"),
        (lambda path: path.symlink_to("../elsewhere"), "DamagedManifestError: .*leads outside the dataset"),
        (lambda path: path.symlink_to(path.name), "DamagedManifestError: .*cannot be read"),
        (lambda path: path.mkdir(), "DamagedManifestError: .*it is not a file"),
        (os.mkfifo, "DamagedManifestError: .*it is not a file"),
        (listen, "DamagedManifestError: .*it is not a file"),
        (lambda path: path.touch(), "DamagedManifestError: .*not valid JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(make: Damage, words: str, copy: Path):
    instead("manifest.json", make)(copy)
    message = opened(copy)
    _matches(words, message)
    assert "next: " in message


def _matches(pattern: str, message: str) -> None:
    assert re.match(pattern, message), message


PATHS = [
    "data/../data/part-00000.parquet", "../part-00000.parquet", "/etc/passwd", "data/part-0.parquet", "", "data",
    "data\\part-00000.parquet", "data/part-00000.parquet\0", "data/part-00000.parquet\n", "data/part-００００0.parquet",
    None, 7, ["data"],
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_shard_path_that_leads_anywhere_else_is_refused(path: Any, copy: Path):
    edit_manifest(copy, lambda m: m["shards"][0].update(path=path))
    _matches(r"DamagedManifestError: .*manifest\.json: shards\.0\.path: ", opened(copy))


@pytest.mark.parametrize(
    "path",
    [
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "",
        "/etc/passwd",
        "x" * 300,
        "../elsewhere",
        "tokenizer/../../elsewhere",
        "a\\..\\b",
    ],
)
def test_other_files_of_impossible_names_are_refused(path: str, copy: Path):
    edit_manifest(copy, lambda m: m["files"].update({path: "0" * 64}))
    _matches(r"(?s)DamagedManifestError: .*manifest\.json: files\.", opened(copy))


@pytest.mark.parametrize("path", ["data", "tokenizer/nowhere"])
def test_other_files_that_lie_elsewhere_are_faults(path: str, copy: Path):
    edit_manifest(copy, lambda m: m["files"].update({path: "0" * 64}))
    faults = "\n".join(verify(LogitDataset.open(copy), deep=False).faults)
    assert path in faults
    assert any(words in faults for words in ("leads outside", "is missing", "is a folder"))


def test_a_shard_named_twice_is_refused(copy: Path):
    edit_manifest(copy, lambda m: m["shards"].append(m["shards"][0]))
    _matches(r"DamagedManifestError: .*a shard is named twice", opened(copy))


def test_a_sample_that_comes_in_two_shards_is_a_fault(copy: Path):
    edit_manifest(copy, lambda m: m["shards"].append(m["shards"][0] | {"path": "data/part-00002.parquet"}))
    shutil.copy(copy / SHARD, copy / "data/part-00002.parquet")
    for deep in (False, True):
        assert "comes twice" in "\n".join(verify(LogitDataset.open(copy), deep=deep).faults)


def numbers_of(key: str, *values: Any) -> list[tuple[str, Any]]:
    return [(key, value) for value in values]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *numbers_of("rows", -1, 0, 1 << 40, 10**400, "3", 3.0, True, None, [3]),
        *numbers_of("longest_row", -1, 10**400, "9", 1.5),
        *numbers_of("size_bytes", -1, 1 << 31),
        *numbers_of("kept_mass", -1.0, 10**400, "1", None),
        *numbers_of("loss_nats", [], [0.1], [0.1, -0.1], [0.1, 10**400], {"1": 0.1}, 0.1),
        *numbers_of("sha256", "", "0" * 63, "G" * 64, 0, None),
        *numbers_of("surprise", 1),
    ],
)
def test_impossible_numbers_of_a_shard_are_refused(key: str, value: Any, copy: Path):
    edit_manifest(copy, lambda m: m["shards"][1].update({key: value}))
    _matches(r"(?s)DamagedManifestError: .*manifest\.json: .*next: copy manifest\.json again", opened(copy))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *numbers_of("temperatures", [], [2.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, -2.0], [1.0, 1e300], [True], "1"),
        ("temperatures", [1.0] + [1.0 + n / 1000 for n in range(1, 65)]),
        *numbers_of("vocab_size", 0, -1, 1 << 40, "36", 36.0),
        *numbers_of("keep", {}, [], {"method": "other"}, {"method": ["topk"]}, {"method": "threshold"}),
        *numbers_of("keep", *({"method": "topk", "max_kl": x} for x in (-1, 1, 2, "0", None, True, [0], 10**400))),
        *numbers_of("keep", *({"method": "threshold", "tau": x} for x in (0, 1, -1, "0.1", None))),
        *numbers_of("keep", {"method": "topk", "half a character": "\ud800"}),
        *numbers_of("files", {"x": "0"}, {"x": None}, []),
        *numbers_of("missing", ["../x"], ["data/part-00000.parquet"]),
        *numbers_of("created_by", None, 1, "\ud800"),
        *numbers_of("history", [{}], [{"operation": "rm -rf", "parents": []}]),
    ],
)
def test_an_impossible_manifest_is_refused(key: str, value: Any, copy: Path):
    edit_manifest(copy, lambda m: m.update({key: value}))
    _matches(r"(?s)DamagedManifestError: .*manifest\.json: .*next: copy manifest\.json again", opened(copy))


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


def text_of(copy: Path, old: str, new: str) -> None:
    text = (copy / "manifest.json").read_text()
    assert old in text
    (copy / "manifest.json").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: text_of(d, '"rows": ', '"rows": 1, "rows": '), "key 'rows' is given twice"),
        (lambda d: text_of(d, '"format_version": 1', '"format_version": 1, "format_version": 2'), "given twice"),
        (lambda d: text_of(d, '"kept_mass": ', '"kept_mass": NaN, "x": '), "NaN is not a number"),
        (lambda d: text_of(d, '"kept_mass": ', '"kept_mass": -Infinity, "x": '), "-Infinity is not a number"),
        (lambda d: text_of(d, '"max_kl": ', '"x": 1e999, "max_kl": '), "keep: "),
        (lambda d: text_of(d, '"kept_mass": ', '"kept_mass": 1e999, "x": '), "kept_mass: "),
        (lambda d: text_of(d, '"rows": ', '"rows": ' + "9" * 10_000 + ', "x": '), "not valid JSON"),
        (lambda d: edit_manifest(d, lambda m: m["keep"].update(x=nested(900))), "nested deeper than 16"),
        (lambda d: edit_manifest(d, lambda m: m["inputs"][0]["settings"].update(x=nested(17))), "nested deeper"),
        (lambda d: (d / "manifest.json").write_bytes(b'{"a":' * 100_000), "not valid JSON"),
        (lambda d: (d / "manifest.json").write_bytes(b"[" + b"[]," * (1 << 22) + b"[]]"), "values, at most"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xef\xbb\xbf{}"), "not valid JSON"),
        (lambda d: (d / "manifest.json").write_bytes("{}".encode("utf-16")), "not valid JSON"),
        (lambda d: (d / "manifest.json").write_bytes(b"{}\0"), "not valid JSON"),
        (lambda d: (d / "manifest.json").write_bytes(b"[]"), "expected a mapping, got list"),
        (lambda d: os.truncate(d / "manifest.json", MAX_MANIFEST_BYTES + 1), "at most 268435456 are allowed"),
        (lambda d: os.truncate(d / "manifest.json", 300), "not valid JSON"),
    ],
)
def test_json_that_means_more_than_one_thing_or_too_much_is_refused(damage: Damage, words: str, copy: Path):
    damage(copy)
    message = opened(copy)
    _matches(r"(?s)DamagedManifestError: .*manifest\.json: .*next: ", message)
    assert words in message


@pytest.mark.parametrize("version", [2, 0, -1, 1.0, True, None, "1", [1], 10**4000])
def test_another_version_is_refused_whatever_it_is(version: Any, copy: Path):
    edit_manifest(copy, lambda m: m.update(format_version=version))
    _matches(r"(?s)UnknownVersionError: .*manifest\.json: format version .*pip install --upgrade", opened(copy))


def foreign_tokenizer(path: Path) -> None:
    tiny_tokenizer("zyxwvutsrqponmlkjihgfedcbaäöüß√中").save(str(path))


TOKENIZERS: dict[str, Damage] = {
    "missing": lambda path: None,
    "another": foreign_tokenizer,
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"model": 1})),
    "deep": lambda path: path.write_bytes(b'{"model":' * 100_000),
    "no model": lambda path: path.write_text('{"version": "1.0", "model": {}}'),
    "ids that jump": lambda path: path.write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}'
    ),
    "merges of nothing": lambda path: path.write_text('{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}'),
    "a folder": lambda path: path.mkdir(),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(kind: str, copy: Path):
    instead("tokenizer/tokenizer.json", TOKENIZERS[kind])(copy)
    message = outcome(LogitDataset.open(copy).tokenizer)
    _matches(r"(?s)(Damaged\w+|ForeignTokenizerError|MismatchError): .*tokenizer\.json", message)


def test_a_pipe_for_a_tokenizer_is_not_waited_for(copy: Path):
    instead("tokenizer/tokenizer.json", os.mkfifo)(copy)
    message = outcome(LogitDataset.open(copy).tokenizer, seconds=5)
    _matches("DamagedDataError: .*tokenizer.json: is a folder, pipe or device, not a file", message)


def test_links_that_lead_in_a_circle_are_faults_of_other_files(copy: Path):
    instead("README.md", lambda path: path.symlink_to(path.name))(copy)
    (fault,) = verify(LogitDataset.open(copy), deep=False).faults
    assert "README.md: cannot be read" in fault
