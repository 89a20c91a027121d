"""Datasets of another vocabulary in whole runs: what is refused, what is dropped, and that nothing else changes."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import student_train.cli
from shared.dataset import LogitDataset
from shared.errors import ForeignTokenizerError, MismatchError
from shared.models_config import ModelSettings
from shared.pretrained import load_tokenizer
from student_train.data_config import DataSettings
from student_train.doctor.examination import examine
from student_train.estimate.rows import read_rows
from student_train.eval.config import EvalSettings
from student_train.eval.run import run_evaluation
from student_train.rollout.config import RolloutSettings
from student_train.rollout.prompts import data_identity, read_prompts
from student_train.score.config import ScoreSettings
from student_train.score.run import run_scoring
from student_train.sources import UNKNOWN_TOKEN, open_source
from student_train.train import Trainer
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.examined import of
from tests.kin import edited, extended, give_tokenizer, moved, with_moved_rows
from tests.shared.made_datasets import write_dataset
from tests.student_train.test_resume import interrupt_in_step
from tests.student_train.test_train import log_of, settings
from tests.tiny import make_model, make_tokenizer

NUM_RECORDS, TOOL = 20, "<tool>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    """Has a token for tools, which every fourth chat uses."""
    model = make_model(folder / "teacher", seed=1)
    make_tokenizer(model, added=[TOOL])
    return model


@pytest.fixture(scope="module")
def tools(folder: Path) -> Path:
    records = chat_records(NUM_RECORDS)
    for record in records[::4]:
        record["messages"][-1]["content"] += TOOL
    return write_jsonl(folder / "tools.jsonl", records)


@pytest.fixture(scope="module")
def chats(folder: Path) -> Path:
    return write_jsonl(folder / "chats.jsonl", chat_records(NUM_RECORDS))


@pytest.fixture(scope="module")
def plain(folder: Path, teacher: Path, chats: Path) -> Path:
    return sealed_dump(dump_settings(teacher, chats, folder / "plain")).folder


@pytest.fixture(scope="module")
def with_tools(folder: Path, teacher: Path, tools: Path) -> Path:
    return sealed_dump(dump_settings(teacher, tools, folder / "with-tools")).folder


def student_of(folder: Path, teacher: Path, change: Any, **shape: Any) -> Path:
    """A student whose tokenizer is the teacher's, changed."""
    theirs = load_tokenizer(ModelSettings(model=str(teacher)))
    model = make_model(folder, seed=2, num_hidden_layers=1, **shape)
    give_tokenizer(model, change(theirs.backend_tokenizer), theirs)
    return model


@pytest.fixture(scope="module")
def cousin(folder: Path, teacher: Path) -> Path:
    """All tokens of the teacher elsewhere, and two more."""
    return student_of(
        folder / "cousin", teacher, lambda each: extended(moved(each), "<more>", "<most>"), vocab_size=311
    )


@pytest.fixture(scope="module")
def toolless(folder: Path, teacher: Path, tokenizer: Any) -> Path:
    """The same tokens at the same places, but none for tools."""
    return student_of(folder / "toolless", teacher, lambda _: tokenizer.backend_tokenizer, vocab_size=303)


def opened(student: Path, **data: Any) -> Any:
    tokenizer = load_tokenizer(ModelSettings(model=str(student)))
    vocab_size = json.loads((student / "config.json").read_text())["vocab_size"]
    return open_source(DataSettings(**data), tokenizer, vocab_size=vocab_size, context_tokens=512)


def rows_of(source: Any) -> list[Any]:
    return [row for index in range(len(source.sample_ids)) for row in source.read_block(index)]


def test_a_run_on_mapped_rows_is_the_run_on_a_dataset_with_the_students_ids(
    teacher: Path, cousin: Path, chats: Path, tmp_path: Path
):
    """The other dataset is of the same teacher with its rows moved, and so has the student's ids from the start."""
    theirs, ours = (load_tokenizer(ModelSettings(model=str(each))) for each in (teacher, cousin))
    here = make_model(tmp_path / "here", seed=1, vocab_size=301)  # whose padding nobody could tell from tokens
    give_tokenizer(here, theirs.backend_tokenizer, theirs)
    new_ids = {token_id: ours.get_vocab()[token] for token, token_id in theirs.get_vocab().items()}
    there = with_moved_rows(here, tmp_path / "there", new_ids)
    give_tokenizer(there, moved(theirs.backend_tokenizer), theirs)
    logs = []
    for model, student in ((here, cousin), (there, None)):
        dataset = sealed_dump(dump_settings(model, chats, tmp_path / f"from-{model.name}")).folder
        if student is None:  # the same weights, with the other tokenizer of the same ids
            student = student_of(tmp_path / "twin", teacher, moved, vocab_size=311)
        data = {"dataset": str(dataset), "map_vocabulary": model == here}
        changes = {"loss__temperature": 2.0, "loss__divergence": "jsd", "held_out__fraction": 0.2, "rows_per_step": 5}
        Trainer(settings(student, tmp_path / f"on-{model.name}", data=data, **changes)).run()
        logs.append(log_of(tmp_path / f"on-{model.name}"))
    for one, other in zip(*logs, strict=True):
        assert one["step"] == other["step"]
        for key in {"loss", "ce", "kd", "grad_norm", "held_out"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=2e-5), key
    run, plain = (json.loads((tmp_path / f"on-{name}/run.json").read_text())["data"][0] for name in ("here", "there"))
    assert run["vocabulary"]["mapped_tokens"] == 301
    assert run["vocabulary"]["first_rows"] == {"rows": 7, "mappable": 7, "cut_alike": 7, "moved_mass": 0.0}
    assert run["vocabulary_sha256"]
    assert "vocabulary" not in plain


def test_what_is_measured_scored_and_asked_on_mapped_rows_is_what_the_students_own_rows_give(
    cousin: Path, plain: Path, chats: Path, tmp_path: Path
):
    """The same text, once by way of the dataset's ids and once cut by the student's tokenizer."""
    found = []
    for data in ({"dataset": str(plain), "map_vocabulary": True}, {"text": {"files": [str(chats)]}}):
        tree = {"student": {"model": str(cousin)}, "data": data, "device": "cpu"}
        name = next(iter(data))
        evaluated = run_evaluation(EvalSettings.model_validate(tree | {"output": str(tmp_path / f"eval-{name}")}))
        scored = run_scoring(ScoreSettings.model_validate(tree | {"output": str(tmp_path / f"score-{name}")}))
        tokenizer = load_tokenizer(ModelSettings(model=str(cousin)))
        asking = RolloutSettings.model_validate(tree | {"output": str(tmp_path / "rollout")})
        prompts = read_prompts(asking, tokenizer, None, context_tokens=512)
        worst = {row["sample_id"]: row["tokens"] for row in evaluated["evaluation"]["worst"]}
        found.append((evaluated["evaluation"]["means"], scored["nll"], prompts.digest, worst))
    (means, nll, digest, worst), (own_means, own_nll, own_digest, own_worst) = found
    assert means["ce"] == pytest.approx(own_means["ce"], rel=1e-5)
    assert (means["kl"] > 0, own_means["kl"]) == (True, None)
    assert nll == own_nll
    assert digest == own_digest
    assert any(worst[name] == own_worst[name] for name in worst.keys() & own_worst.keys())


def test_rows_are_the_same_strings_of_tokens_and_nothing_on_disk_has_changed(
    teacher: Path, cousin: Path, plain: Path, caplog: pytest.LogCaptureFixture
):
    before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}
    caplog.set_level(logging.INFO, "logitferry")
    source = opened(cousin, dataset=str(plain), map_vocabulary=True)
    theirs, ours = (load_tokenizer(ModelSettings(model=str(each))) for each in (teacher, cousin))
    dataset = LogitDataset.open(plain)
    old = {row.sample_id: row for index in range(len(dataset.manifest.shards)) for row in dataset.read_shard(index)}
    outlines = [row for index in range(len(source.sample_ids)) for row in source.read_outline(index)]
    for row, outline in zip(rows_of(source), outlines, strict=True):
        was = old[row.sample_id]
        assert ours.convert_ids_to_tokens(row.input_ids_L) == theirs.convert_ids_to_tokens(was.input_ids_L)
        assert outline.input_ids_L.tolist() == row.input_ids_L.tolist()
        mass = np.exp(row.teacher.kept_logp_E).sum() + np.exp(row.teacher.tail_logsum_PT[:, 0]).sum()
        assert mass == pytest.approx(row.num_positions, rel=1e-4)
    assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before
    assert "301 of 301 tokens mapped, 0 the student lacks, 2 it has more ('<more>', '<most>')" in caplog.text
    assert "of the first 7 rows 7 have tokens of the student alone, 7 of these" in caplog.text


def test_a_run_that_goes_on_takes_the_same_vocabulary(
    cousin: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = {"dataset": str(plain), "map_vocabulary": True}
    whole = settings(cousin, tmp_path / "whole", data=data, steps=4)
    Trainer(whole).run()
    run = settings(cousin, tmp_path / "out", data=data, steps=4)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            Trainer(run).run()
    with monkeypatch.context() as patch:
        patch.setattr("student_train.vocabulary.Vocabulary.digest", lambda _: "of another rule")
        with pytest.raises(MismatchError, match=r"dataset\.0\.vocabulary_sha256"):
            Trainer(run).run()
    Trainer(run).run()
    one, other = ([entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("whole", "out"))
    assert one == other


def test_another_vocabulary_is_refused_by_default_and_the_setting_is_named(cousin: Path, toolless: Path, plain: Path):
    for student, found in (
        (cousin, "301 of 301 tokens mapped, 0 the student lacks, 2 it has more ('<more>', '<most>')"),
        (toolless, "300 of 301 tokens mapped, 1 the student lacks ('<tool>'), 0 it has more"),
    ):
        with pytest.raises(ForeignTokenizerError) as caught:
            opened(student, dataset=str(plain))
        assert f"they are of one family: {found}" in str(caught.value)
        assert "next: set map_vocabulary: true beside `dataset`" in str(caught.value)


def test_a_tokenizer_of_another_family_is_refused_whatever_is_set(
    teacher: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As a shell sees it: exit code 4, why, and what would be needed."""
    config = tmp_path / "train.yaml"
    foreign = make_model(tmp_path / "foreign", seed=3, num_hidden_layers=1)
    make_tokenizer(foreign, sentences=["zebra zebra zebra zebra zebra", "a quick brown zebra"])
    tree = settings(foreign, tmp_path / "out", data={"dataset": str(plain), "map_vocabulary": "drop"})
    config.write_text(yaml.safe_dump(tree.model_dump(mode="json")))
    monkeypatch.setattr("sys.argv", ["student-train", "run", str(config)])
    with pytest.raises(SystemExit) as end:
        student_train.cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 4
    assert "ids cannot be mapped by token: " in said
    assert (
        "next: train a student that has the teacher's tokenizer, or dump with a teacher that has the student's" in said
    )
    assert "distilling from one tokenizer to another is not among what logitferry does" in said


def test_rows_with_tokens_that_the_student_lacks_are_refused_or_dropped_and_counted(
    toolless: Path, with_tools: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(MismatchError, match=r"5 of 20 rows have tokens that the student lacks, the first: row chat-0 "):
        opened(toolless, dataset=str(with_tools), map_vocabulary=True)
    caplog.set_level(logging.INFO, "logitferry")
    source = opened(toolless, dataset=str(with_tools), map_vocabulary="drop")
    assert source.tally == {UNKNOWN_TOKEN: 5}
    names = [name for block in source.sample_ids for name in block.to_pylist()]
    assert names == [f"chat-{n}" for n in range(NUM_RECORDS) if n % 4]
    assert [row.sample_id for row in rows_of(source)] == names
    assert "15 of 20 rows; dropped unknown token: 5" in caplog.text
    lost = sum((row.teacher.kept_ids_E >= 303).sum() for row in rows_of(source))
    assert lost == 0
    data = {"dataset": str(with_tools), "map_vocabulary": "drop"}
    Trainer(settings(toolless, tmp_path / "out", data=data, steps=2)).run()
    record = json.loads((tmp_path / "out/run.json").read_text())["data"][0]
    assert record["tally"] == {UNKNOWN_TOKEN: 5}
    assert record["vocabulary"]["lacking_tokens"] == 1
    assert 0 < record["vocabulary"]["first_rows"]["moved_mass"] < 1


def test_rows_that_are_too_long_as_well_are_counted_once(toolless: Path, with_tools: Path):
    tokenizer = load_tokenizer(ModelSettings(model=str(toolless)))
    for on_too_long, fates in (
        ("drop", {"dropped_too_long", UNKNOWN_TOKEN}),
        ("truncate", {"truncated", UNKNOWN_TOKEN}),
    ):
        tree = {"dataset": str(with_tools), "map_vocabulary": "drop", "on_too_long": on_too_long}
        data = DataSettings.model_validate(tree)
        source: Any = open_source(data, tokenizer, vocab_size=303, context_tokens=120)
        assert source.tally.keys() == fates
        rows = rows_of(source)
        assert [row.sample_id for row in rows] == [name for block in source.sample_ids for name in block.to_pylist()]
        dropped = sum(count for fate, count in source.tally.items() if fate.startswith("dropped"))
        assert len(rows) == NUM_RECORDS - dropped
        assert max(row.num_tokens for row in rows) <= 120


def test_where_every_row_has_such_a_token_there_is_nothing_to_train_on(teacher: Path, toolless: Path, tmp_path: Path):
    records = chat_records(4)
    for record in records:
        record["messages"][-1]["content"] += TOOL
    files = write_jsonl(tmp_path / "chats.jsonl", records)
    dataset = sealed_dump(dump_settings(teacher, files, tmp_path / "out")).folder
    with pytest.raises(MismatchError, match=r"4 of 4 rows have tokens that[\s\S]*next: add the tokens"):
        opened(toolless, dataset=str(dataset), map_vocabulary="drop")


def test_a_sample_of_ids_is_mapped_where_the_student_lacks_none_and_else_refused(
    teacher: Path, cousin: Path, toolless: Path, chats: Path, tmp_path: Path
):
    keep = {"method": "threshold", "tau": 0.02, "max_kl": 0}
    dataset = sealed_dump(dump_settings(teacher, chats, tmp_path / "out", keep=keep, temperatures=[1])).folder
    mapped = opened(cousin, dataset=str(dataset), map_vocabulary=True).at(1.0)
    whole = opened(teacher, dataset=str(dataset)).at(1.0)
    for row, before in zip(rows_of(mapped), rows_of(whole), strict=True):
        is_token = before.teacher.kept_ids_E < 301
        assert sorted(row.teacher.kept_logp_E) == sorted(before.teacher.kept_logp_E[is_token])
    without = opened(toolless, dataset=str(dataset), map_vocabulary=True)
    assert rows_of(without.at(None)), "labels alone need no tail"
    with pytest.raises(MismatchError, match="keeps a sample of ids, without a tail"):
        without.at(1.0)


def test_an_id_that_is_padding_in_the_text_of_a_row_is_never_given_to_a_student_without_it(
    teacher: Path, plain: Path, tmp_path: Path
):
    """Other writers' files may have any; no text has such."""
    first, *others = LogitDataset.open(plain).read_shard(0)
    ids = first.input_ids_L.copy()
    ids[2] = 305
    theirs = LogitDataset.open(plain).tokenizer()
    rows = [replace(first, sample_id="odd", input_ids_L=ids), *others]
    dataset = write_dataset(tmp_path / "odd", [rows], tokenizer=theirs, vocab_size=307)
    tokenizer = load_tokenizer(ModelSettings(model=str(teacher)))
    source: Any = open_source(DataSettings(dataset=str(dataset)), tokenizer, vocab_size=303, context_tokens=512)
    with pytest.raises(MismatchError, match="row odd has id 305, which is no token"):
        source.read_block(0)


def test_doctor_and_estimate_tell_of_the_mapping(toolless: Path, with_tools: Path, plain: Path, tmp_path: Path):
    data = {"dataset": str(with_tools), "map_vocabulary": "drop"}
    findings = examine(settings(toolless, tmp_path / "out", data=data))
    (found,) = of("data", findings)
    assert found.verdict == "ok", found
    assert "of another tokenizer of this family; tails at T 1, 2" in found.found
    assert "300 of 301 tokens mapped, 1 the student lacks ('<tool>')" in found.found
    assert "of the teacher's probability is kept at tokens that it lacks, and goes to the tail" in found.found
    assert "5 rows have tokens that the student lacks, and are dropped" in found.found
    assert "an epoch has 15 rows" in of("steps", findings)[0].found
    (refused,) = of("data", examine(settings(toolless, tmp_path / "out", data=data | {"map_vocabulary": True})))
    assert refused.verdict == "mend"
    assert "set map_vocabulary: drop" in str(refused.next_step)
    tokenizer = load_tokenizer(ModelSettings(model=str(toolless)))
    run = settings(toolless, tmp_path / "out", data=data)
    estimated, _ = read_rows(run, tokenizer, vocab_size=303, context_tokens=512)
    source = opened(toolless, **data)
    read = [row for index in (0, 2) for row in source.read_block(index)]  # those that an estimate looks at
    assert estimated.num_rows == 15
    assert estimated.tokens_per_row == pytest.approx(sum(row.num_tokens for row in read) / len(read))


def test_thoughts_between_tags_that_are_tokens_of_the_student_alone_are_found(teacher: Path, tmp_path: Path):
    """The rows spell them out, and so no id tells of them; and the student would learn to spell them."""
    records = chat_records(8)
    for record in records[::2]:
        record["messages"][-1]["content"] = f"<think>Hm.</think>{record['messages'][-1]['content']}"
    dumped = dump_settings(teacher, write_jsonl(tmp_path / "thoughts.jsonl", records), tmp_path / "thoughts")
    data = {"dataset": str(sealed_dump(dumped).folder), "map_vocabulary": True}
    thinker = student_of(
        tmp_path / "thinker", teacher, lambda each: extended(each, "<think>", "</think>"), vocab_size=307
    )
    source = opened(thinker, **data, manner={"take": "reasoning"})
    assert source.manners.counts == {"reasoning": 4, "fast": 4}
    assert sorted(row.sample_id for row in rows_of(source)) == [f"chat-{n}" for n in range(0, 8, 2)]
    tree = {"student": {"model": str(thinker)}, "data": data, "device": "cpu", "output": str(tmp_path / "scores")}
    assert run_scoring(ScoreSettings.model_validate(tree))["manners"] == {"reasoning": 4, "fast": 4}
    (found,) = of("data", examine(settings(thinker, tmp_path / "out", data=data)))
    assert found.verdict == "warning", found
    assert "give the teacher the tokens that such rows spell out" in str(found.next_step)


def test_the_same_tokens_that_cut_text_otherwise_are_told(
    teacher: Path, plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """No id differs, so it is no other tokenizer, but the student will read other tokens than it learnt from."""
    theirs = load_tokenizer(ModelSettings(model=str(teacher)))
    data = {"dataset": str(plain)}
    changes = {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}
    for name, normalizer in (("other", changes), ("same", None)):  # None is as good as NFC here
        tokenizer = edited(theirs.backend_tokenizer, lambda tree, to=normalizer: tree.update(normalizer=to))
        own = give_tokenizer(tmp_path / name, tokenizer, theirs)
        caplog.clear()
        source: Any = open_source(DataSettings(**data), own, vocab_size=307, context_tokens=512)
        assert len(rows_of(source)) == NUM_RECORDS
        run = settings(teacher, tmp_path / "out", data=data, student__tokenizer=str(tmp_path / name))
        (found,) = of("data", examine(run))
        said = "has the same tokens, but other normalizers: it cuts 7 of the first 7 rows into other tokens"
        assert (said in caplog.text) is (said in found.found) is (name == "other")
        assert found.verdict == ("warning" if name == "other" else "ok")
        assert (f"{plain}/tokenizer" in str(found.next_step)) is (name == "other")


def test_padding_alone_needs_no_setting_and_is_told(teacher: Path, plain: Path, tmp_path: Path):
    smaller = make_model(tmp_path / "smaller", seed=2, num_hidden_layers=1, vocab_size=302)
    make_tokenizer(smaller, added=[TOOL])
    (found,) = of("data", examine(settings(smaller, tmp_path / "out", data={"dataset": str(plain)})))
    assert "of this tokenizer; tails" in found.found
    assert (
        "307 ids for 301 tokens, the student has 302; what the teacher gave to padding beyond them is tail"
        in found.found
    )
    assert "vocabulary_sha256" not in opened(smaller, dataset=str(plain)).identity()


def test_the_setting_stands_beside_a_dataset_alone_and_changes_no_earlier_rollout(plain: Path):
    text = {"files": ["a.jsonl"]}
    for tree in ({"text": text, "map_vocabulary": True}, {"mix": [{"dataset": "a"}], "map_vocabulary": True}):
        with pytest.raises(ValueError, match="map_vocabulary is for a dataset's ids"):
            DataSettings.model_validate(tree)
    assert "map_vocabulary" not in data_identity(DataSettings(dataset=str(plain)))[0]
    assert data_identity(DataSettings(dataset=str(plain), map_vocabulary="drop"))[0]["map_vocabulary"] == "drop"
