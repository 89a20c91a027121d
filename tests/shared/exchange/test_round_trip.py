"""Out to axolotl's columns and back: the same tokens, marks, kept ids and log p, and what is known of the rest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.dataset import LogitDataset
from shared.verification import verify
from tests.shared.exchange.made import all_rows, exported, sealed, tokenizer_folder, written_rows
from tests.shared.made_datasets import V, edit_manifest, made_rows, threshold, write_dataset


@pytest.fixture
def imported(tmp_path, command):
    """Import with the command, and open the result."""

    def run(source: Path, *options: Any, form: str = "axolotl") -> LogitDataset:
        output = tmp_path / f"imported-{len(list(tmp_path.iterdir()))}"
        tokenizer = tokenizer_folder(tmp_path / "tok")
        code, out, err = command(
            "import", source, "--from", form, "--output", output, "--tokenizer", tokenizer,
            "--teacher", "big", "--vocab-size", V, *options,
        )  # fmt: skip
        assert code == 0, err + out
        return LogitDataset.open(output)

    return run


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.zst"])
def test_round_trip_keeps_tokens_marks_kept_ids_and_logprobs(name, tmp_path, imported):
    rows = written_rows(1, 23)
    back = all_rows(imported(exported(sealed(tmp_path / "d", rows), tmp_path / name)))
    assert len(back) == len(rows)
    for was, row in zip(rows, back, strict=True):
        assert np.array_equal(was.input_ids_L, row.input_ids_L)
        assert np.array_equal(was.label_mask_L, row.label_mask_L)
        for part in ("kept_counts_P", "kept_ids_E", "kept_logp_E"):
            assert np.array_equal(getattr(was.teacher, part), getattr(row.teacher, part)), part


def test_round_trip_knows_of_the_rest_what_can_be_known(tmp_path, imported):
    rows = written_rows(2, 40)
    dataset = imported(exported(sealed(tmp_path / "d", rows), tmp_path / "a.parquet"))
    assert not verify(dataset, deep=True).faults
    assert dataset.manifest.temperatures == [1.0]
    assert dataset.manifest.keep == {"method": "topk", "k": 6, "max_kl": 0.0, "tail": "by_difference"}
    assert "| mass of the rest | 1 − what is kept: imported" in (dataset.folder / "README.md").read_text()
    for was, row in zip(rows, all_rows(dataset), strict=True):
        exact, known = was.teacher, row.teacher
        assert np.allclose(np.exp(known.tail_logsum_PT[:, 0]), np.exp(exact.tail_logsum_PT[:, 0]), atol=1e-6)
        assert np.all(known.entropy_P <= exact.entropy_P + 1e-5)
        starts = np.cumsum(exact.kept_counts_P) - exact.kept_counts_P
        p_E, left_P = (
            np.exp(exact.kept_logp_E.astype(np.float64)),
            np.exp(exact.tail_logsum_PT[:, 0].astype(np.float64)),
        )
        lumped_P = -np.add.reduceat(p_E * np.log(p_E), starts) - left_P * np.log(left_P)
        assert np.allclose(known.entropy_P, lumped_P, atol=2e-5)
        assert np.all(known.realised_logp_P >= exact.realised_logp_P - 1e-4)
        kept_P = known.realised_logp_P == exact.realised_logp_P
        assert kept_P.mean() > 0.5


# `data` is drawn inside, where the fixtures' folder is one and the same: every example has a folder of its own.
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), k=st.integers(1, V), num_rows=st.integers(1, 9), offset=st.sampled_from([0, 1]))
def test_round_trip_property(seed, k, num_rows, offset, tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("trip")
    rows = written_rows(seed, num_rows, k=k)
    file = exported(sealed(folder / "d", rows), folder / "a.parquet", offset=offset)
    tokenizer = tokenizer_folder(folder / "tok")
    code, _, err = command(
        "import", file, "--from", "axolotl", "--output", folder / "back", "--tokenizer", tokenizer, "--teacher", "big",
        "--vocab-size", V, "--offset", offset, "--tail", "difference",
    )  # fmt: skip
    assert code == 0, err
    back = LogitDataset.open(folder / "back")
    assert not verify(back, deep=True).faults
    for was, row in zip(rows, all_rows(back), strict=True):
        assert np.array_equal(was.label_mask_L, row.label_mask_L)
        assert np.array_equal(was.teacher.kept_ids_E, row.teacher.kept_ids_E)
        assert np.array_equal(was.teacher.kept_logp_E, row.teacher.kept_logp_E)


def test_a_rounded_dataset_comes_back_within_what_its_lists_add_up_to(tmp_path, imported):
    dataset = sealed(tmp_path / "d", written_rows(3, 30), max_kl=1e-4)
    back = imported(exported(dataset, tmp_path / "a.parquet"))
    assert not verify(back, deep=True).faults
    for was, row in zip(all_rows(dataset), all_rows(back), strict=True):
        assert np.array_equal(was.teacher.kept_ids_E, row.teacher.kept_ids_E)
        starts = np.cumsum(was.teacher.kept_counts_P) - was.teacher.kept_counts_P
        sums = np.add.reduceat(np.exp(was.teacher.kept_logp_E.astype(np.float64)), starts)
        moved = np.where(sums > 1 + 5e-4, np.log(sums), 0.0)
        expected = was.teacher.kept_logp_E - np.repeat(moved, was.teacher.kept_counts_P)
        assert np.allclose(row.teacher.kept_logp_E, expected, atol=1e-6)


def test_lists_stand_one_token_before_the_one_they_predict(tmp_path):
    (row,) = written_rows(4, 1)
    first, second = (
        pq.read_table(exported(sealed(tmp_path / f"d{n}", [row]), tmp_path / f"{n}.parquet", offset=n)).to_pylist()[0]
        for n in (1, 0)
    )
    tokens = np.flatnonzero(row.label_mask_L)
    assert [at for at, each in enumerate(first["target_token_ids"]) if each] == (tokens - 1).tolist()
    assert [at for at, each in enumerate(second["target_token_ids"]) if each] == tokens.tolist()
    assert [at for at, label in enumerate(first["labels"]) if label != -100] == tokens.tolist()
    for lists in first["target_logprobs"]:
        assert lists == sorted(lists, reverse=True)


def test_renormalised_lists_add_up_to_one(tmp_path):
    (row,) = written_rows(5, 1, k=3)
    file = exported(sealed(tmp_path / "d", [row]), tmp_path / "a.parquet", renormalised=True)
    for each in pq.read_table(file)["target_logprobs"].to_pylist()[0]:
        assert not each or np.isclose(np.exp(each).sum(), 1)


def test_plain_lines_hold_all_that_the_dataset_holds(tmp_path, command):
    rows = made_rows(6, 4)
    dataset = sealed(tmp_path / "d", rows)
    code, out, err = command("export", tmp_path / "d", "--to", "jsonl", "--output", tmp_path / "a.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out) | {"size_bytes": 0} == {
        "output": str(tmp_path / "a.jsonl"),
        "format": "jsonl",
        "rows": 4,
        "positions": dataset.manifest.total("positions"),
        "size_bytes": 0,
        "identity": dataset.identity(),
    }
    for row, line in zip(rows, (tmp_path / "a.jsonl").read_text().splitlines(), strict=True):
        found = json.loads(line)
        assert (found["sample_id"], found["source"]) == (row.sample_id, row.source)
        assert found["label_mask"] == row.label_mask_L.tolist()
        assert [len(ids) for ids in found["kept_ids"]] == row.teacher.kept_counts_P.tolist()
        flat = np.float32([value for each in found["kept_logprobs"] for value in each])
        assert np.array_equal(flat, row.teacher.kept_logp_E)
        assert np.array_equal(np.float32(found["entropy"]), row.teacher.entropy_P)
        assert np.array_equal(np.float32(found["realised_logprob"]), row.teacher.realised_logp_P)
        tails = np.float32([-np.inf if value is None else value for value in found["tail_logsum_t2"]])
        assert np.array_equal(tails, row.teacher.tail_logsum_PT[:, 1])
        assert found["tail_logsum_t1"][-1] is None  # where all is kept
        assert len(line) < 20 * (len(flat) * 2 + 6 * row.num_tokens)  # printed short


def test_a_sample_with_weights_is_no_list_of_logprobs(tmp_path, command):
    keep = {"method": "threshold", "tau": 0.05, "seed": 3, "max_kl": 0.0}
    write_dataset(tmp_path / "d", [made_rows(7, 3, threshold)], max_kl=0.0, keep=keep)
    code, _, err = command("export", tmp_path / "d", "--to", "axolotl", "--output", tmp_path / "a.parquet")
    assert code == 4
    assert "samples with weights" in err
    assert command("export", tmp_path / "d", "--to", "jsonl", "--output", tmp_path / "a.jsonl")[0] == 0


def test_export_of_a_damaged_dataset_leaves_nothing(tmp_path, command):
    dataset = sealed(tmp_path / "d", written_rows(8, 12))
    shard = tmp_path / "d" / dataset.manifest.shards[1].path
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (tmp_path / "out").mkdir()
    code, _, err = command("export", tmp_path / "d", "--to", "axolotl", "--output", tmp_path / "out" / "a.parquet")
    assert code == 3, err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dataset_of_which_shards_are_missing_is_not_exported(tmp_path, command):
    sealed(tmp_path / "d", written_rows(8, 12))
    edit_manifest(tmp_path / "d", lambda tree: tree["missing"].append(tree["shards"].pop()["path"]))
    code, _, err = command("export", tmp_path / "d", "--to", "jsonl", "--output", tmp_path / "a.jsonl")
    assert code == 4
    assert "1 shards are missing" in err


@pytest.mark.parametrize(("name", "said"), [("a.csv", "is written to"), ("there.parquet", "exists")])
def test_export_refuses_an_output_that_is_none(name, said, tmp_path, command):
    sealed(tmp_path / "d", written_rows(9, 2))
    (tmp_path / "there.parquet").write_text("mine")
    code, _, err = command("export", tmp_path / "d", "--to", "axolotl", "--output", tmp_path / name)
    assert code == 2
    assert said in err
    assert (tmp_path / "there.parquet").read_text() == "mine"
