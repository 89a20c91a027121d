"""What is found of held-out rows is what plain transformers and torch say of them, row by row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedDataError, NonFiniteError
from student_train.config import StudentSettings
from student_train.data import measured
from student_train.data_config import DataSettings
from student_train.evaluate import MASS_EDGES, NUM_BINS, evaluate
from student_train.evaluation import Evaluation
from student_train.student import Student
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl

V = 307


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(24))


def dataset(chats: Path, teacher_folder: Path, output: Path, **changes: Any) -> Path:
    return sealed_dump(dump_settings(teacher_folder, chats, output, **changes)).folder


def look(student_folder: Path, num_worst: int = 5, **data: Any) -> Evaluation:
    student = Student(StudentSettings(model=str(student_folder)), torch.device("cpu"), batch_tokens=300)
    sources = student.open_sources(DataSettings.model_validate(data))
    found = evaluate(student, measured(sources, lambda _: True), num_worst=num_worst, step=7)
    assert found is not None
    return found


def by_hand(student_folder: Path, teacher_folder: Path, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """For each row, at each of its positions: from both models' whole distributions."""
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)
        for each in (student_folder, teacher_folder)
    )
    opened, rows = LogitDataset.open(folder), {}
    for row in (row for index in range(len(opened.manifest.shards)) for row in opened.read_shard(index)):
        ids, at = torch.tensor(row.input_ids_L, dtype=torch.long)[None], torch.from_numpy(row.source_index_P)
        with torch.no_grad():
            log_q, log_p = (torch.log_softmax(model(ids).logits[0, at].double(), 1) for model in (student, teacher))
        label = ids[0, at + 1]
        top = log_q.max(dim=1)
        rows[row.sample_id] = {
            "ce": -log_q.gather(1, label[:, None]).squeeze(1).numpy(),
            "kl": (log_p.exp() * (log_p - log_q)).sum(1).numpy(),
            "entropy": -(log_q.exp() * log_q).sum(1).numpy(),
            "right": (top.indices == label).double().numpy(),
            "agrees": (top.indices == log_p.argmax(1)).double().numpy(),
            "confidence": top.values.exp().numpy(),
            "realised": log_p.exp().gather(1, label[:, None]).squeeze(1).numpy(),
        }
    return rows


def test_everything_is_what_the_whole_distributions_say(
    chats: Path, student_folder: Path, teacher_folder: Path, tmp_path: Path
):
    folder = dataset(chats, teacher_folder, tmp_path / "out", keep__k=V, keep__max_kl=0)
    found = look(student_folder, dataset=str(folder))
    rows = by_hand(student_folder, teacher_folder, folder)
    of = {name: np.concatenate([row[name] for row in rows.values()]) for name in next(iter(rows.values()))}
    means = found.means
    assert (found.rows, means.positions, found.step) == (len(rows), len(of["ce"]), 7)
    for got, name in (
        (means.ce, "ce"), (means.kl, "kl"), (means.accuracy, "right"), (means.agreement, "agrees"),
        (means.student_entropy, "entropy"),
    ):  # fmt: skip
        assert got == pytest.approx(of[name].mean(), rel=1e-4), name
    bins = np.minimum((of["confidence"] * NUM_BINS).astype(int), NUM_BINS - 1)
    ece = sum(
        abs(of["confidence"][bins == b].mean() - of["right"][bins == b].mean()) * (bins == b).mean() for b in set(bins)
    )
    assert means.ece == pytest.approx(ece, rel=1e-4)
    assert [each.count for each in found.calibration] == np.bincount(bins, minlength=NUM_BINS).tolist()
    assert means.kept_mass == pytest.approx(1.0, abs=1e-5)
    assert found.kept_mass is not None
    assert sum(found.kept_mass.counts) == means.positions
    worst = sorted(rows, key=lambda name: -rows[name]["kl"].mean())[:5]
    assert [row.sample_id for row in found.worst] == worst
    for row in found.worst:
        for got, name in ((row.ce_P, "ce"), (row.kl_P, "kl"), (row.realised_P, "realised")):
            np.testing.assert_allclose(got, rows[row.sample_id][name], rtol=2e-3, atol=1e-4)


def test_the_worst_rows_say_what_stands_where(
    chats: Path, student_folder: Path, teacher_folder: Path, tokenizer: Any, tmp_path: Path
):
    folder = dataset(chats, teacher_folder, tmp_path / "out")
    found = look(student_folder, dataset=str(folder))
    shards = LogitDataset.open(folder)
    rows = {row.sample_id: row for n in range(len(shards.manifest.shards)) for row in shards.read_shard(n)}
    for seen in found.worst:
        row = rows[seen.sample_id]
        assert "".join(seen.tokens) == tokenizer.decode(row.input_ids_L.tolist())
        assert seen.supervised_P == np.flatnonzero(row.label_mask_L).tolist()
        first = row.teacher.split([1, row.num_positions - 1])[0]
        top = int(first.kept_logp_E.argmax())
        name = tokenizer.decode([int(first.kept_ids_E[top])])
        assert seen.teacher_top_P is not None
        assert seen.teacher_top_P[0][1] == pytest.approx(float(np.exp(first.kept_logp_E[top])), rel=1e-4)
        assert seen.teacher_top_P[0][0] == name or "\ufffd" in name
    masses = found.means.kept_mass, found.means.student_kept_mass
    assert all(mass is not None and 0 < mass < 1 for mass in masses)
    assert found.kept_mass is not None
    assert found.kept_mass.edges == list(MASS_EDGES)


def test_where_the_tail_is_not_known_the_kl_is_of_the_kept_ids_alone(
    chats: Path, student_folder: Path, teacher_folder: Path, tmp_path: Path
):
    """Of lists that were renormalised; as their training has it, and no mass is told that nobody knows."""
    folder = dataset(chats, teacher_folder, tmp_path / "out", keep__k=4, keep__max_kl=0)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["keep"]["tail"] = "unknown"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = look(student_folder, dataset=str(folder))
    student = transformers.AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    opened, kl = LogitDataset.open(folder), list[float]()
    for row in (row for index in range(len(opened.manifest.shards)) for row in opened.read_shard(index)):
        with torch.no_grad():
            logits = student(torch.tensor(row.input_ids_L, dtype=torch.long)[None]).logits[0, row.source_index_P]
        ends = np.cumsum(row.teacher.kept_counts_P)[:-1]
        both = (np.split(each, ends) for each in (row.teacher.kept_ids_E, row.teacher.kept_logp_E))
        for position, (ids, logp) in enumerate(zip(*both, strict=True)):
            log_p = torch.log_softmax(torch.tensor(logp, dtype=torch.float64), 0)
            log_q = torch.log_softmax(logits[position, ids.astype(np.int64)].double(), 0)
            kl.append(float((log_p.exp() * (log_p - log_q)).sum()))
    assert found.means.kl == pytest.approx(float(np.mean(kl)), rel=1e-4)
    assert (found.means.kept_mass, found.means.student_kept_mass, found.kept_mass) == (None, None, None)


def test_without_a_teacher_rows_are_worst_by_their_cross_entropy(chats: Path, student_folder: Path):
    found = look(student_folder, text={"files": [str(chats)]}, num_worst=3)
    assert (found.means.kl, found.means.agreement, found.kept_mass) == (None, None, None)
    assert [row.ce for row in found.worst] == sorted((row.ce for row in found.worst), reverse=True)
    assert len(found.worst) == 3
    assert look(student_folder, text={"files": [str(chats)]}, num_worst=0).worst == []


def test_text_beside_a_dataset_has_all_rows_ranked_by_one_measure(
    chats: Path, student_folder: Path, teacher_folder: Path, tmp_path: Path
):
    folder = dataset(chats, teacher_folder, tmp_path / "out")
    mix = [{"dataset": str(folder)}, {"text": {"files": [str(chats)]}}]
    found, alone = look(student_folder, mix=mix, num_worst=6), look(student_folder, dataset=str(folder), num_worst=99)
    assert found.means.kl is None
    assert all(row.kl_P is None for row in found.worst)
    highest = sorted((row.ce for row in alone.worst), reverse=True)[:3]
    assert [row.ce for row in found.worst] == pytest.approx([ce for ce in highest for _ in range(2)], rel=1e-4)


def test_a_sample_of_ids_has_a_kl_and_no_mass(chats: Path, student_folder: Path, teacher_folder: Path, tmp_path: Path):
    keep = {"method": "threshold", "tau": 0.05}
    folder = dataset(chats, teacher_folder, tmp_path / "out", keep=keep, temperatures=[1])
    found = look(student_folder, dataset=str(folder))
    assert found.means.kl is not None
    assert (found.means.kept_mass, found.kept_mass) == (None, None)


def test_a_student_without_numbers_is_refused_by_the_rows_that_show_it(
    chats: Path, student_folder: Path, teacher_folder: Path, tmp_path: Path
):
    student = Student(StudentSettings(model=str(student_folder)), torch.device("cpu"), batch_tokens=300)
    with torch.no_grad():
        student.model.get_output_embeddings().weight[5] = torch.nan
    sources = student.open_sources(DataSettings.model_validate({"text": {"files": [str(chats)]}}))
    with pytest.raises(NonFiniteError, match=r"no numbers on held-out rows, as chat-\d+"):
        evaluate(student, measured(sources, lambda _: True))


def test_a_written_evaluation_is_read_again_and_nothing_else_is(chats: Path, student_folder: Path, tmp_path: Path):
    found = look(student_folder, text={"files": [str(chats)]})
    found.write(tmp_path / "held_out.json")
    assert Evaluation.read(tmp_path / "held_out.json") == found
    (tmp_path / "other.json").write_text('{"version": 1}')
    with pytest.raises(DamagedDataError, match=r"other\.json holds no evaluation: student"):
        Evaluation.read(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Evaluation.read(tmp_path / "none.json")
