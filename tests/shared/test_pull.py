"""A dataset is pulled, whole or in part: verified, nothing twice, and a part is a dataset of its own."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedDataError, LogitferryError, MismatchError, UnsealedDatasetError
from shared.licences import licences_in
from shared.logit_shards import cli
from shared.pull import Part, Pulled, Source, a_share, part_of, pull, some_shards
from shared.rows import LogitRow
from shared.verification import verify
from tests.killed import killed_at
from tests.shared.made_datasets import made_rows, write_dataset
from tests.shared.made_rows import assert_same_rows
from tests.shared.stores import files_of, memory_store

URL = "memory://bucket/my-dump"
SHARD = "data/part-00001.parquet"
ROWS = (4, 3, 5, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LogitDataset:
    folder = write_dataset(tmp_path_factory.mktemp("made") / "set", [made_rows(n, rows) for n, rows in enumerate(ROWS)])
    assert CliRunner().invoke(cli, ["card", str(folder), "--license", "mit"]).exit_code == 0
    return LogitDataset.open(folder)


@pytest.fixture
def store(made: LogitDataset) -> Iterator[Any]:
    with memory_store("bucket/my-dump", made.folder) as found:
        yield found


def rows_of(dataset: LogitDataset) -> list[LogitRow]:
    return [row for index in range(len(dataset.manifest.shards)) for row in dataset.read_shard(index)]


def here(folder: Path, url: str = URL, *, shards: str | None = None, share: float | None = None, **more: Any) -> Pulled:
    source = Source.open(url, folder)
    return pull(source, part_of(source.manifest, shards, share), **more)


def test_what_is_pulled_whole_is_the_same_dataset(made: LogitDataset, store: Any, tmp_path: Path):
    done = here(tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(made.folder)
    assert (done.identity, done.rows, done.shards, done.fetched) == (made.identity(), 14, 4, 5)
    assert here(tmp_path / "again", str(tmp_path / "out")).identity == made.identity(), "of a folder as well"


def test_what_lies_here_whole_is_not_fetched_again(store: Any, fetched: list[str], tmp_path: Path):
    def stop() -> None:
        if SHARD in fetched:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here(tmp_path / "out", on_file=stop)
    with pytest.raises(UnsealedDatasetError):
        LogitDataset.open(tmp_path / "out")
    done = here(tmp_path / "out")
    assert (done.fetched, done.kept) == (2, 3)
    assert sorted(path for path in fetched if path.startswith("data")) == [
        f"data/part-0000{n}.parquet" for n in range(4)
    ]
    (tmp_path / "out" / SHARD).write_bytes(b"rot")
    done = here(tmp_path / "out")
    assert (done.fetched, done.kept) == (1, 4)
    assert verify(LogitDataset.open(tmp_path / "out"), deep=True).faults == []


@pytest.mark.parametrize("share", [None, 0.5])
def test_killed_at_any_step_it_is_no_dataset_and_goes_on(share: float | None, made: LogitDataset, tmp_path: Path):
    here(tmp_path / "expected", str(made.folder), share=share)
    step, ended = 1, False
    while not ended:
        folder = tmp_path / f"out-{step}"
        ended = not killed_at(step, lambda to=folder: here(to, str(made.folder), share=share))
        if (folder / "manifest.json").exists():
            assert verify(LogitDataset.open(folder), deep=False).faults == []
        here(folder, str(made.folder), share=share)
        assert files_of(folder) == files_of(tmp_path / "expected"), step
        step += 7
    assert step > 30


@pytest.mark.parametrize(("number", "options"), [(1, {}), (1, {"shards": "0-1"}), (2, {"share": 0.1})])
def test_a_flipped_byte_there_is_found_and_nothing_is_sealed(
    number: int, options: dict[str, Any], store: Any, tmp_path: Path
):
    shard = f"data/part-0000{number}.parquet"
    data = store.cat_file(f"/bucket/my-dump/{shard}")
    store.pipe_file(f"/bucket/my-dump/{shard}", data[:77] + bytes([data[77] ^ 4]) + data[78:])
    with pytest.raises(DamagedDataError, match=rf"{URL}/{shard}: damaged: expected sha256"):
        here(tmp_path / "out", **options)
    assert not (tmp_path / "out/manifest.json").exists()
    assert not (tmp_path / "out" / shard).exists()
    store.pipe_file(f"/bucket/my-dump/{shard}", data)
    here(tmp_path / "out", **options)
    assert verify(LogitDataset.open(tmp_path / "out"), deep=True).faults == []


def test_a_file_that_is_not_there_is_named(store: Any, tmp_path: Path):
    store.rm(f"/bucket/my-dump/{SHARD}")
    with pytest.raises(DamagedDataError, match=rf"{SHARD}: is missing"):
        here(tmp_path / "out")


def test_a_card_that_was_edited_or_lost_there_is_no_damage(made: LogitDataset, store: Any, tmp_path: Path):
    store.pipe_file("/bucket/my-dump/README.md", b"edited on the Hub")
    assert here(tmp_path / "out").identity == made.identity()
    assert (tmp_path / "out/README.md").read_bytes() == b"edited on the Hub"
    store.rm("/bucket/my-dump/README.md")
    here(tmp_path / "more")
    assert "Log-probabilities" in (tmp_path / "more/README.md").read_text()


def test_a_dataset_that_was_sealed_without_a_card_is_whole_with_the_one_it_is_given(made: LogitDataset, tmp_path: Path):
    bare = Path(shutil.copytree(made.folder, tmp_path / "bare"))
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["files"]["README.md"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    (bare / "README.md").unlink()
    here(tmp_path / "out", str(bare))
    assert (tmp_path / "out/README.md").is_file()
    assert verify(LogitDataset.open(tmp_path / "out"), deep=False).faults == []


def test_what_somebody_wrote_into_the_card_here_stays(
    made: LogitDataset, store: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    here(tmp_path / "out")
    card = tmp_path / "out/README.md"
    store.pipe_file("/bucket/my-dump/README.md", b"edited on the Hub")
    here(tmp_path / "out")
    card.write_bytes(b"notes of ours")
    here(tmp_path / "out")
    assert card.read_bytes() == b"notes of ours"
    assert f"{card} is another than at the source, and stays; delete it" in caplog.text
    card.unlink()
    here(tmp_path / "out")
    assert card.read_bytes() == b"edited on the Hub"


def test_a_newer_card_there_takes_the_place_of_the_one_it_was_sealed_with(store: Any, tmp_path: Path):
    sealed = write_dataset(tmp_path / "sealed", [made_rows(7, 2)])
    here(tmp_path / "out", str(sealed))
    (sealed / "README.md").write_bytes(b"newer")
    here(tmp_path / "out", str(sealed))
    assert (tmp_path / "out/README.md").read_bytes() == b"newer"


@pytest.mark.parametrize("share", [None, 0.9])
@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_source_that_is_replaced_while_it_is_pulled_is_not_called_damaged(
    is_sealed: bool, share: float | None, store: Any, tmp_path: Path
):
    other = files_of(write_dataset(tmp_path / "other", [made_rows(number, 3) for number in range(5, 9)]))

    def replaced() -> None:
        for path, data in other.items():
            store.pipe_file(f"/bucket/my-dump/{path}", data)
        if not is_sealed:
            store.rm("/bucket/my-dump/manifest.json")

    with pytest.raises(MismatchError, match=r"became another dataset while it was pulled(.|\n)*next: delete"):
        here(tmp_path / "out", share=share, on_file=replaced)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("path", ["README.md", SHARD, "manifest.json"])
def test_no_dataset_here_has_us_read_another_file_or_wait_for_a_pipe(path: str, made: LogitDataset, tmp_path: Path):
    theirs = Path(shutil.copytree(made.folder, tmp_path / "theirs"))
    shutil.move(theirs / path, tmp_path / "key")
    (theirs / path).symlink_to(tmp_path / "key")
    with pytest.raises(DamagedDataError, match="leads outside the dataset") as refused:
        here(tmp_path / "out", str(theirs))
    assert refused.value.next_step
    (theirs / path).unlink()
    os.mkfifo(theirs / path)
    with pytest.raises(DamagedDataError, match="is a folder, pipe or device"):
        here(tmp_path / "out", str(theirs))


@pytest.mark.parametrize(
    "command",
    [["pull", "{made}", "{url}"], ["merge", "{made}", "--output", "{url}"],
     ["filter", "{made}", "--sample-ids", "ids", "--output", "{url}"]],
)  # fmt: skip
def test_a_new_dataset_is_not_made_at_a_url(
    command: list[str], made: LogitDataset, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids").write_text("0-zeile-ü-0\n", encoding="utf-8")
    arguments = [each.format(made=made.folder, url="memory://bucket/there") for each in command]
    refused = CliRunner().invoke(cli, arguments)
    assert isinstance(refused.exception, ConfigError)
    assert "next: give a folder here, then: logit-shards push FOLDER memory://bucket/there" in str(refused.exception)
    assert list(tmp_path.iterdir()) == [tmp_path / "ids"], "no folder named memory:"
    arguments = [each.format(made=made.folder, url=(tmp_path / "out").as_uri()) for each in command]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert verify(LogitDataset.open(tmp_path / "out"), deep=False).faults == []


def test_some_shards_are_a_dataset_that_says_where_it_comes_from(made: LogitDataset, store: Any, tmp_path: Path):
    done = here(tmp_path / "out", shards="3,1-2")
    part = LogitDataset.open(tmp_path / "out")
    assert verify(part, deep=True).faults == []
    assert_same_rows(rows_of(part), [row for index in (1, 2, 3) for row in made.read_shard(index)])
    (event,) = part.manifest.history
    assert (event.parents, event.removed_rows) == ([made.identity()], 4)
    assert event.reason == f"pulled from {URL}: shards 3,1-2 of 4"
    assert (done.rows, done.source_identity, done.identity) == (10, made.identity(), part.identity())
    assert part.manifest.shards == made.manifest.shards[1:], "byte for byte"
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert licences_in(card).dataset == ("mit",)
    assert event.reason in card
    here(tmp_path / "less", str(tmp_path / "out"), shards="0")
    first, second = LogitDataset.open(tmp_path / "less").manifest.history
    assert (first, second.parents) == (event, [part.identity()]), "a part of a part says both"


@pytest.mark.parametrize(("share", "rows"), [(0.1, 2), (0.5, 7), (0.51, 8), (1e-9, 1), (1.0, 14)])
def test_a_share_is_that_many_rows(share: float, rows: int, made: LogitDataset, store: Any, tmp_path: Path):
    here(tmp_path / "out", share=share)
    part = LogitDataset.open(tmp_path / "out")
    assert verify(part, deep=True).faults == []
    wanted = {row.sample_id: row for row in rows_of(made)}
    assert part.manifest.total("rows") == rows == len(rows_of(part))
    assert_same_rows(rows_of(part), [wanted[row.sample_id] for row in rows_of(part)])
    taken = {row.sample_id for row in rows_of(part)}
    for ids in made.sample_ids():
        assert taken & set(ids) == set(ids[: len(taken & set(ids))]), "the first rows of a shard"
    assert part.manifest.total("positions") == sum(row.num_positions for row in rows_of(part))


def test_a_share_is_taken_evenly_and_of_no_more_shards_than_it_needs(made: LogitDataset):
    shard = made.manifest.shards[0]
    many = made.manifest.model_copy(
        update={
            "shards": [shard.model_copy(update={"rows": 10, "path": f"data/part-{n:05d}.parquet"}) for n in range(40)]
        }
    )
    part = a_share(many, 0.1)
    assert part.shards == (5, 15, 25, 35)
    assert part.rows_of_last is None
    assert a_share(many, 0.11) == Part(said="44 of 400 rows", shards=(4, 12, 20, 28, 36), rows_of_last=4)


@pytest.mark.parametrize("said", ["", "a", "1-", "-1", "2-1", "0,,1", "4", "0-4", "²"])
def test_shards_that_are_not_there_or_no_numbers_are_refused(said: str, made: LogitDataset):
    with pytest.raises(ConfigError, match=r"--shards(.|\n)*next: "):
        some_shards(made.manifest, said)


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share: float, made: LogitDataset):
    with pytest.raises(ConfigError, match=r"--share(.|\n)*next: "):
        a_share(made.manifest, share)


def test_only_one_way_to_say_which_part(made: LogitDataset):
    with pytest.raises(ConfigError, match="both"):
        part_of(made.manifest, "0", 0.1)


def test_a_part_that_is_there_is_not_pulled_again(store: Any, fetched: list[str], tmp_path: Path):
    here(tmp_path / "out", share=0.5)
    num = len(fetched)
    assert here(tmp_path / "out", share=0.5).rows == 7
    assert fetched[num:] == ["manifest.json"]
    next((tmp_path / "out/data").iterdir()).write_bytes(b"rot")
    with pytest.raises(DamagedDataError, match="and pull it again"):
        here(tmp_path / "out", share=0.5)


def test_a_folder_with_something_else_is_refused(made: LogitDataset, store: Any, tmp_path: Path):
    write_dataset(tmp_path / "other", [made_rows(9, 2)])
    here(tmp_path / "part", shards="0")
    (tmp_path / "begun").mkdir()
    shutil.copy(tmp_path / "part/README.md", tmp_path / "begun/.pulling.json")
    before = {name: files_of(tmp_path / name) for name in ("other", "part", "begun")}
    for name, options in (("other", {}), ("part", {}), ("part", {"shards": "1"}), ("begun", {})):
        with pytest.raises(MismatchError, match="give another folder"):
            here(tmp_path / name, **options)
    assert {name: files_of(tmp_path / name) for name in before} == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").touch()
    with pytest.raises(ConfigError, match="is not ours to write to"):
        here(tmp_path / "thesis")


def test_of_a_dataset_that_lacks_shards_no_part_is_pulled(store: Any, tmp_path: Path):
    tree = json.loads(store.cat_file("/bucket/my-dump/manifest.json"))
    tree["missing"] = [tree["shards"].pop()["path"]]
    store.pipe_file("/bucket/my-dump/manifest.json", json.dumps(tree).encode())
    with pytest.raises(MismatchError, match="1 shards are missing"):
        here(tmp_path / "out", share=0.5)
    assert here(tmp_path / "whole").shards == 3


def test_into_its_own_source_nothing_is_pulled(made: LogitDataset):
    before = files_of(made.folder)
    for folder in (made.folder / "copy", made.folder / "data", made.folder.parent):
        with pytest.raises(ConfigError, match=r"lies in .*of which it would be a part"):
            here(folder, str(made.folder), share=0.5)
    assert files_of(made.folder) == before


@pytest.mark.parametrize("url", ["memory://bucket/nowhere", "s4://bucket/x", "/nowhere/at/all"])
def test_a_source_that_is_none_is_told_before_a_folder_is_made(url: str, store: Any, tmp_path: Path):
    with pytest.raises(LogitferryError):
        here(tmp_path / "out", url)
    assert not (tmp_path / "out").exists()


def test_pull_says_what_it_did(made: LogitDataset, store: Any, tmp_path: Path):
    result = CliRunner().invoke(cli, ["pull", URL, str(tmp_path / "out"), "--share", "0.5"])
    assert "7 rows in 2 shards; 3 files fetched, 0 were here" in result.output, result.output
    assert "7 of 14 rows of " in result.output
    told = json.loads(CliRunner().invoke(cli, ["pull", URL, str(tmp_path / "whole"), "--json"]).output)
    assert (told["identity"], told["rows"]) == (made.identity(), 14)
