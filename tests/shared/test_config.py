"""The config at the edge: what a person mistypes is answered with the place and the likely key."""

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.config import load_settings, settings_yaml
from shared.errors import ConfigError
from student_train.config import TrainSettings
from student_train.recipe import load_runs
from teacher_dump.config import DumpSettings

DUMP = "teacher: {model: some/teacher}\ndata: {files: [a.jsonl]}\noutput: out\n"


@pytest.fixture
def write(tmp_path):
    def write_config(text: str | bytes, name: str = "dump.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_config


def refusal(path, overrides=(), kind=DumpSettings) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(kind, path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_load_settings_reads_a_file_and_fills_defaults(write):
    settings = load_settings(DumpSettings, write(DUMP + "keep: {k: 7}\n"))
    assert settings.teacher.model == "some/teacher"
    assert settings.data.files == ["a.jsonl"]
    assert settings.keep.k == 7
    assert settings.unit_records == 512


@pytest.mark.parametrize(
    ("mistyped", "answer"),
    [
        ("outptu: x", "outptu: unknown key; did you mean output?"),
        ("keep: {mthod: topk}", "keep.mthod: unknown key; did you mean method?"),
        ("held_out: {data: {text: {files: [a], max_token: 3}}}", "held_out.data.text.max_token: unknown key; did you"),
    ],
)
def test_load_settings_suggests_the_nearest_key_at_any_depth(write, mistyped, answer):
    kind = TrainSettings if "held_out" in mistyped else DumpSettings
    assert answer in refusal(write(mistyped), kind=kind)


def test_load_settings_lists_the_known_keys_where_none_is_near(write):
    answer = refusal(write(DUMP + "keep: {zzz: 1}\n"))
    assert "keep.zzz: unknown key; known: always, k, max_kl, method, min_prob, seed, tau" in answer


def test_load_settings_reports_every_error_with_its_place(write):
    text = "data: {files: []}\noutput: 3\nkeep: {k: 0, kk: 1}\ntemperatures: [1.0, hot]\n"
    message = refusal(path := write(text))
    assert message.startswith(f"{path}: 6 settings cannot be used\n")
    places = [line.split(":")[0].strip() for line in message.splitlines()[1:-1]]
    assert sorted(places) == ["data", "keep.k", "keep.kk", "output", "teacher", "temperatures.1"]
    assert "teacher: is required" in message
    assert "got 'hot'" in message
    assert "next: mend the keys above; a config as `teacher-dump init`" in message  # --print-config would say the same


def test_load_settings_says_which_line_is_meant(write):
    text = DUMP + "base: &base {min_prob: 7}\n\nkeep:\n  <<: *base\n  k: 0\ntemperatures:\n- 1.0\n- hot\n"
    lines = refusal(write(text), ["unit_records=0", "teacher.dtype=x"]).splitlines()[1:-1]
    place = {line.split(":")[0].strip(): line.rpartition("(line ")[2].rstrip(")") for line in lines}
    assert (place["base"], place["keep.k"], place["temperatures.1"]) == ("4", "8", "11")
    assert place["keep.min_prob"] == "6", "what was merged in stands under its parent"
    assert all("(line" not in line for line in lines if line.startswith(("  unit_records", "  teacher.dtype")))
    assert "(line 4)" in refusal(write(DUMP + "keep: {kk: 1}\n"), ["keep.k=3"]), "not the one that was overridden"
    absent = refusal(write("teacher: {}\n\ndata: {files: [a]}\n")).splitlines()
    assert "  teacher.model: is required (line 1)" in absent
    assert "  output: is required" in absent


def test_load_settings_names_the_rule_that_two_keys_break_together(write):
    message = refusal(write(DUMP.replace("[a.jsonl]", "[a.jsonl], prompt_field: q")))
    assert "data: prompt_field and response_field go together (line 2)\n" in message


def test_load_settings_counts_a_single_error_in_the_singular(write):
    assert "1 setting cannot be used" in refusal(write(DUMP + "unit_records: 0\n"))


@pytest.mark.parametrize("text", [DUMP + "output: elsewhere\n", DUMP + "keep: {k: 3, min_prob: 0.1, 'k': 4}\n"])
def test_load_settings_refuses_a_key_given_twice(write, text):
    message = refusal(write(text))
    assert "is given twice" in message
    assert "line 4" in message


def test_load_settings_takes_yaml_merge_keys_and_lets_them_be_overridden(write):
    top = "data: {files: [a.jsonl]}\noutput: o\nteacher: {<<: {model: m, revision: r1}, revision: r2}\n"
    assert load_settings(DumpSettings, write(top)).teacher.revision == "r2"
    nested = DUMP.replace("{files", "{chat_template_kwargs: {a: &b {x: 1, y: 1}, c: {<<: *b, y: 2}}, files")
    kwargs = load_settings(DumpSettings, write(nested)).data.chat_template_kwargs
    assert kwargs["c"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "text",
    [
        "a: b: c\n",
        "? [a, b]\n: 1\n",
        "? {a: 1}\n: 1\n",
        DUMP + "unit_records: 2024-13-45\n",
        "x: !!python/object/apply:os.getcwd []\n",
        "x: " + "[" * 1000,
    ],
    ids=["colon", "list_as_key", "mapping_as_key", "impossible_date", "python_object", "too_deep"],
)
def test_load_settings_refuses_what_is_not_plain_yaml(write, text):
    assert "not valid YAML" in refusal(write(text))


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("[1, 2]", "list"), ("just words", "str")])
def test_load_settings_refuses_a_file_that_is_no_mapping(write, text, kind):
    message = refusal(write(text))
    assert f"expected a mapping of settings, got {kind}" in message
    assert "`teacher-dump init`" in message


def test_load_settings_says_in_plain_words_that_a_part_holds_settings(write):
    assert "teacher: expected settings of its own below this key, got 'name'" in refusal(write("teacher: name\n"))


def test_load_settings_names_a_config_with_a_near_name_where_the_file_is_missing(write):
    path = write(DUMP, name="dump.yaml")
    assert f"did you mean {path}?" in refusal(path.with_name("dmup.yaml"))
    assert "check the path" in refusal(path.with_name("something-else"))


def test_load_settings_does_not_suggest_the_very_file_that_it_could_not_read(write):
    message = refusal(write(b"output: \xff\xfe"))
    assert "cannot be read" in message
    assert "next: save it as text in UTF-8" in message


def test_override_replaces_adds_and_parses_like_yaml(write):
    overrides = ["keep.k=3", "keep.always=['<|im_end|>', '5']", "teacher.revision=a=b", "data.max_tokens=", "output=p"]
    settings = load_settings(DumpSettings, write(DUMP + "keep: {k: 9, min_prob: 0.5}\n"), [*overrides, "output=q"])
    assert settings.keep.k == 3
    assert settings.keep.min_prob == 0.5
    assert settings.keep.always == ["<|im_end|>", "5"]
    assert settings.teacher.revision == "a=b"
    assert settings.data.max_tokens is None
    assert settings.output == "q", "the last override wins"


def test_override_obeys_the_rules_of_the_file(write):
    assert "keep.kk: unknown key; did you mean k?" in refusal(write(DUMP), ["keep.kk=3"])


@pytest.mark.parametrize("override", ["keep.k", "=3", "keep..k=3", ".k=3", "keep.=3", ""])
def test_override_without_key_and_value_is_refused(write, override):
    message = refusal(write(DUMP), [override])
    assert f"--set {override}: expected a.b=value" in message
    assert "next: for example --set output=my-dump" in message


def test_override_below_a_value_is_refused(write):
    assert "--set output.x=1: output holds a value, not settings" in refusal(write(DUMP), ["output.x=1"])


@pytest.mark.parametrize("value", ["[", "{k: 1, k: 2}", "2024-13-45"])
def test_override_with_broken_yaml_names_the_override(write, value):
    assert f"--set keep={value}: not valid YAML" in refusal(write(DUMP), [f"keep={value}"])


def test_override_changes_one_place_of_a_mapping_that_an_alias_shares(write):
    text = "student: {model: m}\noutput: o\nsteps: 1\nloss: {kd_weight: 0}\n"
    text += "data: {text: &t {files: [train]}}\nheld_out: {data: {text: *t}}\n"
    settings = load_settings(TrainSettings, write(text), ["data.text.files=[other]"])
    assert settings.data.text is not None
    assert settings.data.text.files == ["other"]
    assert settings.held_out.data is not None
    assert settings.held_out.data.text is not None
    assert settings.held_out.data.text.files == ["train"]


def test_settings_yaml_reads_back_as_the_same_settings(write):
    text = DUMP + "keep: {min_prob: 1.0e-7, always: ['é\\n: #', b]}\ntemperatures: [2, 0.5]\n"
    settings = load_settings(DumpSettings, write(text), ["output='007'", "data.system=null"])
    printed = settings_yaml(settings)
    assert "unit_records: 512" in printed, "defaults are shown too"
    assert load_settings(DumpSettings, write(printed)) == settings
    assert settings_yaml(load_settings(DumpSettings, write(printed))) == printed


def test_settings_are_frozen_at_every_level(write):
    settings = load_settings(DumpSettings, write(DUMP))
    with pytest.raises(ValidationError, match="frozen"):
        settings.output = "elsewhere"
    with pytest.raises(ValidationError, match="frozen"):
        settings.keep.k = 3


def test_load_settings_refuses_to_train_into_a_url(write):
    """Which would be a folder of that name here."""
    config = "student: {model: m}\ndata: {dataset: d}\nsteps: 1\noutput: s3://bucket/x\n"
    message = refusal(write(config), kind=TrainSettings)
    assert "output: is a URL, and what is written there has to be on this machine: give a folder, got 's3://" in message


def test_load_settings_knows_a_config_of_another_command(write):
    train = "student: {model: m}\nheld_out: {fraction: 0.1}\nloss: {}\ndata: {dataset: d}\nsteps: 1\noutput: x\n"
    message = refusal(write(train))
    assert "next: this looks like a config of student-train: give it to that command" in message
    assert message.count("known: data, keep") == 1, "the same keys are listed once"
    assert "config of teacher-dump" in refusal(write(DUMP + "keep: {k: 3}\n"), kind=TrainSettings)
    assert "looks like" not in refusal(write(DUMP + "student: {model: m}\n")), "one that has both is a slip"


def test_a_slip_in_a_recipe_does_not_send_it_to_the_command_that_was_given_it(write):
    recipe = "student: {model: m}\ndata: {dataset: d}\nsteps: 1\noutput: x\nstages:\n  one: {kind: sft, stepz: 3}\n"
    with pytest.raises(ConfigError, match="stepz: unknown key") as raised:
        load_runs(write(recipe))
    assert "looks like" not in str(raised.value)


def test_an_override_takes_the_line_from_its_own_setting_alone(write):
    message = refusal(write(DUMP + "keep:\n  k: 3\n  kk: 7\n"), ["keep.k=0"])
    assert re.search(r"keep\.kk: .*\(line \d+\)\n", message)
    assert re.search(r"keep\.k: .*got 0\n", message)


def test_a_config_in_a_pipe_is_read_once(tmp_path):
    os.mkfifo(pipe := tmp_path / "dump.yaml")
    writer = threading.Thread(target=pipe.write_text, args=["output: ''\n"], daemon=True)
    writer.start()
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(refusal, pipe)
        try:
            assert "output: " in said.result(timeout=10)
        finally:
            with suppress(OSError):  # a second reader would wait for ever
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("kind", [DumpSettings, TrainSettings])
def test_load_settings_refuses_an_output_of_no_name(write, kind):
    assert "output: " in refusal(write("output: ''\n"), kind=kind)
