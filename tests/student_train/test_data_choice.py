"""What manner and curriculum make of a run: which rows its steps have, what it is then, what it says."""

import json
import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedDataError, MismatchError
from shared.models_config import ModelSettings
from shared.pretrained import load_tokenizer
from student_train.config import TrainSettings
from student_train.data_config import SourceSettings
from student_train.doctor.examination import examine
from student_train.estimate.estimation import estimate
from student_train.ranks import Ranks
from student_train.sources import open_source
from student_train.train import Trainer, finished_run
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.student_train.test_resume import interrupt_in_step
from tests.student_train.test_train import log_of, settings

NUM_ROWS = 24
THINKING = {f"row-{n}" for n in range(0, NUM_ROWS, 3)}
EASY = {"difficulty": "length", "order": "easy_to_hard"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third row thinks before it answers."""
    records = []
    for n, record in enumerate(chat_records(NUM_ROWS)):
        last = record["messages"][-1]
        if f"row-{n}" in THINKING:
            last["content"] = f"<think>Hm, {n}.</think>{last['content']}"
        records.append(record | {"id": f"row-{n}", "topic": "slow" if n % 2 else "quick"})
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", records)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, texts: Path) -> Path:
    output = tmp_path_factory.mktemp("dumped") / "out"
    changes = {"unit_records": 5, "data__source_field": "topic", "teacher__chunk_positions": 999}
    return sealed_dump(dump_settings(teacher_folder, texts, output, **changes)).folder


@pytest.fixture(scope="module")
def whole(dataset: Path) -> dict[str, Any]:
    """Every row by its id, as the dataset has it."""
    opened = LogitDataset.open(dataset)
    return {row.sample_id: row for index in range(len(opened.manifest.shards)) for row in opened.read_shard(index)}


@pytest.fixture
def trainer(student_folder: Path, tmp_path: Path):
    def make(name: str = "out", **changes: Any) -> Trainer:
        return Trainer(settings(student_folder, tmp_path / name, **changes))

    return make


def ids_of(trainer: Trainer, first: int, last: int) -> list[list[str]]:
    return [[row.sample_id for row in each.rows] for each in trainer.data.stream.steps(first, last)]


def flat(steps: list[list[str]]) -> list[str]:
    return [name for step in steps for name in step]


def held_out(trainer: Trainer) -> set[str]:
    return {row.sample_id for each in trainer.data.held_out for rows in each.in_order(99) for row in rows}


@pytest.mark.parametrize("kind", ["dataset", "text"])
@pytest.mark.parametrize("take", ["reasoning", "fast"])
def test_one_manner_is_all_that_is_trained_on_and_held_out(
    kind: str, take: str, trainer: Any, dataset: Path, texts: Path, caplog: pytest.LogCaptureFixture
):
    data = {"dataset": str(dataset)} if kind == "dataset" else {"text": {"files": [str(texts)]}}
    caplog.set_level(logging.INFO, "logitferry")
    every = trainer(
        data={**data, "manner": take},
        held_out__fraction=0.3,
        rows_per_step=2,
        loss__kd_weight=0.5 * (kind == "dataset"),
    )
    wanted = THINKING if take == "reasoning" else {f"row-{n}" for n in range(NUM_ROWS)} - THINKING
    trained = flat(ids_of(every, 0, -(-every.data.num_rows // 2)))
    assert set(trained) | held_out(every) == wanted
    assert set(trained).isdisjoint(held_out(every))
    assert every.data.num_rows == len(wanted) - len(held_out(every))
    [record] = every.data.record()
    assert record["manners"] == {"reasoning": 8, "fast": 16}
    assert ": 8 reasoning and 16 fast rows" in caplog.text


def test_manners_by_weight_have_their_shares_of_every_step(trainer: Any, dataset: Path, texts: Path):
    alone = trainer("alone", data={"dataset": str(dataset), "manner": {"reasoning": 3, "fast": 1}})
    for step in ids_of(alone, 0, 12):
        assert sum(name in THINKING for name in step) == 6
    other = write_jsonl(texts.parent / "other.jsonl", chat_records(10))
    parts = [
        {"text": {"files": [str(texts)]}, "manner": {"take": {"fast": 0.1, "reasoning": 0.3}}},
        {"text": {"files": [str(other)]}},
    ]
    weighed = [part | {"weight": 1} for part in parts]
    mixed = trainer("mixed", data={"mix": weighed}, loss__kd_weight=0)
    for step in ids_of(mixed, 0, 12):
        assert Counter("other" if "chat" in name else name in THINKING for name in step) == {
            "other": 4,
            True: 3,
            False: 1,
        }
    free = trainer("free", data={"mix": parts}, loss__kd_weight=0, rows_per_step=34)
    counts = Counter("other" if "chat" in name else name in THINKING for name in ids_of(free, 0, 1)[0])
    assert counts == {"other": 10, True: 18, False: 6}, "without weights the source has as many as it has rows"


def test_sources_tell_manners_apart_where_they_are_asked(trainer: Any, dataset: Path):
    manner = {"take": "reasoning", "by": "source", "reasoning_sources": ["slow"]}
    found = trainer(data={"dataset": str(dataset), "manner": manner})
    assert set(flat(ids_of(found, 0, 2))) == {f"row-{n}" for n in range(1, NUM_ROWS, 2)}
    manner["reasoning_sources"] = ["slo"]
    with pytest.raises(ConfigError, match=r"'slo' is no source of .*\n.*did you mean slow\?"):
        trainer(data={"dataset": str(dataset), "manner": manner})


def test_a_manner_of_which_there_is_no_row_is_refused_with_the_counts(trainer: Any, dataset: Path):
    manner = {"take": "reasoning", "tags": ["[thought]", "[/thought]"]}
    with pytest.raises(ConfigError, match="no row is reasoning: 0 reasoning and 24 fast rows"):
        trainer(data={"dataset": str(dataset), "manner": manner})
    with pytest.raises(ConfigError, match="no reasoning row is left to train on"):
        trainer(
            data={
                "dataset": str(dataset),
                "manner": {"reasoning": 1, "fast": 1},
                "curriculum": {"difficulty": "length", "values": [90, None]},
            },
            rows_per_step=1,
        )


def test_what_is_known_of_rows_is_what_stands_in_them(dataset: Path, whole: dict[str, Any], student_folder: Path):
    """Also where rows are cut, or too long and left out."""
    tokenizer = load_tokenizer(ModelSettings(model=str(student_folder)))
    for context, policy in ((None, "error"), (140, "truncate"), (140, "drop")):
        said = {
            "dataset": str(dataset),
            "on_too_long": policy,
            "curriculum": EASY,
            "manner": {"reasoning": 1, "fast": 1},
        }
        source: Any = open_source(
            SourceSettings.model_validate(said), tokenizer, vocab_size=307, context_tokens=context
        )
        blocks = range(len(source.sample_ids))
        outlines = [row for index in blocks for row in source.read_outline(index)]
        rows = [row for index in blocks for row in source.read_block(index)]
        facts = source.facts
        assert [row.sample_id for row in outlines] == [row.sample_id for row in rows]
        assert {"error": len(rows) == NUM_ROWS, "truncate": len(rows) > 9, "drop": len(rows) == 8}[policy]
        for n, (row, outline) in enumerate(zip(rows, outlines, strict=True)):
            for name in ("input_ids_L", "label_mask_L"):
                np.testing.assert_array_equal(getattr(row, name), getattr(outline, name))
            assert (row.source, row.num_tokens) == (outline.source, facts.num_tokens_R[n])
            assert facts.num_positions_R[n] == row.num_positions == outline.teacher.num_positions
            teacher = whole[row.sample_id].teacher
            count = row.num_positions
            assert facts.teacher_nll_R[n] == pytest.approx(-teacher.realised_logp_P[:count].mean(), rel=1e-6)
            assert facts.teacher_entropy_R[n] == pytest.approx(teacher.entropy_P[:count].mean(), rel=1e-6)
            if context is None:
                assert facts.thinks_R[n] == (row.sample_id in THINKING)


def test_rows_are_looked_at_only_where_something_asks_for_it_and_then_without_kept_ids(
    trainer: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    looks: list[int] = []
    outlines = LogitDataset.outlines
    monkeypatch.setattr(LogitDataset, "outlines", lambda self, index: looks.append(index) or outlines(self, index))
    monkeypatch.setattr(LogitDataset, "row_groups", None)  # kept ids are not decoded before the first step
    scores = write_jsonl(tmp_path / "scores.jsonl", [{"id": f"row-{n}", "hard": n} for n in range(NUM_ROWS)])
    by_scores = {"scores": str(scores), "difficulty": "hard", "order": "easy_to_hard"}
    for n, chosen in enumerate(({}, {"curriculum": by_scores})):
        trainer(f"quiet-{n}", data={"dataset": str(dataset), **chosen})
    assert not looks
    trainer("curious", data={"dataset": str(dataset), "curriculum": EASY})
    assert sorted(looks) == list(range(5)), "each block once"


def test_damage_is_met_when_rows_are_looked_at(trainer: Any, teacher_folder: Path, texts: Path, tmp_path: Path):
    damaged = sealed_dump(dump_settings(teacher_folder, texts, tmp_path / "damaged", unit_records=99)).folder
    shard = damaged / "data/part-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"part-00000\.parquet: damaged"):
        trainer(data={"dataset": str(damaged), "manner": "fast"})


def test_easy_to_hard_trains_on_every_row_of_the_epoch_by_difficulty(
    trainer: Any, dataset: Path, whole: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "logitferry")
    found = trainer(data={"dataset": str(dataset), "curriculum": EASY}, rows_per_step=6, steps=8)
    for epoch in (0, 4):
        names = flat(ids_of(found, epoch, epoch + 4))
        assert set(names) == whole.keys()
        lengths = [whole[name].num_positions for name in names]
        assert lengths == sorted(lengths)
    assert "24 rows, 24 taken; order easy_to_hard keeps all shards in memory, about" in caplog.text


def test_competence_grows_with_the_steps_of_the_run(trainer: Any, dataset: Path, whole: dict[str, Any]):
    curriculum = {"difficulty": "teacher_nll", "order": "competence", "pace": {"begin": 0.25, "until": 0.5}}
    found = trainer(data={"dataset": str(dataset), "curriculum": curriculum}, rows_per_step=6, steps=40)
    [pace] = found.data.stream.order.paces
    assert pace.growing_rows == 120, "half of the run's rows"
    nll = {name: -row.teacher.realised_logp_P.mean(dtype=np.float64) for name, row in whole.items()}
    easiest = sorted(nll.values())
    for number, name in enumerate(flat(ids_of(found, 0, 20))):
        share = (0.25**2 + (1 - 0.25**2) * number / 120) ** 0.5
        assert nll[name] <= easiest[max(1, int(share * NUM_ROWS)) - 1] + 1e-9
    assert Counter(flat(ids_of(found, 20, 24))) == dict.fromkeys(whole, 1)


def test_a_curriculum_is_of_rows_that_are_trained_on(trainer: Any, dataset: Path, whole: dict[str, Any]):
    curriculum = {"difficulty": "length", "values": [80, None]}
    found = trainer(data={"dataset": str(dataset), "curriculum": curriculum}, held_out__fraction=0.3, rows_per_step=1)
    kept_out = held_out(found)
    assert min(whole[name].num_positions for name in kept_out) < 80
    trained = set(flat(ids_of(found, 0, found.data.num_rows)))
    assert trained == {name for name, row in whole.items() if row.num_positions >= 80} - kept_out
    dropped = dict(found.data.dropped())
    assert dropped == dict.fromkeys(whole.keys() - trained - kept_out, "easier than length 80")
    [record] = found.data.record()
    assert record["rows"] == {
        "rows": NUM_ROWS - len(kept_out),
        "taken": len(trained),
        "dropped": {"easier than length 80": len(dropped)},
    }
    assert json.loads(json.dumps(record)) == record


def test_a_run_is_another_with_another_curriculum_or_other_scores(trainer: Any, dataset: Path, tmp_path: Path):
    def scores(name: str, shift: int) -> str:
        records = [{"id": f"row-{n}", "hard": (n + shift) % NUM_ROWS} for n in range(NUM_ROWS)]
        return str(write_jsonl(tmp_path / f"{name}.jsonl", records))

    def said(**curriculum: Any) -> dict[str, Any]:
        return {"curriculum": {"difficulty": "hard", "order": "easy_to_hard"} | curriculum}

    data = {"plain": {}, "manner": {"manner": {"reasoning": 1, "fast": 2}}, "length": {"curriculum": EASY}}
    data |= {"fast": {"manner": "fast"}, "one": said(scores=scores("one", 0)), "shifted": said(scores=scores("two", 5))}
    data |= {"band": said(scores=scores("one", 0), quantiles=[0.1, 0.9])}
    runs = {name: trainer(name, data={"dataset": str(dataset), **each}).data for name, each in data.items()}
    identities = {name: json.dumps(run.identity(), sort_keys=True) for name, run in runs.items()}
    digests = {name: run.rows_digest(1) for name, run in runs.items()}
    assert len(set(identities.values())) == len(set(digests.values())) == len(runs)
    assert runs["plain"].identity() == [{"manifest_sha256": LogitDataset.open(dataset).identity(), "weight": None}]
    again = trainer("again", data={"dataset": str(dataset), **said(scores=scores("moved", 0))}).data
    assert json.dumps(again.identity(), sort_keys=True) == identities["one"], "where the file lies is not what it says"
    assert again.rows_digest(1) == digests["one"]


def test_steps_of_other_rows_at_the_same_places_are_not_the_same(trainer: Any, texts: Path):
    """Places are counted among the rows that were chosen."""
    chosen = [{"quantiles": [0, 0.49]}, {"quantiles": [0.51, 1]}]
    data = [{"text": {"files": [str(texts)]}, "curriculum": {"difficulty": "length", **each}} for each in chosen]
    easy, hard = (trainer(str(n), data=each, loss__kd_weight=0).data for n, each in enumerate(data))
    one, other = (each.stream.order.step(0) for each in (easy, hard))
    assert one.row_R.tolist() == other.row_R.tolist()
    assert easy.rows_digest(0) != hard.rows_digest(0)


def test_doctor_and_estimate_count_the_rows_that_are_taken(student_folder: Path, dataset: Path, tmp_path: Path):
    curriculum = {"difficulty": "length", "values": [80, None], "order": "easy_to_hard"}
    said = settings(
        student_folder, tmp_path / "out",
        data={"dataset": str(dataset), "manner": {"reasoning": 1, "fast": 1}, "curriculum": curriculum},
    )  # fmt: skip
    found = estimate(said, memory_bytes=1 << 34)
    opened = LogitDataset.open(dataset)
    rows = [row for index in range(len(opened.manifest.shards)) for row in opened.read_shard(index)]
    taken = [row for row in rows if row.num_positions >= 80]
    assert 0 < len(taken) < NUM_ROWS
    assert asdict(found)["rows"] == len(taken)
    steps = [each for each in examine(said) if each.check == "steps"]
    dropped = NUM_ROWS - len(taken)
    assert f"an epoch has {len(taken)} rows, 0 held out, {dropped} dropped by the curriculum" in steps[0].found


def test_doctor_looks_at_scores_of_text(student_folder: Path, texts: Path, tmp_path: Path):
    scores = write_jsonl(tmp_path / "scores.jsonl", [{"id": "row-1", "nl": 1}])
    curriculum = {"scores": str(scores), "difficulty": "nll", "order": "easy_to_hard"}
    data = {"text": {"files": [str(texts)]}, "curriculum": curriculum}
    findings = examine(settings(student_folder, tmp_path / "out", data=data, loss__kd_weight=0))
    assert any(each.verdict == "mend" and "has no column 'nll'" in each.found for each in findings)


def test_a_run_by_difficulty_goes_on_where_it_stopped_and_not_with_other_scores(
    student_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    records = [{"id": f"row-{n}", "hard": n * 7 % NUM_ROWS} for n in range(NUM_ROWS)]
    scores = write_jsonl(tmp_path / "scores.jsonl", records)
    curriculum = {"scores": str(scores), "difficulty": "hard", "order": "competence", "pace": {"begin": 0.3}}
    data = {"dataset": str(dataset), "manner": {"reasoning": 1, "fast": 1}, "curriculum": curriculum}

    def said(name: str, **changes: Any) -> TrainSettings:
        return settings(student_folder, tmp_path / name, data=data, steps=8, rows_per_step=4, **changes)

    Trainer(said("alone")).run()
    with monkeypatch.context() as patched:
        interrupt_in_step(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            Trainer(said("out")).run()
    kept = scores.read_bytes()
    write_jsonl(scores, [record | {"hard": -record["hard"]} for record in records])
    with pytest.raises(MismatchError, match=r"scores_sha256"):
        Trainer(said("out")).run()
    with pytest.raises(MismatchError, match=r"was trained with scores of .* of sha256 \w{16}…, which is \w{16}… now"):
        finished_run(said("alone"))
    scores.write_bytes(kept)
    Trainer(said("out", loader_threads=3, shuffle_blocks=16)).run()
    losses = [[entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("alone", "out")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_what_a_curriculum_drops_lies_beside_the_run_with_its_reasons(
    student_folder: Path, dataset: Path, tmp_path: Path
):
    data = {"dataset": str(dataset), "curriculum": {"difficulty": "teacher_nll", "quantiles": [0.0, 0.5]}}
    result = Trainer(settings(student_folder, tmp_path / "out", data=data, steps=1, rows_per_step=4)).run()
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    (counts,) = [source["rows"] for source in result["data"]]
    assert counts["taken"] + len(dropped) == counts["rows"] == NUM_ROWS
    assert {each["reason"]: len(dropped) for each in dropped} == counts["dropped"]
    assert all(each["reason"].startswith("harder than teacher_nll") for each in dropped)


def test_deduplicating_leaves_out_what_is_held_out_under_another_id(student_folder: Path, tmp_path: Path):
    records = [record | {"id": f"{name}-{n}"} for n, record in enumerate(chat_records(60)) for name in "ab"]
    text = {"files": [str(write_jsonl(tmp_path / "twice.jsonl", records))]}
    data = {"text": text, "curriculum": {"deduplicate": True}}
    run = settings(student_folder, tmp_path / "out", data=data, loss__kd_weight=0, held_out__fraction=0.3, steps=1)
    trainer = Trainer(run)
    trained, held_out = (
        {row.input_ids_L.tobytes() for selection in selections for rows in selection.in_order(99) for row in rows}
        for selections in (trainer.data._taken.selections, trainer.data.held_out)
    )
    assert trained
    assert held_out
    assert not trained & held_out
    assert any("held out" in reason for _, reason in trainer.data.dropped())


def test_ranks_that_see_unlike_rows_do_not_begin(student_folder: Path, dataset: Path, tmp_path: Path):
    class Two(Ranks):
        def gathered(self, said: bytes) -> list[bytes]:
            return [said, b"another"]

    run = settings(student_folder, tmp_path / "out", data__dataset=str(dataset))
    with pytest.raises(MismatchError, match="the ranks see unlike data"):
        Trainer(run, Two()).run()
