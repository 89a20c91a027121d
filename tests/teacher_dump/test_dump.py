"""A whole dump: aligned with a plain forward pass at every position, resumable, and refused where it should be."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from shared.dataset import LogitDataset
from shared.errors import ConfigError, MismatchError, NonFiniteError, RecordError
from shared.rows import LogitRow
from shared.verification import verify
from teacher_dump import dump, transformers_engine
from teacher_dump.config import DumpSettings
from teacher_dump.transformers_engine import TransformersEngine
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import make_model, make_tokenizer


def all_rows(dataset: LogitDataset) -> list[LogitRow]:
    return [row for index in range(len(dataset.manifest.shards)) for row in dataset.read_shard(index)]


def test_every_position_equals_a_plain_full_forward_pass(sealed: LogitDataset, teacher_folder: Path):
    """The position of token t holds what the model says at input t-1: log p, tails and entropy, to 1e-5."""
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    num_checked = 0
    for row in all_rows(sealed):
        with torch.no_grad():
            logits_LV = model(torch.tensor(row.input_ids_L, dtype=torch.long)[None]).logits[0].double()
        logp_LV = torch.log_softmax(logits_LV, dim=1)
        positions = row.teacher.split([1] * row.num_positions)
        for t, position in zip(np.flatnonzero(row.label_mask_L), positions, strict=True):
            logp_V = logp_LV[t - 1]
            ids = torch.tensor(position.kept_ids_E, dtype=torch.long)
            assert set(ids.tolist()) == set(logp_V.topk(8).indices.tolist())
            np.testing.assert_allclose(position.kept_logp_E, logp_V[ids], atol=1e-5)
            assert position.realised_logp_P[0] == pytest.approx(float(logp_V[row.input_ids_L[t]]), abs=1e-5)
            assert position.entropy_P[0] == pytest.approx(float(-(logp_V.exp() * logp_V).sum()), abs=1e-5)
            rest_V = logp_V.clone()
            rest_V[ids] = -torch.inf
            for j, temperature in enumerate(sealed.manifest.temperatures):
                expected = float(torch.logsumexp(rest_V / temperature, 0))
                assert position.tail_logsum_PT[0, j] == pytest.approx(expected, abs=1e-5)
            num_checked += 1
    assert num_checked == sealed.manifest.total("positions") > 500


def test_every_position_of_every_family_of_heads(tmp_path: Path, chats: Path):
    """Softcap, scale and bias of the output head reach the stored values."""
    for family in ("gemma2_softcap", "cohere_scale", "granite_scale", "phi_bias", "llama_tied"):
        teacher = make_model(tmp_path / family, family=family, spread=2.0)
        make_tokenizer(teacher)
        dataset = sealed_dump(dump_settings(teacher, chats, tmp_path / f"{family}-out"))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            teacher, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        row = all_rows(dataset)[2]
        with torch.no_grad():
            logp_LV = torch.log_softmax(model(torch.tensor(row.input_ids_L, dtype=torch.long)[None]).logits[0], dim=1)
        expected = logp_LV[row.source_index_P, row.label_ids_P.astype(np.int64)]
        np.testing.assert_allclose(row.teacher.realised_logp_P, expected, atol=2e-5, err_msg=family)


def test_rows_come_in_the_order_of_the_input_with_their_ids(sealed: LogitDataset):
    assert [row.sample_id for row in all_rows(sealed)] == [f"chat-{n}" for n in range(23)]


def test_units_batches_and_chunks_change_nothing(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    settings = dump_settings(
        teacher_folder,
        chats,
        tmp_path / "out",
        unit_records=100,
        teacher__batch_tokens=1,
        teacher__chunk_positions=1000,
    )
    for one, other in zip(all_rows(sealed), all_rows(sealed_dump(settings)), strict=True):
        assert one.sample_id == other.sample_id
        np.testing.assert_array_equal(one.input_ids_L, other.input_ids_L)
        np.testing.assert_array_equal(one.teacher.kept_ids_E, other.teacher.kept_ids_E)
        np.testing.assert_allclose(one.teacher.kept_logp_E, other.teacher.kept_logp_E, atol=1e-5)
        np.testing.assert_allclose(one.teacher.tail_logsum_PT, other.teacher.tail_logsum_PT, atol=1e-5)


def test_a_sealed_dump_verifies_and_its_info_adds_up(sealed: LogitDataset):
    found, info = verify(sealed, deep=True), sealed.info()
    assert found.faults == []
    assert (
        (found.rows, found.positions)
        == (info["rows"], info["positions"])
        == (23, sum(r.num_positions for r in all_rows(sealed)))
    )
    assert info["kept_per_position"] == 8
    assert 0 < info["kept_mass"] < 1
    assert info["mean_kl_nats"] == pytest.approx(0, abs=1e-9)
    assert info["temperatures"] == [1.0, 2.0]
    assert not (sealed.folder / ".logitferry").exists()


def test_always_kept_tokens_are_in_every_position(teacher_folder: Path, chats: Path, tmp_path: Path):
    dataset = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out", keep__always=["<|im_end|>", "5"]))
    vocabulary = dataset.tokenizer().get_vocab()
    always = {vocabulary["<|im_end|>"], vocabulary["5"]}
    for row in all_rows(dataset):
        for position in row.teacher.split([1] * row.num_positions):
            assert always <= set(position.kept_ids_E.tolist())


def interrupt_after(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the unit after so many is being scored."""
    score = TransformersEngine.score

    def interrupted(self: Any, given: Any) -> Any:
        for number, rows in enumerate(given):
            if number == units:
                raise KeyboardInterrupt
            yield from score(self, [rows])

    monkeypatch.setattr(TransformersEngine, "score", interrupted)


def run_until(units: int, settings: DumpSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(units, patch)
        with pytest.raises(KeyboardInterrupt):
            sealed_dump(settings)


def test_running_again_goes_on_and_gives_the_same_shards(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    run_until(2, settings, monkeypatch)
    assert len(list((tmp_path / "out/data").iterdir())) == 2
    scored: list[int] = []
    score = TransformersEngine.score

    def counted(self: Any, units: Any) -> Any:
        return score(self, (scored.append(len(rows)) or rows for rows in units))

    monkeypatch.setattr(TransformersEngine, "score", counted)
    resumed = sealed_dump(settings)
    assert scored == [7, 2], "only the units that were not done"
    assert resumed.manifest.shards == sealed.manifest.shards, "the same bytes as the uninterrupted dump"


def test_a_shard_damaged_between_two_runs_is_done_again(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    run_until(3, settings, monkeypatch)
    shard = tmp_path / "out/data/part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert sealed_dump(settings).manifest.shards == sealed.manifest.shards


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep__k": 9}, "keep.k: was 8, is 9"),
        ({"temperatures": [1, 3]}, "temperatures"),
        ({"data__system": "Be brief."}, r"input\.settings\.system: was None, is 'Be brief\.'"),
        ({"teacher__max_model_len": 500}, r"input\.settings\.context_tokens: was 512, is 500"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_named(
    change: dict[str, Any], named: str, finished: bool, teacher_folder: Path, chats: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    with monkeypatch.context() as patch:
        if not finished:
            interrupt_after(1, patch)
        try:
            sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out"))
        except KeyboardInterrupt:
            assert not finished
    with pytest.raises(MismatchError, match=named):
        sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out", **change))


def test_another_teacher_or_other_input_is_refused(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    other = make_model(tmp_path / "other", seed=99)
    make_tokenizer(other)
    with pytest.raises(MismatchError, match=r"teacher\.weights_sha256"):
        sealed_dump(dump_settings(other, chats, sealed.folder))
    more = write_jsonl(tmp_path / "chats.jsonl", chat_records(24))
    with pytest.raises(MismatchError, match=r"input\.files"):
        sealed_dump(dump_settings(teacher_folder, more, sealed.folder))


def test_a_bad_record_is_found_before_the_teacher_is_loaded(teacher_folder: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(transformers_engine, "TransformersEngine", None)
    records = chat_records(9)
    records[8]["messages"][0]["content"] = 17
    files = write_jsonl(tmp_path / "chats.jsonl", records)
    with pytest.raises(RecordError, match=r"chats\.jsonl:9: messages\[0\].*'content'.*expected a string, got int 17"):
        sealed_dump(dump_settings(teacher_folder, files, tmp_path / "out"))


def test_rows_longer_than_the_teachers_context_are_an_error_or_counted(teacher_folder: Path, tmp_path: Path):
    records = chat_records(8)
    records[3]["messages"][-1]["content"] = "fox " * 600
    files = write_jsonl(tmp_path / "chats.jsonl", records)
    with pytest.raises(RecordError, match=r"chats\.jsonl:4: \d+ tokens, but the model's context is 512"):
        sealed_dump(dump_settings(teacher_folder, files, tmp_path / "out"))
    dataset = sealed_dump(dump_settings(teacher_folder, files, tmp_path / "out", data__on_too_long="drop"))
    assert dataset.manifest.inputs[0].tally["dropped_too_long"] == 1
    assert [row.sample_id for row in all_rows(dataset)] == [f"chat-{n}" for n in range(8) if n != 3]


def test_a_unit_whose_rows_are_all_dropped_leaves_no_shard(teacher_folder: Path, tmp_path: Path):
    records = [{"id": f"empty-{n}", "messages": [{"role": "user", "content": "Hello?"}]} for n in range(7)]
    files = write_jsonl(tmp_path / "chats.jsonl", records + chat_records(3))
    dataset = sealed_dump(dump_settings(teacher_folder, files, tmp_path / "out"))
    assert [shard.path for shard in dataset.manifest.shards] == ["data/part-00001.parquet"]
    assert dataset.manifest.inputs[0].tally["dropped_no_label"] == 7
    assert verify(dataset, deep=True).faults == []


def test_a_teacher_that_gives_nan_names_the_row(chats: Path, tmp_path: Path):
    teacher = make_model(tmp_path / "teacher")
    make_tokenizer(teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    settings = dump_settings(teacher, chats, tmp_path / "out")
    with torch.no_grad():
        # The embedding of the "5" in record chat-5 alone, so that the model's start-up check passes.
        tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("5")] = torch.nan
    model.save_pretrained(teacher)
    with pytest.raises(NonFiniteError, match=r"row 'chat-5', token \d+: log p of the realised token is nan"):
        sealed_dump(settings)


def test_an_unknown_always_kept_token_is_refused(teacher_folder: Path, chats: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no token '<\|nope\|>'"):
        sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out", keep__always=["<|nope|>"]))


def test_a_tokenizer_that_exceeds_the_teachers_vocabulary_is_refused(chats: Path, tmp_path: Path):
    teacher = make_model(tmp_path / "teacher", vocab_size=200)
    make_tokenizer(teacher)
    with pytest.raises(MismatchError, match="the teacher's vocabulary ends at 200"):
        sealed_dump(dump_settings(teacher, chats, tmp_path / "out"))


@pytest.mark.parametrize("temperature", [0, -1, 1000, float("nan"), 1.0000001])
def test_a_temperature_that_cannot_be_declared_is_refused(temperature: float, tmp_path: Path):
    with pytest.raises(ValueError, match="temperatures lie between"):
        dump_settings(tmp_path, tmp_path, tmp_path, temperatures=[1, temperature])


def test_one_is_always_among_the_temperatures():
    tree = {"teacher": {"model": "m"}, "data": {"files": ["f"]}, "output": "o", "temperatures": [4, 2, 2]}
    assert DumpSettings.model_validate(tree).temperatures == [1.0, 2.0, 4.0]


def test_what_a_killed_writer_left_does_not_reach_the_dataset(teacher_folder: Path, chats: Path, tmp_path: Path):
    (tmp_path / "out/.logitferry").mkdir(parents=True)
    leftovers = [tmp_path / "out" / name for name in (".writing-part-00000.parquet.4711", ".writing-plan.json.4711")]
    for leftover in leftovers:
        leftover.write_bytes(b"half a file")
    an_hour_ago = time.time() - 3601
    os.utime(leftovers[1], (an_hour_ago, an_hour_ago))  # a younger one might be of who seals just now
    dataset = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out"))
    assert verify(dataset, deep=True).faults == []
    assert not any(".writing-" in path for path in dataset.manifest.files)
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_folder_that_is_not_ours_is_left_alone(teacher_folder: Path, chats: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/README.md").write_text("chapter 1")
    with pytest.raises(ConfigError, match="is not empty and holds none of"):
        sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "thesis"))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["README.md"]
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "thesis/README.md"))


@pytest.mark.parametrize("changed", [11, 12])
def test_input_that_changes_while_it_is_dumped_is_found_before_it_is_scored(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int
):
    """A record more in the last unit, or another one there; what was planned before is scored, and nothing else."""
    files = write_jsonl(tmp_path / "chats.jsonl", chat_records(11))
    make_plan = dump.make_plan

    def change(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        records = chat_records(changed)
        records[10]["messages"][-1]["content"] += "!" * (changed == 11)
        write_jsonl(files, records)
        return plan

    monkeypatch.setattr(dump, "make_plan", change)
    settings = dump_settings(teacher_folder, files, tmp_path / "out")
    with pytest.raises(MismatchError, match="unit 1, from record 7 on: its rows are not those of the plan"):
        sealed_dump(settings)
    assert not (tmp_path / "out/manifest.json").exists()
    assert len(list((tmp_path / "out/data").iterdir())) <= 1
    with pytest.raises(MismatchError, match=r"input\.files: was"):
        sealed_dump(settings)
    write_jsonl(files, chat_records(11))
    assert sealed_dump(settings).manifest.total("rows") == 11


def test_units_cannot_be_cut_anew_in_the_middle_of_a_dump(
    teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_until(1, dump_settings(teacher_folder, chats, tmp_path / "out"), monkeypatch)
    with pytest.raises(MismatchError, match="made with unit_records 7, now 5"):
        sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out", unit_records=5))


def test_what_became_of_the_records_stands_in_the_manifest(teacher_folder: Path, tmp_path: Path):
    """A bad record, one that is too long and one without an answer: counted, and the units stay whole."""
    records = chat_records(20)
    records[3] = {"id": "bad", "messages": [{"role": "assistant", "content": "unprompted"}]}
    records[8] = {"id": "silent", "messages": [{"role": "user", "content": "?"}]}
    files = write_jsonl(tmp_path / "chats.jsonl", records)
    dataset = sealed_dump(
        dump_settings(
            teacher_folder,
            files,
            tmp_path / "out",
            data__on_bad_record="skip",
            data__on_too_long="truncate",
            data__max_tokens=120,
        )
    )
    rows = all_rows(dataset)
    lost = {"bad", "silent"}
    assert {row.sample_id for row in rows} <= {record["id"] for record in records} - lost
    tally = dataset.manifest.inputs[0].tally
    assert tally["records"] == 20
    assert tally["skipped_bad"] == 1
    assert tally["truncated"] > 0
    assert tally["rows"] == len(rows) == 20 - 1 - tally["dropped_no_label"]
    assert max(row.num_tokens for row in rows) == 120
    assert dataset.info()["inputs"][0]["tally"] == tally


def test_ready_tokens_are_dumped_to_the_token(sealed: LogitDataset, teacher_folder: Path, tmp_path: Path):
    """As a student's rollouts come back; and a dataset's own shards are such files."""
    shards = dump_settings(teacher_folder, sealed.folder / "data", tmp_path / "again")
    again = sealed_dump(shards)
    for row, other in zip(all_rows(sealed), all_rows(again), strict=True):
        assert row.sample_id == other.sample_id
        assert row.input_ids_L.tolist() == other.input_ids_L.tolist()
        assert row.label_mask_L.tolist() == other.label_mask_L.tolist()
        np.testing.assert_allclose(row.teacher.realised_logp_P, other.teacher.realised_logp_P, atol=1e-5)


def test_tokens_and_plain_text_need_no_chat_template(teacher_folder: Path, tmp_path: Path):
    teacher = make_model(tmp_path / "teacher", seed=1)
    make_tokenizer(teacher)
    (teacher / "chat_template.jinja").unlink()
    files = write_jsonl(tmp_path / "text.jsonl", [{"text": "It is five."}, {"text": "Tell me a story."}])
    dataset = sealed_dump(dump_settings(teacher, files, tmp_path / "out"))
    assert dataset.manifest.chat_template_sha256 is None
    assert [row.num_positions for row in all_rows(dataset)] == [row.num_tokens - 1 for row in all_rows(dataset)]
    assert verify(LogitDataset.open(tmp_path / "out"), deep=True).faults == []


def test_a_dump_goes_on_with_other_processes(teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any):
    """How many processes tokenize is no part of what a dump is."""
    run_until(2, dump_settings(teacher_folder, chats, tmp_path / "out"), monkeypatch)
    resumed = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out", data__processes=2))
    assert [row.sample_id for row in all_rows(resumed)] == [f"chat-{n}" for n in range(23)]
