"""Which files the patterns name, in which order, and what is refused before anything is read."""

import hashlib
import importlib.util
import logging
import zipfile
from pathlib import Path

import datasets
import fsspec
import pytest

from shared.errors import ConfigError
from shared.text_files import TextFile, find_text_files

LINE = b'{"text": "a"}\n'


@pytest.fixture
def folder(tmp_path):
    """Makes files that hold one record each, and says where they lie."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(LINE)
        return tmp_path

    return make


@pytest.fixture
def memory():
    """fsspec's file system in memory, emptied afterwards."""
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def save(path: Path, *texts: str) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": list(texts)}).save_to_disk(path)
    return path


def names(*patterns: object) -> list[str]:
    return [file.name for file in find_text_files([str(pattern) for pattern in patterns])]


def only(pattern: object) -> TextFile:
    [file] = find_text_files([str(pattern)])
    return file


def refusal(*patterns: object) -> str:
    with pytest.raises(ConfigError) as caught:
        find_text_files([str(pattern) for pattern in patterns])
    return str(caught.value)


def test_find_text_files_keeps_the_order_of_the_patterns_and_sorts_within_each(folder):
    root = folder("z.jsonl", "d/c.jsonl", "d/a.parquet", "d/b.json", "g/2.ndjson", "g/10.ndjson", "g/1.jsonl")
    found = names(root / "z.jsonl", root / "g" / "*.ndjson", root / "d")
    assert [Path(name).relative_to(root).as_posix() for name in found] == [
        "z.jsonl",
        "g/10.ndjson",
        "g/2.ndjson",
        "d/a.parquet",
        "d/b.json",
        "d/c.jsonl",
    ]
    assert names(root / "d", root / "z.jsonl")[-1] == str(root / "z.jsonl")


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.jsonl", "json", None),
        ("a.ndjson", "json", None),
        ("a.json", "json", None),
        ("a.parquet", "parquet", None),
        ("a.jsonl.zst", "json", ".zst"),
        ("a.json.gz", "json", ".gz"),
        ("A.NDJSON.GZ", "json", ".gz"),
        ("v1.2.jsonl", "json", None),
    ],
)
def test_find_text_files_tells_form_and_compression_from_the_name(folder, name, kind, compression):
    file = only(folder(name) / name)
    assert (file.format, file.compression) == (kind, compression)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.csv", "a", "a.zst", "a.parquet.zst", "a.parquet.gz", "a.txt.gz", ".jsonl"]
)
def test_find_text_files_refuses_a_file_of_another_form(folder, name):
    path = folder(name) / name
    message = refusal(path)
    assert message.startswith(f"input file {path} is of no form that can be read")
    assert ".jsonl, .ndjson or .json (also .zst or .gz), .parquet" in message


def test_find_text_files_reads_nested_folders(folder):
    root = folder("d/a.jsonl", "d/deep/er/b.jsonl.gz", "d/deep/a.parquet")
    (root / "d" / "empty").mkdir()
    assert names(root / "d") == [str(root / "d" / x) for x in ("a.jsonl", "deep/a.parquet", "deep/er/b.jsonl.gz")]
    assert names(root / "d" / "**" / "*.gz") == [str(root / "d" / "deep/er/b.jsonl.gz")]


def test_find_text_files_leaves_other_files_of_a_folder_alone_and_says_so(folder, caplog):
    root = folder("d/a.jsonl", "d/README.md", "d/notes.txt", "d/b.zst")
    with caplog.at_level(logging.INFO, logger="logitferry"):
        assert names(root / "d") == [str(root / "d" / "a.jsonl")]
    assert f"{root / 'd'}: 1 files to read; 3 others are left alone" in caplog.text


def test_find_text_files_says_nothing_where_nothing_is_left_out(folder, caplog):
    with caplog.at_level(logging.INFO, logger="logitferry"):
        names(folder("d/a.jsonl") / "d")
    assert not caplog.records


def test_find_text_files_refuses_a_folder_without_text_files(folder):
    root = folder("d/notes.txt")
    assert refusal(root / "d").startswith(f"folder {root / 'd'} holds no text files")
    (root / "empty").mkdir()
    assert "holds no text files" in refusal(root / "empty")


def test_find_text_files_refuses_a_glob_that_catches_another_form(folder):
    root = folder("d/a.jsonl", "d/notes.txt")
    assert f"{root / 'd' / 'notes.txt'} is of no form" in refusal(root / "d" / "*")


def test_find_text_files_asks_whether_a_near_name_was_meant(folder):
    root = folder("train.jsonl", "test.parquet")
    message = refusal(root / "trian.jsonl")
    assert message == f"input file {root / 'trian.jsonl'} does not exist\n  next: did you mean train.jsonl?"


@pytest.mark.parametrize("pattern", ["qqqq.zzz", "gone/a.jsonl", "*.parquet"])
def test_find_text_files_refuses_what_matches_nothing(folder, pattern):
    message = refusal(folder("train.jsonl") / pattern)
    assert "does not exist" in message
    assert "check `files`; paths are relative to the folder where the command is run" in message


def test_find_text_files_refuses_a_file_named_twice(folder):
    root = folder("d/a.jsonl", "d/b.jsonl")
    path = root / "d" / "a.jsonl"
    assert refusal(path, path) == f"{path} is named twice in `files`\n  next: name every file once"
    assert "a.jsonl is named twice" in refusal(path, root / "d")
    assert "a.jsonl is named twice" in refusal(root / "d", root / "d" / "a*")
    assert "a.jsonl is named twice" in refusal(path, f"file://{path}")


def test_find_text_files_refuses_a_file_named_twice_relative_and_absolute(folder, monkeypatch):
    root = folder("d/a.jsonl")
    monkeypatch.chdir(root)
    assert "named twice" in refusal("d/a.jsonl", root / "d" / "a.jsonl")
    assert "named twice" in refusal("d/a.jsonl", "./d/a.jsonl")


def test_find_text_files_refuses_a_file_named_twice_by_way_of_its_parent(folder):
    root = folder("d/a.jsonl")
    assert "named twice" in refusal(root / "d" / "a.jsonl", f"{root}/d/../d/a.jsonl")


def test_find_text_files_names_relative_paths_relatively(folder, monkeypatch):
    monkeypatch.chdir(folder("d/a.jsonl", "d/b.jsonl"))
    assert names("d") == ["d/a.jsonl", "d/b.jsonl"]
    assert names("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert names("d/b.jsonl", "./d/a.jsonl") == ["d/b.jsonl", "./d/a.jsonl"]


def test_find_text_files_takes_a_name_with_brackets_literally_where_it_exists(folder):
    root = folder("a[1].jsonl", "a1.jsonl", "d[x]/b.jsonl")
    assert names(root / "a[1].jsonl") == [str(root / "a[1].jsonl")]
    assert names(root / "d[x]") == [str(root / "d[x]" / "b.jsonl")]
    assert names(root / "a[0-9].jsonl") == [str(root / "a1.jsonl")], "a glob where no file has that very name"


def test_find_text_files_takes_a_name_with_colons_literally_where_it_exists(folder):
    root = folder("data::v2.jsonl")
    assert names(root / "data::v2.jsonl") == [str(root / "data::v2.jsonl")]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", ".git/x/y.json"])
def test_find_text_files_leaves_hidden_files_of_a_folder_alone(folder, hidden):
    root = folder("d/a.jsonl", f"d/{hidden}")
    assert names(root / "d") == names(root / "d" / "*") == [str(root / "d" / "a.jsonl")]


def test_find_text_files_reads_urls(folder, memory):
    root = folder("a.jsonl")
    memory.pipe({"/texts/b.jsonl": LINE, "/texts/a.jsonl.gz": LINE, "/texts/notes.txt": LINE})
    assert names("memory://texts/b.jsonl", f"file://{root}/a.jsonl") == [
        "memory://texts/b.jsonl",
        f"file://{root}/a.jsonl",
    ]
    assert names("memory://texts") == ["memory://texts/a.jsonl.gz", "memory://texts/b.jsonl"]
    assert names("memory://texts/*.jsonl*") == ["memory:///texts/a.jsonl.gz", "memory:///texts/b.jsonl"]
    assert only("memory://texts/b.jsonl").open().read() == LINE
    assert only(f"file://{root}/a.jsonl").open().read() == LINE


def test_find_text_files_refuses_urls_that_match_nothing_or_twice(memory):
    memory.pipe("/texts/train.jsonl", LINE)
    assert "did you mean train.jsonl?" in refusal("memory://texts/trian.jsonl")
    assert "does not exist" in refusal("memory://texts/*.parquet")
    assert "named twice" in refusal("memory://texts/train.jsonl", "memory://texts")


def test_find_text_files_refuses_an_unknown_protocol():
    message = refusal("nosuch://bucket/a.jsonl")
    assert message.startswith("nosuch://bucket/a.jsonl cannot be read: ")
    assert "nosuch" in message.split("cannot be read")[1]


@pytest.mark.parametrize(("protocol", "library"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_find_text_files_says_what_to_install_for_a_protocol(protocol, library):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    message = refusal(f"{protocol}://bucket/a.jsonl")
    assert library in message
    assert "next: pip install 'logitferry[hub]'" in message


def test_find_text_files_tells_files_of_two_archives_apart_from_one_named_twice(tmp_path):
    for name in ("one", "two"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("a.jsonl", LINE)
    assert names(f"zip://a.jsonl::{tmp_path}/one.zip") == [f"zip://a.jsonl::{tmp_path}/one.zip"]
    assert "named twice" in refusal(*[f"zip://a.jsonl::{tmp_path}/one.zip"] * 2)


def test_find_text_files_reads_files_of_one_name_in_two_archives(tmp_path):
    for name in ("one", "two"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("a.jsonl", LINE)
    assert len(names(*[f"zip://a.jsonl::{tmp_path}/{name}.zip" for name in ("one", "two")])) == 2


def test_find_text_files_takes_the_folder_of_a_saved_dataset_as_one_file(tmp_path):
    file = only(save(tmp_path / "saved", "a", "b"))
    assert (file.name, file.format, file.compression) == (str(tmp_path / "saved"), "datasets", None)
    assert "named twice" in refusal(tmp_path / "saved", tmp_path / "saved")


def test_find_text_files_refuses_a_dataset_of_several_splits_and_names_them(tmp_path):
    datasets.disable_progress_bars()
    split = datasets.Dataset.from_dict({"text": ["a"]})
    root = tmp_path / "saved"
    datasets.DatasetDict(train=split, test=split).save_to_disk(root)
    message = refusal(root)
    assert message.startswith(f"{root} is a saved dataset with several splits")
    assert f"next: name those you mean: {root}/test, {root}/train" in message
    assert names(root / "train", root / "test") == [f"{root}/train", f"{root}/test"]


def test_find_text_files_never_takes_the_inside_of_a_saved_dataset_for_text(tmp_path):
    save(tmp_path / "d" / "saved", "a")
    (tmp_path / "d" / "a.jsonl").write_bytes(LINE)
    try:
        found = names(tmp_path / "d")
    except ConfigError:
        return
    assert not {Path(name).name for name in found} & {"state.json", "dataset_info.json"}


def test_find_text_files_does_not_drop_saved_datasets_that_a_glob_catches(tmp_path):
    save(tmp_path / "d" / "saved", "a")
    (tmp_path / "d" / "a.jsonl").write_bytes(LINE)
    try:
        found = names(tmp_path / "d" / "*")
    except ConfigError:
        return
    assert str(tmp_path / "d" / "saved") in found


def test_find_text_files_reads_a_folder_where_somebody_elses_state_lies(folder):
    root = folder("d/a.jsonl")
    (root / "d" / "state.json").write_text("{}")
    assert str(root / "d" / "a.jsonl") in names(root / "d")


def test_sha256_of_a_file_is_of_its_bytes(tmp_path, memory):
    data = bytes(range(256)) * 20_000  # more than one block
    (tmp_path / "a.jsonl").write_bytes(data)
    memory.pipe("/a.jsonl", data)
    digest = hashlib.sha256(data).hexdigest()
    assert only(tmp_path / "a.jsonl").sha256() == only("memory://a.jsonl").sha256() == digest


def test_sha256_of_a_saved_dataset_depends_on_every_file_but_not_on_its_place(tmp_path):
    root = save(tmp_path / "saved", "a", "b")
    whole = only(root).sha256()
    assert len(whole) == 64
    assert only(root.rename(tmp_path / "moved")).sha256() == whole
    root = tmp_path / "moved"
    for path in sorted(root.iterdir()):
        before = path.read_bytes()
        path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        assert only(root).sha256() != whole, path.name
        path.write_bytes(before)
    assert only(root).sha256() == whole
    next(root.glob("*.arrow")).rename(root / "other.arrow")
    assert only(root).sha256() != whole, "names count too"


def test_open_says_which_file_is_gone(folder):
    root = folder("a.jsonl")
    file = only(root / "a.jsonl")
    (root / "a.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"a\.jsonl cannot be read: .*\n  next: check `files` and your access"):
        file.open()


def test_sha256_says_which_file_is_gone(folder):
    root = folder("a.jsonl")
    file = only(root / "a.jsonl")
    (root / "a.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"a\.jsonl cannot be read"):
        file.sha256()
