"""A first config: it says what was found, loads as meant, documents every setting, and is written over nothing."""

import os
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, models

import shared.device
from shared.commented_yaml import commented_yaml
from shared.config import load_settings
from shared.errors import ConfigError, OutputError, RecordError
from shared.inspected import Selection, open_inspected
from shared.vllm_start import vllm_version
from teacher_dump.config import DumpSettings
from teacher_dump.init import tokens_to_keep, write_config
from tests.chat_templates import CHATML
from tests.commented import described, keys, uncommented
from tests.data import chat_records, write_jsonl
from tests.tiny import make_model, make_tokenizer


@pytest.fixture
def chats(tmp_path) -> Path:
    return write_jsonl(tmp_path / "chats.jsonl", chat_records(3))


@pytest.fixture
def write(tmp_path, teacher_folder, chats):
    """Write tmp_path/dump.yaml, and give back the lines for people."""

    def written(**changes) -> list[str]:
        arguments = {"model": str(teacher_folder), "files": [str(chats)], "output": "out", "engine": None}
        return write_config(tmp_path / "dump.yaml", **{**arguments, "tokenizer": None, **changes})

    return written


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_init_writes_what_loads_as_the_settings_that_are_meant(write, tmp_path, teacher_folder, chats, engine):
    write(engine=engine, tokenizer=str(teacher_folder))
    meant = {
        "teacher": {"model": str(teacher_folder), "tokenizer": str(teacher_folder), "engine": engine},
        "data": {"files": [str(chats)]},
        "output": "out",
        "keep": {"always": ["<|im_end|>"]},
    }
    assert load_settings(DumpSettings, tmp_path / "dump.yaml") == DumpSettings.model_validate(meant)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_init_documents_every_setting_and_loads_with_every_line_uncommented(write, tmp_path, engine):
    write(engine=engine)
    text = (tmp_path / "dump.yaml").read_text()
    settings = load_settings(DumpSettings, tmp_path / "dump.yaml")
    (tmp_path / "all.yaml").write_text(uncommented(text))
    assert load_settings(DumpSettings, tmp_path / "all.yaml") == settings, "what is commented out are the defaults"
    assert keys(yaml.safe_load(uncommented(text))) == keys(settings.model_dump(mode="json"))
    comments = " ".join(re.findall(r"^[ #]*## (.*)$", text, flags=re.MULTILINE)).split()
    missing = [each for each in described(DumpSettings) if " ".join(each.split()) not in " ".join(comments)]
    assert not missing
    assert len(described(DumpSettings)) > 40
    assert "\n  # batch_tokens: 8192\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_init_lets_each_commented_setting_be_uncommented_alone(write, tmp_path):
    write()
    lines = (tmp_path / "dump.yaml").read_text().splitlines(keepends=True)
    alone = [index for index, line in enumerate(lines) if re.match(r" *# \w+: ", line)]
    assert len(alone) > 25
    for index in alone:
        (tmp_path / "one.yaml").write_text("".join([*lines[:index], uncommented(lines[index]), *lines[index + 1 :]]))
        load_settings(DumpSettings, tmp_path / "one.yaml")


def test_init_quotes_what_yaml_would_read_otherwise(tmp_path):
    given = {
        "teacher": {"model": "a: b #c", "tokenizer": "1.5", "vllm": {}},
        "data": {"files": ["x, y.jsonl", "[z]", "größe.jsonl", "null"]},
        "output": "yes",
        "keep": {"always": ["[TOOL_CALLS]", "'", "<|x|>: "]},
    }
    (tmp_path / "odd.yaml").write_text(commented_yaml(DumpSettings, given), encoding="utf-8")
    assert load_settings(DumpSettings, tmp_path / "odd.yaml") == DumpSettings.model_validate(given)


def test_init_says_what_was_found_and_what_to_do_next(write, tmp_path, teacher_folder, chats):
    lines = write(engine="transformers")
    assert lines == [
        f"{tmp_path}/dump.yaml: written",
        f"  tokenizer: {teacher_folder}, 300 tokens",
        f"  data: 1 file; {chats}:1 is chat (messages)",
        "  engine: transformers, as asked for",
        "  keep.always: <|im_end|>",
        f"  next: logit-shards inspect {tmp_path}/dump.yaml",
    ]
    inspected = open_inspected(lines[-1].split()[-1], None, [])
    assert len(list(inspected.rows(Selection(count=3)))) == 3


def test_init_says_where_a_chat_has_no_template(write, tmp_path):
    folder = make_model(tmp_path / "base")
    make_tokenizer(folder, template=CHATML)
    (folder / "chat_template.jinja").unlink()
    assert "it has no chat template: give data.chat_template" in write(model=str(folder))[1]
    (tmp_path / "dump.yaml").unlink()
    text = write_jsonl(tmp_path / "plain.jsonl", [{"text": "a red fox"}])
    assert "template" not in write(model=str(folder), files=[str(text)])[1]


def test_init_leaves_a_file_that_is_there_as_it_is(write, tmp_path):
    (tmp_path / "dump.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"dump\.yaml exists already, and is left as it is"):
        write()
    assert (tmp_path / "dump.yaml").read_text() == "mine"


def test_init_writes_nothing_where_something_is_missing(write, tmp_path, teacher_folder, chats):
    bare = make_model(tmp_path / "bare")
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"x": 1}])
    before = sorted(os.listdir(tmp_path))
    for changes, error, message in [
        ({"model": str(tmp_path / "none")}, ConfigError, "none does not exist"),
        ({"model": "nobody/nothing"}, ConfigError, "from the Hub"),
        ({"model": str(bare)}, ConfigError, r"no tokenizer can be loaded from .*bare"),
        ({"files": [str(tmp_path / "none.jsonl")]}, ConfigError, "none.jsonl does not exist"),
        ({"files": []}, ConfigError, "files names no file"),
        ({"files": [str(odd)]}, RecordError, "a record of no known form"),
        ({"engine": "vlm"}, ConfigError, "teacher.engine"),
    ]:
        with pytest.raises(error, match=message):
            write(**changes)
    assert sorted(os.listdir(tmp_path)) == before
    arguments = {"model": str(teacher_folder), "files": [str(chats)], "output": "o"}
    with pytest.raises(OutputError, match="cannot be written"):
        write_config(chats / "dump.yaml", **arguments, engine=None, tokenizer=None)


def test_init_proposes_the_tokens_that_the_tokenizer_has_and_no_others(tmp_path):
    tokenizer = make_tokenizer(tmp_path, control=["<|eot_id|>"], added=["<tool_call>", "<think>", "<unheard_of>"])
    assert tokens_to_keep(tokenizer) == ["<|im_end|>", "<|eot_id|>", "<think>", "<tool_call>"]
    spelt = Tokenizer(models.WordLevel({"</s>": 0, "<think>": 1, "a": 2}, unk_token="a"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=spelt, eos_token="</s>")
    assert tokens_to_keep(words) == ["</s>"], "<think> is a word of the text to it"
    assert tokens_to_keep(transformers.PreTrainedTokenizerFast(tokenizer_object=spelt)) == []


@pytest.mark.skipif(vllm_version() is not None, reason="vLLM is installed")
def test_init_takes_vllm_where_it_is_installed_and_there_is_an_accelerator(write, tmp_path, monkeypatch):
    def chosen() -> tuple[str, str]:
        (tmp_path / "dump.yaml").unlink(missing_ok=True)
        line = write()[3]
        return load_settings(DumpSettings, tmp_path / "dump.yaml").teacher.engine, line

    monkeypatch.setattr(shared.device, "pick_device", lambda name: torch.device("meta"))
    assert chosen() == ("transformers", "  engine: transformers, since vLLM is not installed here")
    info = tmp_path / "site" / "vllm-9.9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    engine, line = chosen()
    assert engine == "vllm"
    assert line.endswith("vLLM 9.9.9 is installed and there is an accelerator here")
    monkeypatch.setattr(shared.device, "pick_device", lambda name: torch.device("cpu"))
    engine, line = chosen()
    assert engine == "transformers"
    assert line.endswith("there is no accelerator here")
