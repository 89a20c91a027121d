"""A first config for a student: it fits the dataset, loads as meant, documents every setting, and trains."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from shared.config import load_settings
from shared.errors import ConfigError, LogitferryError, MismatchError, UnsealedDatasetError
from student_train.cli import cli
from student_train.config import TrainSettings
from student_train.init import write_config
from tests.commented import described, keys, uncommented
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("init")
    chats = write_jsonl(folder / "chats.jsonl", chat_records(45))
    sealed_dump(dump_settings(teacher_folder, chats, folder / "dump", temperatures=[2.0]))
    return folder / "dump"


@pytest.fixture
def write(tmp_path: Path, student_folder: Path, dataset: Path):
    """Write tmp_path/train.yaml, and give back the lines for people."""

    def written(**changes: Any) -> list[str]:
        arguments = {
            "model": str(student_folder),
            "dataset": str(dataset),
            "files": [],
            "output": str(tmp_path / "out"),
        }
        return write_config(tmp_path / "train.yaml", **{**arguments, "files": [], "tokenizer": None, **changes})

    return written


def test_init_writes_what_fits_the_dataset(write, tmp_path: Path, student_folder: Path, dataset: Path):
    lines = write(tokenizer=str(student_folder))
    settings = load_settings(TrainSettings, tmp_path / "train.yaml")
    meant = TrainSettings.model_validate(
        {
            "student": {"model": str(student_folder), "tokenizer": str(student_folder)},
            "data": {"dataset": str(dataset)},
            "output": str(tmp_path / "out"),
            "rows_per_step": 2,
            "epochs": 2,
        }
    )
    assert settings.model_dump() == meant.model_dump()
    assert lines[0] == f"{tmp_path}/train.yaml: written"
    assert re.fullmatch(rf"  data: {dataset}, 45 rows, [\d,]+ supervised tokens; of this tokenizer", lines[2])
    assert lines[3:] == [
        "  loss: kd_weight 0.9 at T 1; the dataset is for T 1, 2",
        "  rows_per_step: 2, of 45 rows; none is held out",
        f"  next: student-train doctor {tmp_path}/train.yaml",
    ]


def test_init_documents_every_setting_and_loads_with_every_line_uncommented(write, tmp_path: Path):
    write()
    text = (tmp_path / "train.yaml").read_text()
    settings = load_settings(TrainSettings, tmp_path / "train.yaml")
    (tmp_path / "all.yaml").write_text(uncommented(text))
    assert load_settings(TrainSettings, tmp_path / "all.yaml") == settings, "what is commented out are the defaults"
    dumped = settings.model_dump(mode="json")
    assert keys(yaml.safe_load(uncommented(text))) == keys(dumped)
    comments = " ".join(" ".join(re.findall(r"^[ #]*## (.*)$", text, flags=re.MULTILINE)).split())
    assert not [each for each in described(TrainSettings) if " ".join(each.split()) not in comments]
    assert len(described(TrainSettings)) > 40
    assert max(map(len, text.splitlines())) <= 120


def test_what_init_writes_is_trained_with_as_it_is(tmp_path: Path, student_folder: Path, dataset: Path):
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output + repr(done.exception)
        return done.output

    config, output = str(tmp_path / "train.yaml"), str(tmp_path / "out")
    run("init", "--model", str(student_folder), "--dataset", str(dataset), "--output", output, config)
    run("run", config, "--set", "device=cpu", "--set", "epochs=0.2")
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_init_of_text_is_plain_sft(write, tmp_path: Path):
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_records(3))
    lines = write(dataset=None, files=[str(chats)])
    settings = load_settings(TrainSettings, tmp_path / "train.yaml")
    assert settings.loss.kd_weight == 0
    assert settings.data.text
    assert settings.data.text.files == [str(chats)]
    assert f"  data: 1 file; {chats}:1 is chat (messages)" in lines


def test_init_leaves_a_file_that_is_there_as_it_is(write, tmp_path: Path):
    (tmp_path / "train.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"train\.yaml exists already, and is left as it is"):
        write()
    assert (tmp_path / "train.yaml").read_text() == "mine"


def test_init_writes_nothing_where_something_is_missing_or_does_not_fit(write, tmp_path: Path):
    other = make_model(tmp_path / "other")
    make_tokenizer(other, control=["<|unheard_of|>"])
    (tmp_path / "empty").mkdir()
    cases: list[tuple[dict[str, Any], type[LogitferryError], str]] = [
        ({"model": str(tmp_path / "none")}, ConfigError, "none does not exist"),
        ({"dataset": str(tmp_path / "none")}, ConfigError, "none does not exist"),
        ({"dataset": str(tmp_path / "empty")}, UnsealedDatasetError, "empty is no sealed dataset"),
        ({"model": str(other)}, MismatchError, "tokenizer"),
        ({"dataset": None}, ConfigError, "give --dataset FOLDER, or --data FILE"),
        ({"files": ["a.jsonl"]}, ConfigError, "one of the two"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            write(**changes)
    assert not (tmp_path / "train.yaml").exists()
