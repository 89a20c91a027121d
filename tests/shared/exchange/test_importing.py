"""What is found out about other people's lists before anything is sealed, and what it is told by."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.dataset import LogitDataset
from shared.verification import verify
from tests.shared.exchange.made import all_rows, exported, sealed, tokenizer_folder, written_rows
from tests.shared.made_datasets import V


@pytest.fixture
def import_into(tmp_path, command):
    """Import into `new`: exit code, standard output, standard error."""

    def run(*sources: Any, vocab_size: int = V, tokenizer: Path | None = None) -> tuple[int, str, str]:
        tokenizer = tokenizer or tokenizer_folder(tmp_path / "tok")
        return command(
            "import", "--from", "axolotl", "--output", tmp_path / "new", "--tokenizer", tokenizer, "--teacher", "big",
            "--vocab-size", vocab_size, *sources,
        )  # fmt: skip

    return run


@pytest.fixture
def columns(tmp_path) -> dict[str, list[Any]]:
    """Rows of axolotl's as it stores them."""
    return pq.read_table(exported(sealed(tmp_path / "d", written_rows(1, 30)), tmp_path / "a.parquet")).to_pydict()


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def one(**changes: Any) -> dict[str, Any]:
    """A record of four tokens, two of them supervised."""
    lists = {"target_token_ids": [[], [3, 1], [4, 2], []], "target_logprobs": [[], [-0.1, -3], [-0.5, -2.0], []]}
    record = {"input_ids": [5, 6, 3, 4], "labels": [-100, -100, 3, 4], "attention_mask": [1, 1, 1, 1], **lists}
    return record | {"target_mask": [[1] * len(each) for each in lists["target_token_ids"]]} | changes


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("written", [0, 1])
def test_another_offset_that_is_clearly_better_is_refused_and_named(written, tmp_path, import_into, command):
    file = exported(sealed(tmp_path / "d", written_rows(2, 40)), tmp_path / "a.parquet", offset=written)
    code, _, err = import_into(file, "--offset", 1 - written)
    assert code == 4, err
    assert f"but it is about token i{written:+d}" in err
    assert f"next: import with --offset {written}" in err
    assert not (tmp_path / "new" / "manifest.json").exists()
    assert not list(tmp_path.glob(".new*"))
    code, out, err = import_into(file, "--offset", written, "--json")
    assert code == 0, err
    found = json.loads(out)["alignment"]
    assert found[f"{written}"]["share_in_list"] > 0.7
    assert found[f"{1 - written}"]["share_in_list"] < 0.4
    assert LogitDataset.open(tmp_path / "new").manifest.inputs[0].settings["alignment"] == found


def test_lists_that_were_moved_the_other_way_are_found_as_well(columns, tmp_path, import_into):
    """As where a template ends in a line break and lists were put against the end of the row."""
    for name in ("target_token_ids", "target_logprobs", "target_mask"):
        columns[name] = [[[], [], *row[:-2]] for row in columns[name]]
    code, _, err = import_into(write(tmp_path / "b.parquet", columns))
    assert code == 4
    assert "next: import with --offset -1" in err


def test_the_folder_that_one_is_in_is_no_output(tmp_path, import_into, monkeypatch):
    file = lines(tmp_path / "a.jsonl", one())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = import_into(file, "--output", ".")
    assert code == 2
    assert "is the folder that you are in" in err
    assert "next: " in err


def test_a_url_is_no_folder_of_that_name_here(tmp_path, import_into, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = sealed(tmp_path / "d", written_rows(2, 40))
    assert import_into(lines(tmp_path / "a.jsonl", one()), "--output", "memory://bucket/x")[0] == 2
    code, _, err = command("export", dataset.folder, "--to", "jsonl", "--output", "memory://bucket/x.jsonl")
    assert code == 2
    assert "is not on this machine" in err
    assert "has no name" in command("export", dataset.folder, "--to", "jsonl", "--output", "")[2]
    assert not (tmp_path / "memory:").exists()


def test_too_little_to_tell_is_said_and_imported(tmp_path, import_into):
    code, _, err = import_into(lines(tmp_path / "a.jsonl", one()))
    assert code == 0, err
    assert "too little to tell by that offset 1 is the right one; of 1 lists\n  token i-1: in " in err
    (row,) = all_rows(LogitDataset.open(tmp_path / "new"))
    assert row.sample_id == "a.jsonl:0"
    assert row.teacher.kept_ids_E.tolist() == [1, 3, 2, 4]
    assert np.allclose(row.teacher.kept_logp_E, [-3, -0.1, -2, -0.5])
    rest = 1 - np.exp([-0.1, -0.5]) - np.exp([-3.0, -2.0])
    assert np.allclose(np.exp(row.teacher.tail_logsum_PT[:, 0]), rest, atol=1e-6)


def test_padding_of_every_kind_is_left_out(tmp_path, import_into):
    """On either side, masked, −inf, −1e9 or null; ids there may be any number."""
    padded = one(
        input_ids=[0, 0, 5, 6, 3, 4, 0],
        labels=[-100, -100, -100, -100, 3, 4, -100],
        attention_mask=[0, 0, 1, 1, 1, 1, 0],
        target_token_ids=[[0, 1], [0, 1], [0, 1], [3, 1], [4, 2], [0, 1], [0, 0]],
        target_logprobs=[
            [-1e9, -1e9], [None, None], [-float("inf")] * 2, [-0.1, -3], [-0.5, -2.0], [-0.7, -0.7], [-1e9, -1e9],
        ],
        target_mask=[[0, 0], [0, 0], [1, 1], [1, 1], [1, 1], [0, 0], [0, 0]],
    )  # fmt: skip
    code, _, err = import_into(lines(tmp_path / "a.jsonl", padded | {"id": "p"}, one(id="q")))
    assert code == 0, err
    left, right = all_rows(LogitDataset.open(tmp_path / "new"))
    assert (left.sample_id, right.sample_id) == ("p", "q")
    assert np.array_equal(left.input_ids_L, right.input_ids_L)
    assert np.array_equal(left.label_mask_L, right.label_mask_L)
    assert np.array_equal(left.teacher.kept_ids_E, right.teacher.kept_ids_E)
    assert np.array_equal(left.teacher.kept_logp_E, right.teacher.kept_logp_E)


def test_sequences_that_were_packed_come_apart(tmp_path, import_into):
    packed = {name: [*values, *values] for name, values in one().items()}
    packed["labels"][4] = 5  # the first token of the second: no list of its own sequence predicts it
    packed["attention_mask"] = [1, 1, 1, 1, 2, 2, 2, 2]
    code, _, err = import_into(lines(tmp_path / "a.jsonl", packed))
    assert code == 0, err
    rows = all_rows(LogitDataset.open(tmp_path / "new"))
    assert [row.sample_id for row in rows] == ["a.jsonl:0.0", "a.jsonl:0.1"]
    assert [row.label_mask_L.tolist() for row in rows] == [[False, False, True, True]] * 2


def test_a_token_without_a_list_is_not_supervised_and_counted(tmp_path, import_into):
    bare = one(target_mask=[[], [0, 0], [1, 1], []])
    code, out, _ = import_into(lines(tmp_path / "a.jsonl", bare), "--json")
    assert code == 0
    assert json.loads(out)["inputs"][0]["tally"]["labels_without_a_list"] == 1
    (row,) = all_rows(LogitDataset.open(tmp_path / "new"))
    assert row.label_mask_L.tolist() == [False, False, False, True]


def test_renormalised_lists_are_refused_until_it_is_said(tmp_path, import_into):
    dataset = sealed(tmp_path / "d", written_rows(3, 40, k=4))
    file = exported(dataset, tmp_path / "a.parquet", renormalised=True)
    code, _, err = import_into(file)
    assert code == 4
    assert "they were renormalised" in err
    code, out, err = import_into(file, "--tail", "unknown")
    assert code == 0, err
    assert "train with loss: {tail: renormalise}" in out
    new = LogitDataset.open(tmp_path / "new")
    assert new.manifest.keep["tail"] == "unknown"
    assert "| mass of the rest | not known" in (new.folder / "README.md").read_text()
    assert not verify(new, deep=True).faults
    for was, row in zip(all_rows(dataset), all_rows(new), strict=True):
        starts = np.cumsum(was.teacher.kept_counts_P) - was.teacher.kept_counts_P
        sums = np.log(np.add.reduceat(np.exp(was.teacher.kept_logp_E.astype(np.float64)), starts))
        expected = was.teacher.kept_logp_E - np.repeat(sums, was.teacher.kept_counts_P)
        assert np.allclose(row.teacher.kept_logp_E, expected, atol=1e-6)
        assert np.all(row.teacher.tail_logsum_PT == np.float32(np.log(2.0**-24)))


@pytest.mark.parametrize(
    ("excess", "fate"), [(3e-4, "as it is"), (0.02, "scaled down"), (0.3, "refused")], ids=lambda value: str(value)
)
def test_lists_that_add_up_to_more_than_one(excess, fate, tmp_path, import_into):
    logp = np.log([0.65 + excess, 0.35]).tolist()
    wrong = one(target_logprobs=[[], [-0.1, -3], logp, []])
    code, out, err = import_into(lines(tmp_path / "a.jsonl", wrong), "--json")
    if fate == "refused":
        assert code == 3
        assert "a.jsonl:1: the list at index 2 adds up to 1.3" in err
        code, out, _ = import_into(tmp_path / "a.jsonl", "--on-wrong-list", "drop", "--json")
        assert json.loads(out)["inputs"][0]["tally"]["wrong_lists"] == 1
        return
    assert code == 0, err
    tally = json.loads(out)["inputs"][0]["tally"]
    assert (tally["lists_scaled_down"], tally["tails_clipped"]) == (int(fate == "scaled down"), 1)
    new = LogitDataset.open(tmp_path / "new")
    assert not verify(new, deep=True).faults
    (row,) = all_rows(new)
    expected = np.log([0.35, 0.65 + excess]) - (np.log1p(excess) if fate == "scaled down" else 0)
    assert np.allclose(row.teacher.kept_logp_E[2:], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": [-100, -100, 4, -100]}, "label 2 is 4, but token 2 is 3"),
        ({"labels": [-100, 3]}, "4 input_ids, but 2 labels"),
        ({"target_logprobs": None}, "has no target_logprobs"),
        ({"target_logprobs": [[], [-0.1], [-0.5, -2.0], []]}, "target_logprobs does not run beside"),
        ({"target_mask": [[], [1, 1], [1, 1]]}, "target_mask does not run beside"),
        ({"target_token_ids": [[], [3, 3], [4, 2], []]}, "index 1 holds 3, which stands twice in one list"),
        ({"target_token_ids": [[], [3, V], [4, 2], []]}, f"index 1 holds {V}, which is no id of a vocabulary of {V}"),
        ({"target_token_ids": [[], [3, 1.5], [4, 2], []]}, "ids are whole numbers"),
        ({"target_logprobs": [[], [-0.1, float("nan")], [-0.5, -2.0], []]}, "is no number"),
        ({"target_logprobs": [[], [7.5, 6.0], [-0.5, -2.0], []]}, "its largest log p is 7.5"),
        ({"target_logprobs": [[], [0.1, -9.0], [-0.5, -2.0], []]}, "its largest log p is 0.1"),
        ({"target_logprobs": 3}, "expected a list of lists"),
        ({"input_ids": [5, V, 3, 4]}, f"token 1 is {V}, which is no id"),
        ({"input_ids": "abc"}, "expected a list of whole numbers"),
    ],
)
def test_a_record_that_cannot_be_meant_names_its_place(changes, said, tmp_path, import_into):
    code, _, err = import_into(lines(tmp_path / "a.jsonl", one(), one(**changes)))
    assert code == 3, err
    assert "a.jsonl:2: " in err
    assert said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "new", "tok"]
    assert list((tmp_path / "new").iterdir()) == []


def test_files_that_are_none_are_refused(tmp_path, import_into):
    assert import_into(tmp_path / "gone.parquet")[0] == 2
    (tmp_path / "empty.jsonl").write_text("")
    assert import_into(tmp_path / "empty.jsonl")[0] == 3
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    assert import_into(tmp_path / "cut.parquet")[0] == 3
    (tmp_path / "lines.jsonl").write_text("[1]\n")
    assert import_into(tmp_path / "lines.jsonl")[0] == 3


def test_a_row_that_comes_twice_is_refused(tmp_path, import_into):
    code, _, err = import_into(lines(tmp_path / "a.jsonl", one(id="x"), one(id="x")))
    assert code == 3
    assert "sample id 'x' comes twice" in err


def test_what_was_begun_is_taken_away_where_it_cannot_be_ended(tmp_path, import_into, monkeypatch):
    monkeypatch.setattr("shared.exchange.importing.SHARD_ROWS", 2)
    good = lines(tmp_path / "a.jsonl", *(one(id=str(n)) for n in range(5)))
    code, _, _ = import_into(good, lines(tmp_path / "b.jsonl", one(id="6"), one(labels=[1])))
    assert code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "new", "tok"]
    code, out, err = import_into(good, "--json")
    assert code == 0, err
    assert (json.loads(out)["shards"], json.loads(out)["rows"]) == (3, 5)


def test_another_tokenizer_or_vocabulary_is_refused(tmp_path, import_into):
    file = lines(tmp_path / "a.jsonl", one())
    assert "the vocabulary ends at 20" in import_into(file, vocab_size=20)[2]
    code, _, err = import_into(file, tokenizer=tmp_path / "nowhere")
    assert (code, "does not exist" in err) == (2, True)
    (tmp_path / "bare").mkdir()
    assert "there is no tokenizer.json" in import_into(file, tokenizer=tmp_path / "bare")[2]


def test_an_output_that_is_taken_is_left_alone(tmp_path, import_into):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("mine")
    assert import_into(lines(tmp_path / "a.jsonl", one()))[0] == 2
    assert (tmp_path / "new" / "mine").read_text() == "mine"


def test_a_saved_dataset_is_read_as_its_columns(columns, tmp_path, import_into):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
    code, _, err = import_into(tmp_path / "saved")
    assert code == 0, err
    saved = all_rows(LogitDataset.open(tmp_path / "new"))
    assert [row.num_positions for row in saved] == [row.num_positions for row in written_rows(1, 30)]


def test_import_and_export_need_no_torch(tmp_path):
    code = "import shared.exchange.commands, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
