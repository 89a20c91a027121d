"""A sealed dataset as the team next door meets it: whole, damaged, unfinished, or from the future."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedDataError, LogitferryError, UnknownVersionError, UnsealedDatasetError
from shared.logit_shards import cli
from shared.shard_writer import Storage, encode_shard
from shared.verification import verify
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    files = write_jsonl(folder / "chats.jsonl", chat_records(12))
    return sealed_dump(dump_settings(teacher_folder, files, folder / "out")).folder


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "copy"))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def faults(folder: Path) -> str:
    return "\n".join(verify(LogitDataset.open(folder), deep=True).faults)


def test_a_whole_dataset_has_no_fault(copy: Path):
    assert faults(copy) == ""


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: flip(d / "data/part-00001.parquet"), "part-00001.parquet: damaged"),
        (lambda d: (d / "data/part-00000.parquet").unlink(), "part-00000.parquet: is missing"),
        (lambda d: flip(d / "tokenizer/chat_template.jinja"), "chat_template.jinja: damaged"),
        (lambda d: (d / "tokenizer/tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda d: (d / "README.md").unlink(), "README.md: is missing"),
        (lambda d: (d / "data/part-00009.parquet").write_bytes(b""), "part-00009.parquet: is not in the manifest"),
        (lambda d: (d / "tokenizer/extra.py").write_bytes(b""), "tokenizer/extra.py: is not in the manifest"),
        (
            lambda d: edit_manifest(d, lambda m: m["shards"][0].update(positions=1)),
            "the manifest has 1 values of realised_logprob",
        ),
        (lambda d: edit_manifest(d, lambda m: m["shards"][0].update(longest_row=1)), "the manifest says longest_row 1"),
        (lambda d: edit_manifest(d, lambda m: m["shards"][0].update(kept_mass=1.5)), "the manifest says kept_mass 1.5"),
    ],
)
def test_verify_names_each_damage(damage: Callable[[Path], Any], named: str, copy: Path):
    damage(copy)
    assert named in faults(copy)


def test_a_card_that_was_written_anew_is_told_and_no_damage(copy: Path):
    assert not verify(LogitDataset.open(copy), deep=False).card_is_new
    (copy / "README.md").write_text("# What we changed on the Hub")
    found = verify(LogitDataset.open(copy), deep=False)
    assert (found.card_is_new, found.faults) == (True, [])
    result = CliRunner().invoke(cli, ["verify", str(copy)])
    assert "README.md was written anew since it was sealed" in result.output
    assert json.loads(CliRunner().invoke(cli, ["verify", str(copy), "--json"]).output)["card_is_new"] is True


def test_verify_reports_every_fault_at_once(copy: Path):
    flip(copy / "data/part-00000.parquet")
    flip(copy / "data/part-00001.parquet")
    flip(copy / "tokenizer/chat_template.jinja")
    assert len(verify(LogitDataset.open(copy), deep=True).faults) == 3


def reseal(folder: Path, index: int, change: Callable[[Any], Any]) -> None:
    """Rewrite a shard with changed rows and true digests: a writer's mistake, not a damaged disk."""
    dataset = LogitDataset.open(folder)
    manifest = dataset.manifest
    shard = manifest.shards[index]
    rows = change(dataset.read_shard(index))
    data, entry = encode_shard(rows, manifest.row_format, Storage(max_kl=0), shard.path)
    (folder / shard.path).write_bytes(data)
    edit_manifest(folder, lambda m: m["shards"].__setitem__(index, entry.model_dump()))


def test_verify_sees_distributions_shifted_by_one_token(copy: Path):
    """The off-by-one that costs a week: counts agree, every digest holds, only the realised tokens don't."""

    def shift(rows: list[Any]) -> list[Any]:
        for row in rows:
            mask = row.label_mask_L
            mask = np.roll(mask, -1) if not mask[1] else mask
            yield type(row)(**{**vars(row), "label_mask_L": mask})

    reseal(copy, 0, lambda rows: list(shift(rows)))
    assert "realised_logprob does not fit the distributions beside it" in faults(copy)


def test_verify_sees_mass_that_does_not_add_up(copy: Path):
    def heavier(rows: list[Any]) -> list[Any]:
        teachers = [replace(row.teacher, tail_logsum_PT=row.teacher.tail_logsum_PT + np.float32(0.1)) for row in rows]
        return [replace(row, teacher=teacher) for row, teacher in zip(rows, teachers, strict=True)]

    reseal(copy, 0, heavier)
    assert "kept ids and tail do not add up to one" in faults(copy)


def test_a_shard_that_is_a_link_out_of_the_dataset_is_refused(copy: Path, tmp_path: Path):
    shard = copy / "data/part-00000.parquet"
    shard.rename(tmp_path / "elsewhere.parquet")
    shard.symlink_to(tmp_path / "elsewhere.parquet")
    assert "leads outside the dataset" in faults(copy)


def test_verify_sees_a_sample_that_comes_twice(copy: Path):
    reseal(copy, 0, lambda rows: [*rows, rows[0]])
    assert "sample id 'chat-0' comes twice" in faults(copy)


def test_an_unfinished_dump_is_no_dataset(copy: Path, tmp_path: Path):
    (copy / "manifest.json").unlink()
    with pytest.raises(
        UnsealedDatasetError, match=r"(?s)no manifest\.json.*check the path: there is no unfinished dump"
    ):
        LogitDataset.open(copy)
    (copy / ".logitferry").mkdir()
    with pytest.raises(UnsealedDatasetError, match=r"(?s)no manifest\.json.*run the same `teacher-dump run` again"):
        LogitDataset.open(copy)
    with pytest.raises(ConfigError, match="does not exist"):
        LogitDataset.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"next: did you mean .*/copy\?"):
        LogitDataset.open(tmp_path / "coppy")
    with pytest.raises(ConfigError, match="copy it here first"):
        LogitDataset.open_here("memory://bucket/my-dump")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        LogitDataset.open(copy / "README.md")


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_another_format_version_is_refused_clearly(version: Any, copy: Path):
    edit_manifest(copy, lambda m: m.update(format_version=version))
    with pytest.raises(UnknownVersionError, match=r"(?s)this release reads version 1.*pip install --upgrade"):
        LogitDataset.open(copy)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["shards"][0].update(path="../../etc/passwd"),
        lambda m: m["shards"][0].update(path="/etc/passwd"),
        lambda m: m["shards"][0].update(path="data/../data/part-00000.parquet"),
        lambda m: m["files"].update({"../x": "0" * 64}),
        lambda m: m["files"].update({"tokenizer/../../x": "0" * 64}),
        lambda m: m["files"].update({"tokenizer\\..\\..\\x": "0" * 64}),
        lambda m: m["files"].update({"data/part-00000.parquet": "0" * 64}),
        lambda m: m["files"].update({"manifest.json": "0" * 64}),
        lambda m: m.update(vocab_size=1 << 40),
        lambda m: m.update(temperatures=[]),
        lambda m: m.update(temperatures=[2, 1]),
        lambda m: m.update(temperatures=[1, 2, 2]),
        lambda m: m.update(temperatures=[1, float("nan")]),
        lambda m: m.update(inputs={}),
        lambda m: m.update(teacher={}),
        lambda m: m.update(surprise=1),
        lambda m: m.pop("teacher"),
    ],
)
def test_a_hostile_manifest_is_refused(edit: Callable[[dict[str, Any]], Any], copy: Path):
    edit_manifest(copy, edit)
    with pytest.raises(DamagedDataError, match=r"manifest\.json"):
        LogitDataset.open(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_refused(content: bytes, copy: Path):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(LogitferryError, match=r"manifest\.json"):
        LogitDataset.open(copy)


def test_the_tokenizer_is_checked_against_the_manifest(copy: Path):
    edit_manifest(copy, lambda m: m.update(tokenizer_fingerprint="0" * 64))
    with pytest.raises(DamagedDataError, match="is not the tokenizer that the manifest names"):
        LogitDataset.open(copy).tokenizer()


def test_sample_ids_are_read_without_the_rest(copy: Path):
    ids = LogitDataset.open(copy).sample_ids()
    assert [name for shard in ids for name in shard] == [f"chat-{n}" for n in range(12)]


def test_any_parquet_reader_sees_plain_values(sealed: Path):
    """No decoder of ours: ids and log-probabilities are ordinary lists, one distribution per supervised token."""
    rows = [row for path in sorted(sealed.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]
    ours = [row for index in range(2) for row in LogitDataset.open(sealed).read_shard(index)]
    for row, expected in zip(rows, ours, strict=True):
        assert len(row["kept_ids"]) == len(row["kept_logprobs"]) == sum(row["label_mask"])
        assert [v for p in row["kept_ids"] for v in p] == expected.teacher.kept_ids_E.tolist()
        assert [v for p in row["kept_logprobs"] for v in p] == expected.teacher.kept_logp_E.tolist()
        assert row["tail_logsum_t2"] == expected.teacher.tail_logsum_PT[:, 1].tolist()
