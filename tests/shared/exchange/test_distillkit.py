"""DistillKit's bytes, packed here bit by bit from what its sources say of them, and read back."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from shared.dataset import LogitDataset
from shared.exchange.distillkit import Packing, logprobs, unpacked
from shared.rows import LogitRow
from tests.shared.exchange.made import all_rows, tokenizer_folder, written_rows
from tests.shared.made_datasets import V

EXACT = {"d": V, "k": 6, "exact_k": 6, "exact_dtype": "bfloat16", "residual_bins": [], "delta_encoding": False}


def bits_of(values: list[int], width: int) -> bytes:
    text = "".join(f"{value:0{width}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def bf16(value: float) -> tuple[bytes, float]:
    """Its upper two bytes, rounded, and what they mean."""
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    word = (word + 0x7FFF + (word >> 16 & 1)) >> 16
    return struct.pack("<H", word), struct.unpack("<f", struct.pack("<I", word << 16))[0]


def captured(folder: Path, rows: list[LogitRow], config: dict[str, Any] = EXACT, **more: Any) -> Path:
    """Every row in full, as DistillKit's sampler leaves it: a list for each token but the last, of what comes next."""
    folder.mkdir(exist_ok=True)
    table: dict[str, Any] = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    width = int(np.ceil(np.log2(config["d"])))
    for row in rows:
        teacher = row.teacher
        pairs = np.split(np.arange(len(teacher.kept_ids_E)), np.cumsum(teacher.kept_counts_P)[:-1])
        lists = []
        for entries in pairs:
            order = entries[np.argsort(-teacher.kept_logp_E[entries])]
            lists.append((teacher.kept_ids_E[order].tolist(), teacher.kept_logp_E[order].tolist()))
        table["input_ids"].append(row.input_ids_L.tolist())
        table["bytepacked_indices"].append([list(bits_of(ids, width)) for ids, _ in lists])
        table["compressed_logprobs"].append([list(b"".join(bf16(value)[0] for value in logp)) for _, logp in lists])
    kinds = {"input_ids": pa.list_(pa.uint64())} | dict.fromkeys(list(table)[1:], pa.list_(pa.list_(pa.uint8())))
    arrays = {name: pa.array(values, kinds[name]) for name, values in table.items()}
    arrays |= {name: pa.array(values) for name, values in more.items()}
    pq.write_table(pa.table(arrays), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def all_supervised(seed: int, num_rows: int) -> list[LogitRow]:
    """Rows of which every token but the first has a list."""
    rows = []
    for row in written_rows(seed, num_rows):
        mask = row.label_mask_L
        taken = np.flatnonzero(np.concatenate([[True], mask[1:]]))
        rows.append(
            LogitRow(
                sample_id=row.sample_id,
                input_ids_L=row.input_ids_L[taken],
                label_mask_L=mask[taken],
                teacher=row.teacher,
            )
        )
    return rows


@pytest.fixture
def import_into(tmp_path, command):
    def run(folder: Path, *options: Any) -> tuple[int, str, str]:
        return command(
            "import", folder, "--from", "distillkit", "--output", tmp_path / "new", "--teacher", "big",
            "--tokenizer", tokenizer_folder(tmp_path / "tok"), "--vocab-size", V, *options,
        )  # fmt: skip

    return run


def test_a_capture_comes_back_exact_to_bf16(tmp_path, import_into):
    rows = all_supervised(1, 30)
    code, out, err = import_into(captured(tmp_path / "c", rows), "--everything", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["alignment"]["1"]["share_in_list"] > 0.7
    assert found["inputs"][0]["settings"]["packing"]["k"] == 6
    for was, row in zip(rows, all_rows(LogitDataset.open(tmp_path / "new")), strict=True):
        assert np.array_equal(was.label_mask_L, row.label_mask_L)
        assert np.array_equal(was.teacher.kept_ids_E, row.teacher.kept_ids_E)
        expected = np.float32([bf16(value)[1] for value in was.teacher.kept_logp_E.tolist()])
        starts = np.cumsum(was.teacher.kept_counts_P) - was.teacher.kept_counts_P
        sums = np.add.reduceat(np.exp(expected.astype(np.float64)), starts)
        moved = np.repeat(np.where(sums > 1 + 5e-4, np.log(sums), 0), was.teacher.kept_counts_P)
        assert np.allclose(row.teacher.kept_logp_E, expected - moved, atol=1e-7)


def test_an_offset_is_found_out_here_as_well(tmp_path, import_into):
    code, _, err = import_into(captured(tmp_path / "c", all_supervised(2, 30)), "--everything", "--offset", "0")
    assert code == 4
    assert "next: import with --offset 1" in err


def test_without_labels_somebody_has_to_say_that_all_is_learnt(tmp_path, import_into):
    code, _, err = import_into(captured(tmp_path / "c", all_supervised(3, 5)))
    assert code == 2
    assert "nobody knows which tokens are to be learnt" in err


def test_labels_and_packed_sequences_are_heeded(tmp_path, import_into):
    (row,) = all_supervised(4, 1)
    labels = [[-100, *row.input_ids_L[1:].tolist()]]
    labels[0][2] = -100
    mask = [[1] * 3 + [2] * (row.num_tokens - 3)]
    code, _, err = import_into(captured(tmp_path / "c", [row], labels=labels, attention_mask=mask))
    assert code == 0, err
    first, second = all_rows(LogitDataset.open(tmp_path / "new"))
    assert first.label_mask_L.tolist() == [False, True, False]
    assert second.label_mask_L.tolist() == [False] + [True] * (row.num_tokens - 4)


def test_the_wrong_config_is_found_out_by_sizes(tmp_path, import_into):
    folder = captured(tmp_path / "c", all_supervised(5, 3))
    (folder / "other.yaml").write_text(yaml.safe_dump(EXACT | {"k": 5, "exact_k": 5}))
    code, _, err = import_into(folder, "--everything", "--compression-config", folder / "other.yaml")
    assert code == 3
    assert "compressed_logprobs: expected 10 bytes for a position, got 12" in err
    (folder / "compression_config.yaml").unlink()
    assert import_into(folder, "--everything")[0] == 2


def test_centred_logits_are_no_logprobs(tmp_path, import_into):
    folder = captured(tmp_path / "c", all_supervised(6, 1), packed_indices=[[[1]]])
    code, _, err = import_into(folder, "--everything")
    assert code == 3
    assert "centred logits" in err


def test_ids_of_17_bits_and_numbers_that_cross_bytes():
    ids = [0, 1, 99_999, 131_071, 65_536]
    data = np.frombuffer(bits_of(ids, 17), dtype=np.uint8)[None]
    assert unpacked(data, 17, 5).tolist() == [ids]


def test_differences_are_summed_and_rounded_to_even():
    tree = {"d": 9, "k": 2, "exact_k": 2, "exact_dtype": "bfloat16", "delta_encoding": True}
    for second, total in ((-(2.0**-8), -1.0), (-3 * 2.0**-8, -1 - 4 * 2.0**-8)):
        data = np.frombuffer(bf16(-1.0)[0] + bf16(second)[0], dtype=np.uint8)[None]
        assert logprobs(data, Packing.model_validate(tree)).tolist() == [[-1.0, total]]


def test_residuals_are_rounded_as_the_exact_numbers_are():
    bins = [{"scale_dtype": "float32", "element_bits": 4, "num_elements": 1}]
    tree = {"d": 9, "k": 1, "exact_k": 0, "exact_dtype": "bfloat16", "residual_bins": bins, "delta_encoding": False}
    data = np.frombuffer(struct.pack("<f", 0.3) + bits_of([-7 + 8], 4), dtype=np.uint8)[None]
    assert logprobs(data, Packing.model_validate(tree)).tolist() == [[bf16(-2.1)[1]]]


@pytest.mark.parametrize("normalised", [False, True])
def test_a_curve_its_residuals_and_differences(normalised):
    """One position by hand: an exact number, a curve through five points, three of them corrected, all of it deltas."""
    packing = Packing.model_validate(
        {
            "d": 100,
            "k": 6,
            "exact_k": 1,
            "exact_dtype": "float32",
            "polynomial_terms": [0, 1, "sqrt"],
            "residual_bins": [
                {"scale_dtype": "float16", "element_bits": 3, "num_elements": 2},
                {"scale_dtype": "float32", "element_bits": 1, "num_elements": 1},
            ],
            "delta_encoding": True,
            "normalize_t": normalised,
        }
    )
    steps = [-4, 3]
    data = struct.pack("<f", -0.5) + struct.pack("<3f", -0.25, -0.125, 0.0625)
    data += struct.pack("<e", 0.03125) + bits_of([step + 4 for step in steps], 3)
    data += struct.pack("<f", 0.5) + bits_of([0], 1)
    assert packing.logprob_bytes == len(data)
    points = [at / 4 if normalised else at for at in range(5)]
    curve = [-0.25 - 0.125 * t + 0.0625 * t**0.5 for t in points]
    curve[0] += -4 * 0.03125
    curve[1] += 3 * 0.03125
    curve[2] -= 0.5  # a single bit is a sign
    expected = np.cumsum([-0.5, *curve])
    assert np.allclose(logprobs(np.frombuffer(data, dtype=np.uint8)[None], packing), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exact_k": 7}, "more than k"),
        ({"exact_k": 3}, "nothing says what the other numbers are"),
        ({"term_dtype": "bfloat16"}, "term_dtype"),
        ({"exakt_k": 3}, "exakt_k"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, said, tmp_path, import_into):
    folder = captured(tmp_path / "c", all_supervised(7, 1))
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(EXACT | changes))
    code, _, err = import_into(folder, "--everything")
    assert code == 2
    assert said in err
