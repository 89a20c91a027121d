"""A rollout from a config to files that a teacher scores; stopped, killed and shared out, it is the same rollout."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

import student_train.cli
from shared.errors import ConfigError, DamagedDataError, LogitferryError, MismatchError, NonFiniteError
from shared.workers import Share
from student_train.eval.config import GenerateSettings
from student_train.eval.exact_match import draw, exact_match, questions_of
from student_train.eval.generation import Writer
from student_train.rollout.ledger import DATA, DROPPED
from student_train.rollout.run import run_rollout
from tests.data import dump_settings, sealed_dump, write_jsonl
from tests.killed import Steps, killed_at, traced
from tests.student_train.eval.conftest import chat
from tests.student_train.eval.test_exact_match import source_of
from tests.student_train.rollout.conftest import ANSWER

KEEPS_ALL = {"truncated": True}


def replies_in(output: str, folder: str = DATA) -> list[dict[str, Any]]:
    files = sorted(Path(output, folder).glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def files_of(output: str) -> dict[str, bytes]:
    """What does not tell when and where it was made."""
    found = {path.relative_to(output).as_posix(): path for path in Path(output).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name == "plan.json" or "part-" in name}


@pytest.fixture
def count_batches(monkeypatch):
    """How many batches were written; `at` is called before each, with its number."""
    write, counted = Writer._write_batch, {"batches": 0, "at": lambda _: None}

    def write_batch(self: Writer, *arguments: Any) -> Any:
        counted["batches"] += 1
        counted["at"](counted["batches"])
        return write(self, *arguments)

    monkeypatch.setattr(Writer, "_write_batch", write_batch)
    return counted


def test_greedy_rollouts_are_the_replies_of_an_evaluation_with_its_marks(settings, learnt_folder, asked):
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(learnt_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(learnt_folder)
    generate = GenerateSettings(max_new_tokens=20, answer=ANSWER)
    questions = questions_of(draw([source_of(asked, tokenizer)], None, 0), model, tokenizer, generate)
    evaluated = exact_match(questions, model, tokenizer, generate, context_tokens=512, compute_dtype=None)

    student = {"student": {"model": str(learnt_folder)}, "max_new_tokens": 20}
    greedy = settings(**student, temperature=0, samples=1, verify={"answer": ANSWER})
    result = run_rollout(greedy)
    written = {each["prompt_id"]: each for each in replies_in(greedy.output)}
    assert {each.sample_id: (each.reply, each.is_right) for each in evaluated.examples} == {
        name: (each["reply"], each["right"]) for name, each in written.items() if name != "no-answer"
    }
    assert written["no-answer"]["right"] is None, "nobody can say"
    assert result["pass_rate"] == evaluated.share == 4 / 6
    assert (result["prompts"], result["uncheckable"], result["kept"]) == (7, 1, 7)


def test_a_reply_is_the_prompts_ids_and_its_own_with_what_ended_it(settings, learnt_folder, asked, tokenizer):
    known = settings(student={"model": str(learnt_folder)}, max_new_tokens=20, samples=3)
    result = run_rollout(known)
    kept, (row,) = replies_in(known.output), source_of(asked, tokenizer).read_block(0)[1:2]
    for sample, reply in enumerate(each for each in kept if each["prompt_id"] == row.sample_id):
        prompt = reply["input_ids"][: reply["label_mask"].index(True)]
        assert prompt == row.input_ids_L[: len(prompt)].tolist()
        assert not row.label_mask_L[: len(prompt)].any()
        assert row.label_mask_L[len(prompt)]
        own = [token for token, mark in zip(reply["input_ids"], reply["label_mask"], strict=True) if mark]
        assert own == reply["input_ids"][len(prompt) :]
        assert own[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.decode(own[:-1]) == reply["reply"]
        assert reply["sample_id"] == f"sum-1~{result['student']}.{sample}"
        assert reply["source"] == f"student-{result['student']}/asked.jsonl"
        assert (reply["student"], reply["sample"]) == (result["student"], sample)
    assert len(kept) == result["kept"] == 21
    assert len({each["sample_id"] for each in kept}) == 21


def test_what_is_dropped_is_written_apart_and_counted(settings):
    """A student that knows nothing ends one reply in a while."""
    all_of_it = settings(max_new_tokens=60, samples=40, batch_rows=80, verify={"answer": "(fox|[0-9])"})
    result = run_rollout(all_of_it)
    kept, dropped = replies_in(all_of_it.output), replies_in(all_of_it.output, DROPPED)
    assert len(kept) == result["kept"] > 5
    assert len(kept) + len(dropped) == result["replies"] == 280
    assert all(each["is_cut"] for each in dropped if each["reason"] == "truncated")
    assert {each["reason"] for each in dropped} >= {"truncated", "unknown_token"}
    assert result["dropped"] == {
        reason: sum(each["reason"] == reason for each in dropped) for reason in result["dropped"]
    }
    marked = [each["right"] for each in kept + dropped if each["right"] is not None]
    assert result["pass_rate"] == sum(marked) / len(marked), "of all, whatever became of them"
    assert len(marked) == 240


def test_only_what_is_right_is_kept_and_what_cannot_be_marked_is_not_asked(settings, learnt_folder):
    known = {"student": {"model": str(learnt_folder)}, "max_new_tokens": 20}
    strict = settings(**known, verify={"answer": ANSWER}, keep={"wrong": False})
    result = run_rollout(strict)
    assert (result["prompts"], result["right"], result["dropped"]) == (6, 8, {"wrong": 4})
    assert all(each["right"] for each in replies_in(strict.output))
    assert {each["prompt_id"] for each in replies_in(strict.output, DROPPED)} >= {"sum-0", "sum-1"}


def test_a_teacher_scores_the_very_ids(settings, learnt_folder, teacher_folder, tmp_path):
    known = settings(student={"model": str(learnt_folder)}, max_new_tokens=20)
    result = run_rollout(known)
    dump = dump_settings(teacher_folder, Path(known.output, DATA), tmp_path / "dump", data__source_field="source")
    dataset = sealed_dump(dump)
    rows = [row for shard in range(len(dataset.manifest.shards)) for row in dataset.read_shard(shard)]
    written = replies_in(known.output)
    assert [(row.sample_id, row.source, row.input_ids_L.tolist(), row.label_mask_L.tolist()) for row in rows] == [
        (each["sample_id"], each["source"], each["input_ids"], each["label_mask"]) for each in written
    ]
    assert len(rows) == result["kept"] == 14

    again = settings(data={"dataset": str(dump.output)}, output=str(tmp_path / "again"), keep=KEEPS_ALL, samples=1)
    asked_again = run_rollout(again)
    assert (asked_again["prompts"], asked_again["repeated"]) == (7, 7), "a prompt is asked once, whoever answered it"
    prompts = {each["prompt_id"]: each["input_ids"][: each["label_mask"].index(True)] for each in written}
    for each in replies_in(again.output):
        assert each["input_ids"][: each["label_mask"].index(True)] == prompts[each["prompt_id"]]
        assert each["source"] == f"student-{asked_again['student']}/student-{result['student']}/asked.jsonl"


def test_a_killed_rollout_goes_on_to_the_same_bytes(settings, tmp_path):
    """Wherever it was: before the plan, between a unit's files and its record, before rollout.json."""
    whole = settings(keep={"truncated": True, "nll": [None, 5.0]})
    steps = Steps()
    with traced(steps):
        result = run_rollout(whole)
    expected, last = files_of(whole.output), len(steps.names)
    assert {name.split("/")[0] for name in expected} == {"plan.json", DATA, DROPPED}
    covered = []
    for number, step in enumerate([3, last // 5, last // 2 + 1, 3 * last // 4, last - 3]):
        killed = settings(keep={"truncated": True, "nll": [None, 5.0]}, output=str(tmp_path / f"killed-{number}"))
        assert killed_at(step, lambda killed=killed: run_rollout(killed))
        covered.append(steps.names[step - 1])
        again = run_rollout(killed)
        assert files_of(killed.output) == expected
        timeless = {name: value for name, value in again.items() if name not in ("seconds", "tokens_per_s")}
        assert timeless == {name: result[name] for name in timeless}
    assert len(set(covered)) == 5


def test_units_that_are_done_are_not_done_again(settings, count_batches):
    first = settings(keep=KEEPS_ALL)
    result = run_rollout(first)
    expected, count_batches["batches"] = files_of(first.output), 0
    assert run_rollout(first) == result
    assert count_batches["batches"] == 0
    part = Path(first.output, DATA, "part-00001.jsonl")
    part.write_bytes(part.read_bytes().replace(b"sum-2", b"sum-9"))
    Path(first.output, "units", "00003.json").unlink()
    run_rollout(first)
    assert count_batches["batches"] == 2 + 1, "of four and of two replies, three at a time"
    assert files_of(first.output) == expected


def test_a_file_that_a_stopped_unit_left_is_not_taken_for_its_own(settings):
    """As where another device's last digits drop all that it keeps here."""
    none_kept = settings(keep={"nll": [None, 0.1], "truncated": True})
    assert run_rollout(none_kept)["kept"] == 0
    assert not Path(none_kept.output, DATA).exists()
    left = Path(none_kept.output, DATA, "part-00002.jsonl")
    left.parent.mkdir()
    left.write_bytes(Path(none_kept.output, DROPPED, "part-00002.jsonl").read_bytes())
    Path(none_kept.output, "units", "00002.json").unlink()
    assert run_rollout(none_kept)["kept"] == 0
    assert not left.exists()


def test_shares_of_several_workers_are_the_whole(settings, tmp_path):
    alone = settings(keep=KEEPS_ALL)
    result = run_rollout(alone)
    shared = settings(keep=KEEPS_ALL, output=str(tmp_path / "shared"), batch_rows=7)
    first = run_rollout(shared, share=Share(0, 2))
    assert first == {"finished": False, "units": 4, "units_done": 2}
    assert run_rollout(shared, share=Share(0, 2)) == first
    second = run_rollout(shared, share=Share(1, 2))
    assert second["finished"]
    assert files_of(shared.output) == files_of(alone.output), "whatever the batch"
    assert second["parts"] == result["parts"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "settings.seed: was 0, is 1"),
        ({"samples": 3, "top_p": 0.5}, r"settings.samples: was 2, is 3\n  settings.top_p: was 1.0, is 0.5"),
        ({"keep": {"truncated": False}}, "settings.keep.truncated: was True, is False"),
        ({"verify": {"answer": "(.)"}}, "settings.verify.answer: was None, is '\\(.\\)'"),
    ],
)
def test_another_rollout_in_the_same_folder_is_refused(settings, changes, message):
    run_rollout(settings(keep=KEEPS_ALL))
    with pytest.raises(MismatchError, match=message):
        run_rollout(settings(**{"keep": KEEPS_ALL} | changes))


def test_another_student_or_other_data_in_the_same_folder_are_refused(settings, teacher_folder, tmp_path):
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat("a", "Who?", "The fox."), chat("b", "What?", "A bird.")])
    text = {"text": {"files": [str(chats)]}}
    run_rollout(settings(data=text))
    run_rollout(settings(data=text, batch_rows=5))
    with pytest.raises(MismatchError, match=r"student.weights_sha256: was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        run_rollout(settings(data=text, student={"model": str(teacher_folder)}))
    write_jsonl(chats, [chat("a", "Who?", "The fox."), chat("b", "Why?", "A bird.")])
    with pytest.raises(MismatchError, match=r"data.0.files.0: was '[0-9a-f]{64}', is"):
        run_rollout(settings(data=text))


def test_a_folder_that_is_somebody_elses_is_refused(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"is not empty and holds none of plan\.json"):
        run_rollout(settings())
    (tmp_path / "out" / "plan.json").write_text('{"goal": "world peace"}')
    with pytest.raises(DamagedDataError, match="is no plan of a rollout"):
        run_rollout(settings())


def test_two_prompts_of_one_id_are_refused(settings, tmp_path):
    files = [write_jsonl(tmp_path / f"{q}.jsonl", [chat("1", q, "Yes.")]) for q in ("Who", "What")]
    mix = {"mix": [{"text": {"files": [str(file)]}} for file in files]}
    with pytest.raises(ConfigError, match=r"two prompts have the id '1', one from Who\.jsonl and one from What\.jsonl"):
        run_rollout(settings(data=mix))


def test_rows_without_anything_to_ask_are_refused(settings, tmp_path, caplog):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "Once upon a time."}])
    with pytest.raises(ConfigError, match="not one of 1 rows can be asked"):
        run_rollout(settings(data={"text": {"files": [str(texts)]}}))
    assert "1 of 1 rows have no prompt before what is supervised" in caplog.text


def test_a_share_of_the_rows_is_drawn_by_the_seed(settings, tmp_path):
    def prompts(name: str, **changes: Any) -> set[str]:
        some = settings(output=str(tmp_path / name), samples=1, rows=3, keep=KEEPS_ALL, **changes)
        run_rollout(some)
        return {each["prompt_id"] for each in replies_in(some.output)}

    drawn = [prompts(f"seed-{seed}", seed=seed) for seed in range(3)]
    assert {len(each) for each in drawn} == {3}
    assert len(set(map(frozenset, drawn))) > 1


def test_prompts_of_one_manner_are_asked_alone(settings, tmp_path):
    thinks = chat("slow", "Who?", "<think>A bird has no fur.</think>The fox.")
    chats = write_jsonl(tmp_path / "chats.jsonl", [thinks, chat("quick", "What?", "A bird.")])
    for manner, name in (("fast", "quick"), ("reasoning", "slow")):
        data = {"text": {"files": [str(chats)]}, "manner": manner}
        some = settings(data=data, output=str(tmp_path / manner), keep=KEEPS_ALL, samples=1)
        assert run_rollout(some)["prompts"] == 1
        assert [each["prompt_id"] for each in replies_in(some.output)] == [name]


def test_a_verifier_that_fails_names_the_prompt_and_loses_no_unit_before(settings, tmp_path):
    marks = tmp_path / "marks.py"
    marks.write_text("def right(reply, reference, prompt):\n    return '0 and 5' not in prompt or 1 / 0\n")
    failing = settings(verify={"function": f"{marks}:right"}, unit_prompts=1)
    with pytest.raises(LogitferryError, match="ZeroDivisionError: division by zero, for prompt 'sum-1'"):
        run_rollout(failing)
    assert [path.name for path in Path(failing.output, "units").iterdir()] == ["00000.json"]


def test_a_student_of_no_numbers_is_told(settings, student_folder, tmp_path):
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(student_folder)
    model.lm_head.weight.data[5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    transformers.AutoTokenizer.from_pretrained(student_folder).save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match="the reply to prompt 'sum-0' has a mean −log p of nan"):
        run_rollout(settings(student={"model": str(tmp_path / "broken")}))


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Write a config and run the verb on it: exit code, standard output, standard error."""

    def run_verb(tree: dict[str, Any], *arguments: str) -> tuple[Any, str, str]:
        path = tmp_path / "rollout.yaml"
        path.write_text(yaml.safe_dump(tree))
        monkeypatch.setattr(sys, "argv", ["student-train", "rollout", str(path), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            student_train.cli.main()
        return end.value.code, *capsys.readouterr()

    return run_verb


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_rollout_says_so_and_goes_on(command, tree, settings, count_batches, tmp_path, number):
    tree |= {"keep": KEEPS_ALL}
    count_batches["at"] = lambda batch: signal.raise_signal(number) if batch == 4 else None
    code, out, err = command(tree)
    assert (code, out) == (75, "")
    assert "next: run the same command again" in err
    code, out, err = command(tree, "--json")
    assert code == 0, err
    assert "1 of 4 units are done already" in err
    assert json.loads(out)["replies"] == 14
    whole = settings(keep=KEEPS_ALL, output=str(tmp_path / "whole"))
    run_rollout(whole)
    assert files_of(tree["output"]) == files_of(whole.output)


def test_the_command_tells_what_to_run_next(command, tree):
    code, out, err = command(tree | {"keep": KEEPS_ALL}, "--worker", "1/2")
    assert code == 0, err
    assert "2 of 4 units are done; others have the rest" in out
    code, out, _ = command(tree | {"keep": KEEPS_ALL}, "--worker", "0/2")
    assert "12 of 14 replies to 7 prompts kept" in out
    assert "dropped, unknown token: 2" in out
    assert f"next: teacher-dump run, with data: {{files: [{tree['output']}/data], form: tokens" in out
    code, _, err = command(tree, "--worker", "2/2")
    assert code == 2
    assert "--worker 2/2" in err
