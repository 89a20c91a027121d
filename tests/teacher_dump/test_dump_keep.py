"""What a dump keeps and how exactly it stores it, from the config to the sealed dataset."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from pydantic import ValidationError

from shared.config import settings_yaml
from shared.dataset import LogitDataset
from shared.rounding import storage_loss
from shared.rows import LogitRow, Positions
from shared.verification import verify
from teacher_dump.config import DumpSettings, KeepSettings
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl

THRESHOLD = {"keep": {"method": "threshold", "tau": 0.05, "always": ["<|im_end|>"]}, "temperatures": [1]}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(23))


def rows_of(dataset: LogitDataset) -> list[LogitRow]:
    return [row for index in range(len(dataset.manifest.shards)) for row in dataset.read_shard(index)]


def test_a_threshold_dump_holds_what_the_definition_says(teacher_folder: Path, chats: Path, tmp_path: Path):
    """p where p >= tau or always kept, tau elsewhere; drawn where the running sum and the draw pass an integer."""
    changes = THRESHOLD | {"keep": THRESHOLD["keep"] | {"max_kl": 0}}
    dataset = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out", **changes))
    assert verify(dataset, deep=True).faults == []
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    end = dataset.tokenizer().token_to_id("<|im_end|>")
    num_sampled = 0
    for row in rows_of(dataset)[:9]:
        with torch.no_grad():
            logits_LV = model(torch.tensor(row.input_ids_L, dtype=torch.long)[None]).logits[0].double()
        p_LV = torch.softmax(logits_LV, dim=1).numpy()
        draws = draws_of(row.sample_id, row.num_positions)
        for t, u, position in zip(
            np.flatnonzero(row.label_mask_L), draws, row.teacher.split([1] * row.num_positions), strict=True
        ):
            p_V = p_LV[t - 1]
            exact_V = p_V >= 0.05
            exact_V[end] = True
            passed_V = np.floor(u + np.cumsum(np.where(exact_V, 0.0, p_V / 0.05)))
            drawn_V = np.diff(passed_V, prepend=0.0) > 0
            assert position.kept_ids_E.tolist() == np.flatnonzero(exact_V | drawn_V).tolist()
            expected = np.where(exact_V, p_V, 0.05)[position.kept_ids_E]
            np.testing.assert_allclose(np.exp(position.kept_logp_E), expected, rtol=1e-4)
            num_sampled += int(drawn_V.sum())
    assert num_sampled > 100


def draws_of(sample_id: str, num_positions: int) -> list[float]:
    """As shared/FORMAT.md has it."""
    digest = hashlib.shake_256(f"0:{sample_id}".encode()).digest(8 * num_positions)
    numbers = (int.from_bytes(digest[n : n + 8], "little") for n in range(0, len(digest), 8))
    return [(number // 2**11) / 2**53 for number in numbers]


def test_a_threshold_dump_is_rounded_but_for_tau_and_says_so(teacher_folder: Path, chats: Path, tmp_path: Path):
    dataset = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out", **THRESHOLD))
    assert verify(dataset, deep=True).faults == []
    info = dataset.info()
    assert info["mean_kl_nats"] is None
    assert 0 < info["mean_loss_nats"]["1"] <= 1e-4
    assert info["keep"] == {"method": "threshold", "tau": 0.05, "seed": 0, "always": ["<|im_end|>"], "max_kl": 1e-4}
    assert info["kept_mass"] == pytest.approx(1, abs=0.01)
    logp_E = np.concatenate([row.teacher.kept_logp_E for row in rows_of(dataset)])
    assert (logp_E == np.float32(np.log(0.05))).mean() > 0.2


def test_the_same_dump_draws_the_same_and_another_seed_draws_others(teacher_folder: Path, chats: Path, tmp_path: Path):
    def shards(name: str, **changes: Any) -> list[str]:
        dataset = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / name, **(THRESHOLD | changes)))
        return [shard.sha256 for shard in dataset.manifest.shards]

    first = shards("first")
    assert shards("again") == first
    seeded = {"keep": THRESHOLD["keep"] | {"seed": 1}}
    assert not set(shards("seed", **seeded)) & set(first)


def test_draws_do_not_depend_on_how_rows_are_batched(teacher_folder: Path, chats: Path, tmp_path: Path):
    counts = []
    kept: list[list[int]] = []
    for name, batch_tokens, chunk in (("one", 60, 7), ("many", 3000, 500)):
        changes = THRESHOLD | {"teacher__batch_tokens": batch_tokens, "teacher__chunk_positions": chunk}
        dataset = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / name, **changes))
        teachers = [row.teacher.split([1] * row.num_positions) for row in rows_of(dataset)]
        kept.append([position.kept_ids_E.tolist() for positions in teachers for position in positions])
        counts.append(len(kept[-1]))
    assert counts[0] == counts[1] > 500
    # Batches change the last bits of p, which may move a draw that falls on a border.
    assert sum(one != other for one, other in zip(*kept, strict=True)) <= 2


def test_rounding_loses_what_the_manifest_says_at_every_declared_temperature(
    teacher_folder: Path, chats: Path, tmp_path: Path
):
    kept = {"k": 40, "min_prob": 1e-4}
    exact = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "exact", keep=kept | {"max_kl": 0}))
    rounded = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "rounded", keep=kept))
    assert verify(rounded, deep=True).faults == []
    before, after = (Positions.concatenate([row.teacher for row in rows_of(d)]) for d in (exact, rounded))
    np.testing.assert_array_equal(before.kept_ids_E, after.kept_ids_E)
    measured = storage_loss(before, after, [1.0, 2.0]).mean(axis=0)
    info = rounded.info()
    assert list(info["mean_loss_nats"].values()) == pytest.approx(measured.tolist(), rel=1e-4)
    assert info["mean_kl_nats"] == info["mean_loss_nats"]["1"] <= 1e-4
    assert info["bytes_per_position"] < 0.7 * exact.info()["bytes_per_position"]


def test_the_default_is_rounded_and_the_level_changes_no_value(teacher_folder: Path, chats: Path, tmp_path: Path):
    assert KeepSettings().max_kl == 1e-4
    rows = []
    for level in (1, 9):
        keep = {"k": 40}
        dataset = sealed_dump(
            dump_settings(teacher_folder, chats, tmp_path / f"level{level}", keep=keep, zstd_level=level)
        )
        rows.append(Positions.concatenate([row.teacher for row in rows_of(dataset)]))
    for name, values in vars(rows[0]).items():
        np.testing.assert_array_equal(values, getattr(rows[1], name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": {"method": "threshold", "k": 5}}, "k is for method: topk, and this is method: threshold"),
        ({"keep": {"tau": 0.1}}, "tau is for method: threshold, and this is method: topk"),
        ({"keep": {"method": "threshold"}, "temperatures": [1, 2]}, "with keep.method threshold there is 1 alone"),
        ({"keep": {"method": "threshold", "tau": 0.6}}, "less than or equal to 0.5"),
        ({"keep": {"max_kl": -1}}, "greater than or equal to 0"),
        ({"keep": {"max_kl": 0.5}}, "less than or equal to 0.01"),
        ({"keep": {"max_kl": 1e-12}}, "0 stores every bit"),
        ({"keep": {"method": "sample"}}, "'topk' or 'threshold'"),
        ({"zstd_level": 30}, "less than or equal to 19"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        dump_settings(Path("t"), Path("f"), Path("o"), **changes)


def test_what_print_config_prints_is_read_again():
    for keep in ({}, {"method": "threshold", "tau": 0.1}):
        tree = {"teacher": {"model": "m"}, "data": {"files": ["f"]}, "output": "o", "keep": keep}
        settings = DumpSettings.model_validate(tree)
        assert DumpSettings.model_validate(yaml.safe_load(settings_yaml(settings))) == settings
