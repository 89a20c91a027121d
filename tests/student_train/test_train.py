"""Whole training runs: the gradient, what has no influence on it, and what is left behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedDataError, MismatchError, NonFiniteError
from shared.rows import LogitRow
from student_train.config import TrainSettings
from student_train.passes import PassMaker
from student_train.train import Trainer, finished_run
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import make_model, make_tokenizer

V = 307


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(24))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, chats: Path) -> Path:
    return sealed_dump(dump_settings(teacher_folder, chats, tmp_path_factory.mktemp("kept8") / "out")).folder


@pytest.fixture(scope="module")
def whole_dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, chats: Path) -> Path:
    """Everything kept: the sparse loss must become the dense one."""
    output = tmp_path_factory.mktemp("keptall") / "out"
    return sealed_dump(dump_settings(teacher_folder, chats, output, keep__k=V)).folder


@pytest.fixture(scope="module")
def whole_sample(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, chats: Path) -> Path:
    """Every id above so small a threshold that none has to be drawn: the estimate must become the truth."""
    keep = {"method": "threshold", "tau": 1e-12, "max_kl": 0}
    output = tmp_path_factory.mktemp("sampled") / "out"
    return sealed_dump(dump_settings(teacher_folder, chats, output, keep=keep, temperatures=[1])).folder


def settings(student: Path, output: Path, **changes: Any) -> TrainSettings:
    tree: dict[str, Any] = {
        "student": {"model": str(student)},
        "data": {},
        "output": str(output),
        "optimizer": {"learning_rate": 1e-3},
        "steps": 3,
        "rows_per_step": 8,
        "batch_tokens": 600,
        "device": "cpu",
    }
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return TrainSettings.model_validate(tree)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("kept", "temperature", "agreement"),
    [("whole_dataset", 1.0, 0), ("whole_dataset", 2.0, 0), ("whole_sample", 1.0, 0), ("whole_dataset", 2.0, 0.5)],
)
def test_first_step_equals_dense_distillation_written_by_hand(
    kept: str,
    temperature: float,
    agreement: float,
    student_folder: Path,
    teacher_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
):
    """Off-by-one, T² without gradient, means of means and KL over the prompt would each show here."""
    whole_dataset = request.getfixturevalue(kept)
    Trainer(
        settings(
            student_folder, tmp_path / "out", data__dataset=str(whole_dataset), steps=1, rows_per_step=24,
            loss__temperature=temperature, loss__kd_weight=0.7, loss__agreement=agreement,
            optimizer__max_grad_norm=1e9,
        )
    ).run()  # fmt: skip
    step = next(entry for entry in log_of(tmp_path / "out") if "loss" in entry)
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (student_folder, teacher_folder)
    )
    opened = LogitDataset.open(whole_dataset)
    ce_sum = kl_sum = torch.zeros(())
    num_labels, weight = 0, torch.zeros(())
    for row in (row for index in range(len(opened.manifest.shards)) for row in opened.read_shard(index)):
        ids = torch.tensor(row.input_ids_L, dtype=torch.long)[None]
        labels = ids.masked_fill(~torch.from_numpy(row.label_mask_L)[None], -100)[0, 1:]
        student_logits = student(ids).logits[0, :-1]
        with torch.no_grad():
            teacher_logits = teacher(ids).logits[0, :-1]
        is_label = labels != -100
        c = (
            torch.log_softmax(teacher_logits, dim=1)[is_label].gather(1, labels[is_label, None])[:, 0].exp()
            ** agreement
        )
        ce_sum = ce_sum + (c * F.cross_entropy(student_logits[is_label], labels[is_label], reduction="none")).sum()
        log_q = torch.log_softmax(student_logits[is_label] / temperature, dim=1)
        p = torch.softmax(teacher_logits[is_label] / temperature, dim=1)
        kl_sum = kl_sum + (c * F.kl_div(log_q, p, reduction="none").sum(dim=1)).sum()
        num_labels, weight = num_labels + int(is_label.sum()), weight + c.sum()
    loss = (0.3 * ce_sum + 0.7 * temperature**2 * kl_sum) / weight
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in student.parameters()))
    assert step["positions"] == num_labels
    assert step["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert step["ce"] == pytest.approx(float(ce_sum.detach() / weight), rel=1e-4)
    assert step["kd"] == pytest.approx(float(kl_sum.detach() / weight), rel=1e-4)
    assert step["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_how_a_step_is_cut_into_forward_passes_changes_nothing(student_folder: Path, dataset: Path, tmp_path: Path):
    """Rows have very unlike numbers of labels: a mean of means would differ."""
    cuts: dict[str, dict[str, Any]] = {
        "side by side": {"packing": False, "batch_tokens": 100_000, "loss__chunk_positions": 5000},
        "one by one": {"packing": False, "batch_tokens": 1, "loss__chunk_positions": 5},
        "odd": {"packing": False, "batch_tokens": 333, "loss__chunk_positions": 64},
        "packed": {"batch_tokens": 100_000},
        "packed short": {"batch_tokens": 333, "loss__chunk_positions": 64},
        "masked": {"batch_tokens": 1000, "student__attention": "sdpa"},
        "masked by hand": {"batch_tokens": 1000, "student__attention": "eager"},
        "static": {"batch_tokens": 1000, "student__attention": "sdpa", "static_shapes": True},
        "one line, static": {"batch_tokens": 400, "student__attention": "varlen", "static_shapes": True},
    }
    runs = {}
    for name, changes in cuts.items():
        Trainer(settings(student_folder, tmp_path / name, data__dataset=str(dataset), **changes)).run()
        runs[name] = [(e["loss"], e["grad_norm"]) for e in log_of(tmp_path / name) if "loss" in e]
    for name, run in runs.items():
        np.testing.assert_allclose(run, runs["side by side"], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_what_a_row_shares_a_pass_with_has_no_influence_on_it(
    packing: bool, student_folder: Path, dataset: Path, tmp_path: Path
):
    """A short row beside a long one, or behind it, gives the same bits of its gradient whatever that one says."""
    trainer = Trainer(
        settings(student_folder, tmp_path / "out", data__dataset=str(dataset), batch_tokens=100_000, packing=packing)
    )
    rows = LogitDataset.open(dataset).read_shard(0)
    long, short = max(rows, key=lambda r: r.num_tokens), min(rows, key=lambda r: r.num_tokens)
    assert long.num_tokens > 1.5 * short.num_tokens
    gradients = []
    for companion in (long, _with_other_tokens(long)):
        trainer.student.model.zero_grad()
        # The companion has weight in neither sum: its labels are masked away, only its padding effect is left.
        silent = LogitRow(**{**vars(companion), "label_mask_L": companion.label_mask_L & False, "teacher": _none(long)})
        loss_of(trainer, [short, silent])
        gradients.append([p.grad.clone() for p in trainer.student.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def loss_of(trainer: Trainer, rows: list[LogitRow]) -> float:
    """And its gradient, added to the parameters'."""
    at_one = [replace(row, teacher=row.teacher.at_temperature(0)) for row in rows]
    passes, _ = trainer.data.passes.make(at_one)
    return trainer.student.gradients(passes, trainer.objective, denominator=1.0)[0].item()


def _with_other_tokens(row: LogitRow) -> LogitRow:
    return LogitRow(**{**vars(row), "input_ids_L": (row.input_ids_L + 7) % V})


def _none(row: LogitRow) -> Any:
    return row.teacher.split([0, row.num_positions])[0]


def test_tokens_without_a_label_get_no_loss(student_folder: Path, dataset: Path, tmp_path: Path):
    """Change what follows the last label of a row: nothing that is trained on may move."""
    trainer = Trainer(settings(student_folder, tmp_path / "out", data__dataset=str(dataset)))
    row = LogitDataset.open(dataset).read_shard(0)[0]
    last = int(np.flatnonzero(row.label_mask_L)[-1])
    assert last < row.num_tokens - 1, "the template puts a line feed behind the end of turn"
    changed_ids = row.input_ids_L.copy()
    changed_ids[last + 1 :] = 99
    values = [loss_of(trainer, [version]) for version in (row, LogitRow(**{**vars(row), "input_ids_L": changed_ids}))]
    assert values[0] == values[1]


def test_distillation_moves_the_student_towards_the_teacher(student_folder: Path, dataset: Path, tmp_path: Path):
    result = Trainer(
        settings(
            student_folder, tmp_path / "out", data__dataset=str(dataset), steps=40, held_out__fraction=0.2,
            loss__kd_weight=0.9, optimizer__learning_rate=1e-2, optimizer__warmup_steps=3, evaluate_every=20,
        )
    ).run()  # fmt: skip
    evaluations = [entry["held_out"] for entry in log_of(tmp_path / "out") if "held_out" in entry]
    assert [entry["step"] for entry in log_of(tmp_path / "out") if "held_out" in entry] == [0, 20, 40]
    assert evaluations[-1]["kl"] < 0.8 * evaluations[0]["kl"]
    assert result["held_out"] == evaluations[-1]


def test_the_learning_rate_warms_up_and_falls_to_its_floor(student_folder: Path, dataset: Path, tmp_path: Path):
    Trainer(
        settings(
            student_folder, tmp_path / "out", data__dataset=str(dataset), steps=10, rows_per_step=1,
            optimizer__learning_rate=1e-3, optimizer__warmup_steps=4, optimizer__min_lr_ratio=0.1,
        )
    ).run()  # fmt: skip
    rates = [entry["lr"] for entry in log_of(tmp_path / "out") if "lr" in entry]
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 1e-4 < rates[-1] < 2.5e-4


def test_plain_sft_reads_text_and_needs_no_dataset(student_folder: Path, chats: Path, dataset: Path, tmp_path: Path):
    """And is bit for bit what kd_weight 0 gives on the dataset made from that text, cut into the same blocks."""
    text = {"data__text": {"files": [str(chats)]}, "loss__kd_weight": 0}
    Trainer(settings(student_folder, tmp_path / "text", **text)).run()
    Trainer(settings(student_folder, tmp_path / "again", **text)).run()
    entries = [[e["loss"] for e in log_of(tmp_path / name) if "loss" in e] for name in ("text", "again")]
    assert entries[0] == entries[1], "same seed, same losses"
    assert "kd" not in log_of(tmp_path / "text")[-1]
    weights, before = weights_of(tmp_path / "text/model"), weights_of(student_folder)
    assert any(not torch.equal(weights[name], before[name]) for name in before)


def test_utilisation_is_operations_over_what_the_device_could_do(student_folder: Path, chats: Path, tmp_path: Path):
    peak = 1e-3  # in 1e12 per second
    run = settings(
        student_folder, tmp_path / "out", data__text={"files": [str(chats)]}, loss__kd_weight=0, log__peak_tflops=peak
    )
    trainer = Trainer(run)
    steps = [entry for entry in log_of(Path(trainer.run()["model"]).parent) if "loss" in entry]
    for batch, entry in zip(trainer.data.batches(0, 3), steps, strict=True):
        seconds = batch.num_tokens / entry["tokens_per_s"]
        flops = trainer.student.flops.of_step(batch.row_tokens, batch.num_positions)
        assert entry["mfu"] * peak * 1e12 * seconds == pytest.approx(flops, rel=0.02)
        body = sum(p.numel() for p in trainer.student.model.model.layers.parameters() if p.ndim == 2)
        assert flops > 6 * body * batch.num_tokens


def test_what_is_left_is_a_hugging_face_model_with_its_tokenizer(student_folder: Path, dataset: Path, tmp_path: Path):
    result = Trainer(settings(student_folder, tmp_path / "out", data__dataset=str(dataset))).run()
    model = transformers.AutoModelForCausalLM.from_pretrained(result["model"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(result["model"])
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Two plus three?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] >= ids.shape[1] + 1
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["data"][0]["manifest_sha256"] == LogitDataset.open(dataset).identity()
    assert (tmp_path / "out/config.yaml").is_file()


def test_a_finished_run_is_neither_repeated_nor_overwritten(student_folder: Path, dataset: Path, tmp_path: Path):
    run = settings(student_folder, tmp_path / "out", data__dataset=str(dataset))
    assert finished_run(run) is None
    result = Trainer(run).run()
    assert finished_run(run) == result
    with pytest.raises(ConfigError, match="this run is finished"):
        Trainer(run)
    with pytest.raises(MismatchError, match=r"(?s)was trained with other settings.*steps: was 3, is 4"):
        finished_run(settings(student_folder, tmp_path / "out", data__dataset=str(dataset), steps=4))


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_over(
    student_folder: Path, dataset: Path, tmp_path: Path
):
    """Whose first seconds go by with loading a model, before it takes the folder for itself."""
    run = settings(student_folder, tmp_path / "out", data__dataset=str(dataset))
    late = Trainer(run)
    result = Trainer(run).run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="this run is finished"):
        late.run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    assert finished_run(run) == result


def test_a_finished_run_on_what_is_another_dataset_now_is_no_finished_run(
    student_folder: Path, dataset: Path, tmp_path: Path
):
    moved = shutil.copytree(dataset, tmp_path / "dataset")
    run = settings(student_folder, tmp_path / "out", data__dataset=str(moved))
    result = Trainer(run).run()
    repaired = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps(repaired, indent=3))
    with pytest.raises(MismatchError, match=r"was trained with the dataset .* of sha256(.|\n)*next: give this run"):
        finished_run(run)
    shutil.rmtree(moved)
    assert finished_run(run) == result, "what was carried away is no matter"


def test_an_undeclared_temperature_is_refused(student_folder: Path, dataset: Path, tmp_path: Path):
    with pytest.raises(MismatchError, match=r"temperature 3 is not among the \[1\.0, 2\.0\] of (.|\n)*next: train at"):
        Trainer(settings(student_folder, tmp_path / "out", data__dataset=str(dataset), loss__temperature=3))


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ({"divergence": "jsd"}, "sampled ids estimate forward_kl at temperature 1 and nothing else, got jsd"),
        ({"divergence": "reverse_kl"}, "got reverse_kl"),
        ({"tail": "bucket"}, "sampled ids have no tail to bucket"),
        ({"temperature": 2.0}, "got forward_kl at temperature 2"),
    ],
)
def test_a_sampled_teacher_is_refused_what_it_cannot_answer(
    loss: dict[str, Any], reason: str, whole_sample: Path, tmp_path: Path
):
    """Before the student is loaded: there is none here."""
    with pytest.raises(MismatchError, match=rf"(?s)was kept by threshold.*{reason}.*next: .*or dump with keep.method"):
        Trainer(settings(tmp_path / "none", tmp_path / "out", data__dataset=str(whole_sample), loss=loss))


def test_a_student_learns_from_a_sampled_teacher(
    student_folder: Path, teacher_folder: Path, chats: Path, whole_sample: Path, tmp_path: Path
):
    """What is measured is the exact divergence, which the sample of the training never shows."""
    keep = {"method": "threshold", "tau": 0.02}
    sampled = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "sampled", keep=keep, temperatures=[1]))
    result = Trainer(
        settings(
            student_folder, tmp_path / "out", data__dataset=str(sampled.folder), steps=30, loss__kd_weight=1.0,
            held_out__data={"dataset": str(whole_sample)}, evaluate_every=30,
        )
    ).run()  # fmt: skip
    before = next(entry["held_out"]["kl"] for entry in log_of(tmp_path / "out") if "held_out" in entry)
    assert result["held_out"]["kl"] < 0.8 * before


def test_reverse_kl_is_refused_where_it_is_infinite(student_folder: Path, whole_dataset: Path, tmp_path: Path):
    """Everything is kept, so the tail is empty: finite for a student of this vocabulary, not for one with more ids."""
    changes: dict[str, Any] = {"data__dataset": str(whole_dataset), "loss__divergence": "reverse_kl", "steps": 1}
    Trainer(settings(student_folder, tmp_path / "out", **changes)).run()
    wider = make_model(tmp_path / "wider", vocab_size=V + 4)
    make_tokenizer(wider)
    with pytest.raises(MismatchError, match=r"row \S+, position \d+: the teacher's tail is empty(.|\n)*next: take"):
        Trainer(settings(wider, tmp_path / "wide", **changes)).run()
    Trainer(settings(wider, tmp_path / "jsd", **changes | {"loss__divergence": "jsd"})).run()


def test_damage_stops_training_before_it_is_trained_on(student_folder: Path, dataset: Path, tmp_path: Path):
    shard = sorted(dataset.glob("data/*"))[-1]
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[: len(whole) // 2] + b"\0" + whole[len(whole) // 2 + 1 :])
        trainer = Trainer(settings(student_folder, tmp_path / "out", data__dataset=str(dataset), steps=100))
        with pytest.raises(DamagedDataError):
            trainer.run()
    finally:
        shard.write_bytes(whole)
    assert not (tmp_path / "out/model").exists()


def test_a_loss_that_is_no_number_stops_with_the_rows_named(student_folder: Path, dataset: Path, tmp_path: Path):
    diverging = settings(
        student_folder, tmp_path / "out", data__dataset=str(dataset), steps=30, optimizer__learning_rate=1e30,
        optimizer__max_grad_norm=1e30,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"step \d+: loss .*its worst rows: chat-\d+ \(ce "):
        Trainer(diverging).run()


def test_what_is_held_out_is_never_trained_on(
    student_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = Trainer(
        settings(student_folder, tmp_path / "out", data__dataset=str(dataset), steps=12, held_out__fraction=0.4)
    )
    trained, measured = set[str](), set[str]()
    make = PassMaker.make

    def record(maker: PassMaker, rows: Any) -> Any:
        (trained if maker is trainer.data.passes else measured).update(row.sample_id for row in rows)
        return make(maker, rows)

    monkeypatch.setattr(PassMaker, "make", record)
    trainer.run()
    assert len(trained) + len(measured) == 24
    assert trained
    assert measured
    assert not trained & measured


def test_a_student_with_less_padding_learns_from_the_same_teacher(dataset: Path, tmp_path: Path):
    student = make_model(tmp_path / "student", vocab_size=301, num_hidden_layers=1)
    make_tokenizer(student)
    result = Trainer(
        settings(student, tmp_path / "out", data__dataset=str(dataset), steps=20, held_out__fraction=0.2)
    ).run()
    kls = [entry["held_out"]["kl"] for entry in log_of(tmp_path / "out") if "held_out" in entry]
    assert result["held_out"]["kl"] == kls[-1] < kls[0]


def test_the_gradient_is_clipped_to_its_norm(student_folder: Path, dataset: Path, tmp_path: Path):
    """AdamW does not see a scaled gradient, until the scale meets its epsilon: then nothing moves any more."""
    Trainer(
        settings(student_folder, tmp_path / "out", data__dataset=str(dataset), optimizer__max_grad_norm=1e-14)
    ).run()
    before, after = weights_of(student_folder), weights_of(tmp_path / "out/model")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_step": 25}, "rows_per_step is 25, but there are 24 rows"),
        ({"optimizer__warmup_steps": 3}, "warmup_steps is 3, but there are 3 steps"),
        ({"held_out__fraction": 1e-9}, "no row is held out"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(
    changes: dict[str, Any], message: str, student_folder: Path, dataset: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        Trainer(settings(student_folder, tmp_path / "out", data__dataset=str(dataset), **changes))


def test_an_epoch_sees_every_row(student_folder: Path, dataset: Path, tmp_path: Path):
    result = Trainer(
        settings(student_folder, tmp_path / "out", data__dataset=str(dataset), steps=None, epochs=1, rows_per_step=7)
    ).run()
    assert (result["steps"], result["rows_per_epoch"]) == (4, 24)


def test_a_folder_that_is_not_ours_is_left_alone(student_folder: Path, dataset: Path, tmp_path: Path):
    (tmp_path / "log.jsonl").write_text("somebody's")
    with pytest.raises(ConfigError, match="is not empty and holds none of"):
        Trainer(settings(student_folder, tmp_path, data__dataset=str(dataset)))
    assert (tmp_path / "log.jsonl").read_text() == "somebody's"
