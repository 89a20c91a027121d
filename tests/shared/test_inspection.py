"""`logit-shards inspect`: rows as the trainer will see them, before anything is run."""

import json
import re

import pytest
import yaml

from shared import logit_shards
from shared.dataset import LogitDataset
from teacher_dump.dump import run_dump
from tests.data import chat_records, dump_settings, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_folder):
    """Chats, the configs of both phases, and what the dump gives."""
    folder = tmp_path_factory.mktemp("inspected")
    files = str(write_jsonl(folder / "chats.jsonl", chat_records(12)))
    run_dump(dump_settings(teacher_folder, files, folder / "dump", keep__k=5))
    model = {"model": str(teacher_folder)}
    configs = {
        "dump": {
            "teacher": {**model, "batch_tokens": 99},
            "data": {"files": [files]},
            "output": "out",
            "keep": {"k": 3},
        },
        "sft": {"student": model, "data": {"text": {"files": [files], "supervise": "last_turn"}}, "output": "out"},
        "kd": {"student": model, "data": {"dataset": str(folder / "dump")}, "output": "out"},
    }
    for name, tree in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture
def inspect(monkeypatch, capsys):
    """The verb in this process: exit code, standard output, standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["logit-shards", "inspect", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            logit_shards.main()
        return end.value.code, *capsys.readouterr()

    return run


def test_inspect_shows_text_with_what_is_supervised(inspect, folder, teacher_folder):
    code, output, errors = inspect(folder / "chats.jsonl", "--tokenizer", teacher_folder, "--row", 1)
    assert code == 0
    where, *lines = output.splitlines()
    assert re.fullmatch(rf"{folder}/chats.jsonl:2  id chat-1: \d+ tokens, \d+ supervised \(\d+%\)", where)
    assert lines[0] == "<|im_start|>user⏎"
    answers = ["two plus three " * 6, "two plus three " * 7]
    assert re.findall("⟦(.*?)⟧", output, re.DOTALL) == [f"{answer}<|im_end|>" for answer in answers]
    assert "read as chat (messages)" in errors


def test_inspect_colours_what_is_supervised_on_a_terminal(inspect, folder, teacher_folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, output, _ = inspect(folder / "chats.jsonl", "--tokenizer", teacher_folder, "--id", "chat-0")
    assert code == 0
    assert "\x1b[1;32ma red fox" in output
    assert "\x1b[2m" in output
    assert "⟦" not in output


@pytest.mark.parametrize(("name", "supervised", "command"), [("dump", 2, "teacher-dump"), ("sft", 1, "student-train")])
def test_inspect_reads_text_as_the_run_of_a_config_will(inspect, folder, name, supervised, command):
    code, output, _ = inspect(folder / f"{name}.yaml", "--row", 1)
    assert code == 0
    assert output.count("⟦") == supervised
    assert output.endswith(f"next: {command} run {folder}/{name}.yaml\n")


def test_inspect_shows_what_the_teacher_said(inspect, folder):
    dataset = LogitDataset.open(folder / "dump")
    row = dataset.read_shard(0)[3]
    for path in (folder / "dump", folder / "kd.yaml"):
        code, output, _ = inspect(path, "--row", 3, "--tokens", "--json")
        assert code == 0
        (shown,) = json.loads(output)["rows"]
        assert shown["where"] == "data/part-00000.parquet[3]"
        assert shown["input_ids"] == row.input_ids_L.tolist()
        assert shown["label_mask"] == row.label_mask_L.tolist()
        assert len(shown["teacher"]) == row.num_positions
        for position, said in enumerate(shown["teacher"]):
            only = row.teacher.split([position, 1, row.num_positions - position - 1])[1]
            assert said["entropy"] == float(only.entropy_P[0])
            assert {token for token, _, _ in said["kept"]} == set(only.kept_ids_E.tolist())
            logps = [logp for _, _, logp in said["kept"]]
            assert logps == sorted(logps, reverse=True)
    _, table, _ = inspect(folder / "dump", "--row", 3, "--tokens")
    assert table.count("●") == row.num_positions


def test_inspect_reads_everything_where_it_is_told_to(inspect, folder, teacher_folder):
    code, output, _ = inspect(
        folder / "dump.yaml", "--all", "--set", "data.max_tokens=130", "--set", "data.on_too_long=drop"
    )
    assert code == 0
    assert re.search(r"all of .*: 12 records, \d+ rows, .*; dropped too long: \d+", output)
    code, output, _ = inspect(folder / "dump", "--all")
    assert "12 rows, " in output


def test_inspect_says_what_it_lacks(inspect, folder, teacher_folder, tmp_path):
    chats = folder / "chats.jsonl"
    code, _, errors = inspect(chats)
    assert code == 2
    assert f"text needs a tokenizer to be rows\n  next: logit-shards inspect {chats} --tokenizer MODEL" in errors
    code, _, errors = inspect(chats, "--tokenizer", teacher_folder, "--id", "nobody")
    assert code == 2
    assert "there is no row to show with sample id 'nobody'" in errors
    code, _, errors = inspect(folder / "chat.jsonl", "--tokenizer", teacher_folder)
    assert code == 2
    assert "did you mean chats.jsonl?" in errors
    code, _, errors = inspect(chats, "--tokenizer", tmp_path / "nowhere")
    assert code == 2
    assert "model folder" in errors
    code, _, errors = inspect(folder / "dump.yaml", "--set", "data.fiels=[x]")
    assert code == 2
    assert "data.fiels: unknown key; did you mean files?" in errors
    code, _, errors = inspect(chats, "--tokenizer", teacher_folder, "--set", "supervise=all")
    assert code == 2
    assert "every_turn" in errors
    (tmp_path / "other.yaml").write_text("a: 1\n")
    code, _, errors = inspect(tmp_path / "other.yaml")
    assert code == 2
    assert "has neither teacher nor student" in errors


def test_inspect_shows_text_that_ends_without_a_line_feed(inspect, folder, teacher_folder):
    path = write_jsonl(folder / "plain.jsonl", [{"text": "two plus three"}])
    code, output, _ = inspect(path, "--tokenizer", teacher_folder)
    assert code == 0
    assert output.splitlines()[1].endswith("wo plus three<|im_end|>⟧")


def test_inspect_of_a_dataset_has_nothing_to_set(inspect, folder, teacher_folder):
    for options in (("--tokenizer", teacher_folder), ("--set", "max_tokens=3")):
        code, _, errors = inspect(folder / "dump", *options)
        assert code == 2
        assert "is a dataset: it has its own tokenizer" in errors


def test_inspect_takes_the_config_of_a_training_with_all_its_settings(inspect, folder, teacher_folder):
    data = {"dataset": str(folder / "dump"), "on_too_long": "drop"}
    tree = {"student": {"model": str(teacher_folder)}, "data": data, "output": "out"}
    (folder / "long.yaml").write_text(yaml.safe_dump(tree))
    code, output, _ = inspect(folder / "long.yaml")
    assert code == 0
    assert "id chat-0: " in output


def test_inspect_draws_a_picture(inspect, folder, teacher_folder):
    code, _, _ = inspect(folder / "chats.jsonl", "--tokenizer", teacher_folder, "--svg", folder / "chat.svg")
    assert code == 0
    picture = (folder / "chat.svg").read_text()
    assert picture.startswith("<svg ")
    assert "assistant" in picture
