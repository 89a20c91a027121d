"""What a run trains on: several datasets by weight, each at the temperature of the loss, and what is held out."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedDataError, MismatchError
from student_train.config import TrainSettings
from student_train.train import Trainer
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.shared.stores import memory_store
from tests.student_train.test_train import log_of, settings
from tests.tiny import make_model, make_tokenizer


def dumped(teacher: Path, folder: Path, name: str, num_records: int, **changes: Any) -> Path:
    records = [record | {"id": f"{name}-{record['id']}"} for record in chat_records(num_records)]
    files = write_jsonl(folder / f"{name}.jsonl", records)
    return sealed_dump(dump_settings(teacher, files, folder / name, **changes)).folder


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    return dumped(teacher_folder, tmp_path_factory.mktemp("truth"), "truth", 30, temperatures=[1, 2, 4])


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    return dumped(teacher_folder, tmp_path_factory.mktemp("rollouts"), "rollouts", 10, temperatures=[1, 4])


def mix_of(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"mix": list(parts)}}


def trainer_of(student: Path, output: Path, *parts: dict[str, Any], **changes: Any) -> Trainer:
    return Trainer(settings(student, output, **{"data__mix": list(parts)} | changes))


def names(trainer: Trainer, num_steps: int) -> list[list[str]]:
    return [batch.sample_ids for batch in trainer.data.batches(0, num_steps)]


def counts(batch: list[str]) -> Counter[str]:
    return Counter(name.split("-")[0] for name in batch)


def test_every_step_has_the_shares_that_the_weights_say(
    student_folder: Path, truth: Path, rollouts: Path, tmp_path: Path
):
    trainer = trainer_of(
        student_folder,
        tmp_path / "out",
        {"dataset": str(truth), "weight": 0.25},
        {"dataset": str(rollouts), "weight": 0.75},
    )
    for batch in names(trainer, 6):
        assert counts(batch) == {"truth": 2, "rollouts": 6}
    flat = [name for batch in names(trainer, 6) for name in batch if name.startswith("rollouts")]
    assert max(Counter(flat[:30]).values()) == 3, "the smaller one is gone through again, and in full"
    assert min(Counter(flat[:30]).values()) == 3


def test_without_weights_every_row_comes_equally_often(
    student_folder: Path, truth: Path, rollouts: Path, tmp_path: Path
):
    trainer = trainer_of(student_folder, tmp_path / "out", {"dataset": str(truth)}, {"dataset": str(rollouts)})
    assert trainer.data.num_rows == 40
    assert set(Counter(name for batch in names(trainer, 10) for name in batch).values()) == {2}
    for batch in names(trainer, 5):
        assert counts(batch) == {"truth": 6, "rollouts": 2}


def test_each_dataset_is_read_at_the_losss_temperature_wherever_it_stands_among_its_own(
    student_folder: Path, truth: Path, rollouts: Path, tmp_path: Path
):
    trainer = trainer_of(
        student_folder, tmp_path / "out", {"dataset": str(truth)}, {"dataset": str(rollouts)},
        loss__temperature=4, held_out__fraction=0.3, batch_tokens=1,
    )  # fmt: skip
    tails = {}
    for folder in (truth, rollouts):
        opened = LogitDataset.open(folder)
        at = {temperature: opened.manifest.temperatures.index(temperature) for temperature in (1, 4)}
        for row in (row for index in range(len(opened.manifest.shards)) for row in opened.read_shard(index)):
            tails[row.sample_id] = {T: row.teacher.tail_logsum_PT[:, index] for T, index in at.items()}
    for step in trainer.data.stream.steps(0, 5):
        for row in step.rows:
            np.testing.assert_array_equal(row.teacher.tail_logsum_PT[:, 0], tails[row.sample_id][4])  # pyright: ignore
    for selection in trainer.data.held_out:
        for rows in selection.in_order(5):
            for row in rows:
                np.testing.assert_array_equal(row.teacher.tail_logsum_PT[:, 0], tails[row.sample_id][1])  # pyright: ignore
    assert {batch.passes[0].targets.tail_at for batch in trainer.data.batches(0, 3)} == {4.0}
    result = trainer.run()
    assert result["held_out"]["kl"] > 0
    assert [each["dataset"] for each in result["data"]] == [str(truth), str(rollouts)]


def test_a_temperature_that_one_of_them_lacks_is_refused(
    student_folder: Path, truth: Path, rollouts: Path, tmp_path: Path
):
    with pytest.raises(MismatchError, match=rf"temperature 2 is not among the \[1\.0, 4\.0\] of {rollouts}"):
        trainer_of(
            student_folder, tmp_path / "out", {"dataset": str(truth)}, {"dataset": str(rollouts)}, loss__temperature=2
        )


def test_a_sample_of_ids_and_the_most_probable_are_not_mixed(
    student_folder: Path, teacher_folder: Path, truth: Path, tmp_path: Path
):
    sampled = dumped(
        teacher_folder, tmp_path, "sampled", 5, keep={"method": "threshold", "tau": 0.05}, temperatures=[1]
    )
    with pytest.raises(MismatchError, match="were kept in unlike manners"):
        trainer_of(student_folder, tmp_path / "out", {"dataset": str(truth)}, {"dataset": str(sampled)})


def test_rows_of_every_source_are_held_out(student_folder: Path, truth: Path, rollouts: Path, tmp_path: Path):
    trainer = trainer_of(
        student_folder, tmp_path / "out", {"dataset": str(truth)}, {"dataset": str(rollouts)}, held_out__fraction=0.3
    )
    held_out = {row.sample_id for each in trainer.data.held_out for rows in each.in_order(99) for row in rows}
    trained = {name for batch in names(trainer, 20) for name in batch}
    assert len(held_out) + len(trained) == 40
    assert not held_out & trained
    assert counts(sorted(held_out)).keys() == {"truth", "rollouts"}


def test_rows_longer_than_the_students_context_are_refused(truth: Path, tmp_path: Path):
    student = make_model(tmp_path / "short", max_position_embeddings=64)
    make_tokenizer(student)
    with pytest.raises(MismatchError, match=r"the student's context is 64, but .* has a row of \d+ tokens"):
        Trainer(settings(student, tmp_path / "out", data__dataset=str(truth))).run()


def test_rows_longer_than_the_students_context_are_cut_or_dropped_and_counted(truth: Path, tmp_path: Path):
    student = make_model(tmp_path / "student", seed=2, num_hidden_layers=1, max_position_embeddings=100)
    make_tokenizer(student)
    blocks = range(len(LogitDataset.open(truth).manifest.shards))
    whole = {row.sample_id: row for index in blocks for row in LogitDataset.open(truth).read_shard(index)}
    long = {name for name, row in whole.items() if row.num_tokens > 100}
    unanswered = {name for name in long if not whole[name].label_mask_L[:100].any()}
    assert long - unanswered, "some are cut within an answer"
    for policy, lost in (("truncate", unanswered), ("drop", long)):
        trainer = Trainer(
            settings(student, tmp_path / policy, data__dataset=str(truth), data__on_too_long=policy, rows_per_step=2)
        )
        [source] = trainer.data._sources
        rows = {row.sample_id: row for index in blocks for row in source.read_block(index)}
        assert rows.keys() == set(chain(*(ids.to_pylist() for ids in source.sample_ids))) == whole.keys() - lost
        assert max(row.num_tokens for row in rows.values()) <= 100
        assert sum(source.tally.values()) == len(long)
        assert source.tally.get("truncated", 0) == (len(long - unanswered) if policy == "truncate" else 0)
        for name, row in rows.items():
            positions = row.num_positions
            assert row.input_ids_L.tolist() == whole[name].input_ids_L[:100].tolist()
            assert row.teacher.entropy_P.tolist() == whole[name].teacher.entropy_P[:positions].tolist()
            kept = int(whole[name].teacher.kept_counts_P[:positions].sum())
            assert row.teacher.kept_ids_E.tolist() == whole[name].teacher.kept_ids_E[:kept].tolist()


def test_a_source_of_which_nothing_is_left_is_named(student_folder: Path, truth: Path, rollouts: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"{truth}: no row is left to train on"):
        trainer_of(
            student_folder,
            tmp_path / "out",
            {"dataset": str(truth)},
            {"dataset": str(rollouts)},
            held_out__fraction=0.9999,
        )


def test_texts_are_mixed_for_plain_sft(student_folder: Path, truth: Path, rollouts: Path, tmp_path: Path):
    texts = [{"text": {"files": [str(each.with_suffix(".jsonl"))]}, "weight": 1} for each in (truth, rollouts)]
    trainer = trainer_of(student_folder, tmp_path / "out", *texts, loss__kd_weight=0)
    assert counts(names(trainer, 1)[0]) == {"truth": 4, "rollouts": 4}
    assert "kd" not in trainer.run()


def test_labels_alone_do_not_collate_what_the_teacher_said(student_folder: Path, truth: Path, tmp_path: Path):
    trainer = Trainer(settings(student_folder, tmp_path / "out", data__dataset=str(truth), loss__kd_weight=0))
    assert next(trainer.data.batches(0, 1)).passes[0].targets.num_kept == 0


def test_weights_are_part_of_what_a_run_is(student_folder: Path, truth: Path, rollouts: Path, tmp_path: Path):
    identities = [
        trainer_of(
            student_folder,
            tmp_path / name,
            {"dataset": str(truth), "weight": 1},
            {"dataset": str(rollouts), "weight": weight},
        ).data.identity()
        for name, weight in (("one", 1), ("two", 2))
    ]
    assert identities[0] != identities[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mix": [{"dataset": "a", "weight": 1}, {"dataset": "b"}]}, "give every source a weight, or none"),
        ({"mix": [{"dataset": "a"}], "dataset": "b"}, "name a dataset, text or mix, and one of them only"),
        ({"mix": [{"weight": 1}]}, "name a dataset or text, one of the two"),
        ({"mix": [{"text": {"files": ["f"]}}]}, "kd_weight above 0 needs data.dataset"),
        ({"mix": [{"dataset": "a"}], "on_too_long": "drop"}, "on_too_long is for"),
        ({"mix": [{"dataset": "a", "weight": 0}]}, "greater than 0"),
    ],
)
def test_mixes_that_say_nothing_clear_are_refused(data: dict[str, Any], message: str):
    tree = {"student": {"model": "m"}, "output": "o", "steps": 1, "data": data}
    with pytest.raises(ValueError, match=message):
        TrainSettings.model_validate(tree)


@pytest.fixture
def store(rollouts: Path) -> Iterator[Any]:
    with memory_store("rollouts", rollouts) as found:
        yield found


def test_a_student_trains_from_a_url_as_from_a_folder(student_folder: Path, rollouts: Path, store: Any, tmp_path: Path):
    cached = {"data__cache": str(tmp_path / "cache")}
    here = settings(student_folder, tmp_path / "here", data__dataset=str(rollouts), rows_per_step=4)
    there = settings(student_folder, tmp_path / "there", data__dataset="memory://rollouts", rows_per_step=4, **cached)
    Trainer(here).run()
    Trainer(there).run()
    losses = [[e["loss"] for e in log_of(tmp_path / name) if "loss" in e] for name in ("here", "there")]
    assert losses[0] == losses[1]
    for shard in (tmp_path / "cache").rglob("*.parquet"):
        shard.write_bytes(b"PAR1")
    mended = settings(student_folder, tmp_path / "mended", data__dataset="memory://rollouts", rows_per_step=4, **cached)
    Trainer(mended).run()
    assert [e["loss"] for e in log_of(tmp_path / "mended") if "loss" in e] == losses[0]
    path = "/rollouts/data/part-00001.parquet"
    store.pipe_file(path, store.cat_file(path)[:-9] + b"not equal")
    for shard in (tmp_path / "cache").rglob("part-00001.parquet"):
        shard.unlink()
    with pytest.raises((DamagedDataError, ConfigError), match=r"memory://rollouts/data/part-00001\.parquet"):
        Trainer(
            settings(student_folder, tmp_path / "never", data__dataset="memory://rollouts", rows_per_step=4, **cached)
        ).run()
