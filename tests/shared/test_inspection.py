"""`logit-shards inspect`: rows as the trainer will see them, before anything is run."""

import json
import math
import re
from io import StringIO

import numpy as np
import pytest
import yaml
from rich.console import Console

from shared import logit_shards
from shared.dataset import LogitDataset
from shared.errors import ConfigError
from shared.inspection import SURPRISE_STEPS, SURPRISE_STYLES, Inspector
from shared.rows import LogitRow, Positions
from tests.chat_templates import CHATML
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import make_spaced_tokenizer

RARE = 1e-5


def spoken_row(ids: list[int], kept_P: list[dict[int, float]], *, num_temperatures: int = 2) -> LogitRow:
    """A row whose last tokens have these kept probabilities; the token that came has RARE where it is not kept.

    Without temperatures they are weights of a threshold sample.
    """
    num_positions = len(kept_P)
    kept_P = [dict(sorted(kept.items())) for kept in kept_P]
    realised = [kept.get(token, RARE) for token, kept in zip(ids[-num_positions:], kept_P, strict=True)]
    with np.errstate(divide="ignore"):
        tail_P = np.log([max(0.0, 1 - sum(kept.values())) for kept in kept_P])
    teacher = Positions(
        kept_counts_P=np.array([len(kept) for kept in kept_P], np.int32),
        kept_ids_E=np.array([token for kept in kept_P for token in kept], np.int32),
        kept_logp_E=np.log([p for kept in kept_P for p in kept.values()]).astype(np.float32),
        realised_logp_P=np.log(realised).astype(np.float32),
        entropy_P=np.linspace(0.5, 2.5, num_positions, dtype=np.float32),
        tail_logsum_PT=np.stack([tail_P + j for j in range(2)], 1).astype(np.float32)[:, :num_temperatures],
    )
    mask_L = np.arange(len(ids)) >= len(ids) - num_positions
    return LogitRow(sample_id="by-hand", input_ids_L=np.array(ids, np.int32), label_mask_L=mask_L, teacher=teacher)


def printed(inspector: Inspector, row: LogitRow, *, plain: bool = True, tokens: bool = False, at: int | None = None):
    """What a file (or with colours a terminal) gets to see."""
    console = Console(file=StringIO(), width=500, soft_wrap=True, color_system=None if plain else "256")
    for line in inspector.lines(row, "here[0]", plain=plain, tokens=tokens, at=at):
        console.print(line)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_folder):
    """Chats, the configs of both phases, and what the dump gives."""
    folder = tmp_path_factory.mktemp("inspected")
    files = str(write_jsonl(folder / "chats.jsonl", chat_records(12)))
    sealed_dump(dump_settings(teacher_folder, files, folder / "dump", keep__k=5))
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


def test_inspect_finds_the_rows_that_surprised_the_teacher_most(inspect, folder):
    dataset = LogitDataset.open(folder / "dump")
    rows = [row for shard in range(len(dataset.manifest.shards)) for row in dataset.read_shard(shard)]
    assert len(dataset.manifest.shards) > 1
    worst = sorted(rows, key=lambda row: row.teacher.realised_logp_P.min())
    code, output, _ = inspect(folder / "dump", "--worst", "--row", 1, "--count", 4, "--json")
    assert code == 0
    assert [row["sample_id"] for row in json.loads(output)["rows"]] == [row.sample_id for row in worst[1:5]]
    code, _, errors = inspect(folder / "chats.jsonl", "--tokenizer", folder / "dump/tokenizer", "--worst")
    assert code == 2
    assert "--worst is for a dataset" in errors


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
    code, _, errors = inspect(folder / "chat.jsonl")
    assert code == 2
    assert "chat.jsonl does not exist" in errors, "a slip is no want of a tokenizer"
    code, _, errors = inspect(chats, "--tokenizer", teacher_folder, "--row", "4000")
    assert code == 2
    assert "rows are counted from 0" in errors
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


# --- what the teacher said


@pytest.fixture
def inspector(tokenizer):
    return Inspector(tokenizer.backend_tokenizer, [1.0, 2.0])


def test_surprise_colours_each_supervised_token_by_its_step(tokenizer, inspector):
    fox, bird, end = *tokenizer("fb", add_special_tokens=False).input_ids, tokenizer.eos_token_id
    probabilities = [0.95, 0.6, 0.3, 0.05, 0.005]
    row = spoken_row([end, fox, bird, fox, bird, end], [{int(token): p} for token, p in
                     zip([fox, bird, fox, bird, end], probabilities, strict=True)])  # fmt: skip
    _, legend, text, *_ = inspector.lines(row, "here", plain=False, tokens=False)
    styles = [str(span.style) for span in text.spans]
    assert styles == ["cyan", *SURPRISE_STYLES[:4], f"{SURPRISE_STYLES[4]} underline"]
    assert text.plain == "<|im_end|>fbfb<|im_end|>"
    mean = -np.log(probabilities).mean()
    assert legend.plain.startswith(f"surprise: mean {mean:.3f} nats (perplexity {math.exp(mean):.4g})")
    assert [str(span.style) for span in legend.spans] == list(SURPRISE_STYLES)
    assert all(str(step) in legend.plain for step in SURPRISE_STEPS)


def test_surprise_of_a_character_in_parts_is_that_of_its_most_surprising_part(tokenizer, inspector):
    ids = tokenizer("a🦊", add_special_tokens=False).input_ids
    assert len(ids) == 5
    row = spoken_row(ids, [{ids[1]: 0.99}, {ids[2]: 0.001}, {ids[3]: 0.99}, {ids[4]: 0.99}])
    _, _, text, *_ = inspector.lines(row, "here", plain=False, tokens=False)
    assert text.plain == "a🦊"
    (last,) = [span for span in text.spans if text.plain[span.start : span.end] == "🦊"]
    assert str(last.style) == SURPRISE_STYLES[4]


def test_surprise_is_found_without_colours_too(inspect, folder):
    row = LogitDataset.open(folder / "dump").read_shard(0)[3]
    code, output, _ = inspect(folder / "dump", "--row", 3)
    assert code == 0
    assert "\x1b" not in output
    assert output.count("⟦") == output.count("⟧") > 0
    hottest = np.argsort(row.teacher.realised_logp_P, kind="stable")[:5]
    _, listed = output.split("most surprising")
    lines = [line.split() for line in listed.splitlines()[2:7]]
    assert [int(line[0]) for line in lines] == (row.source_index_P[hottest] + 1).tolist()
    assert all(f"{row.teacher.realised_logp_P[p]:.3f}" in line for p, line in zip(hottest, lines, strict=True))
    _, as_json, _ = inspect(folder / "dump", "--row", 3, "--json")
    (tree,) = json.loads(as_json)["rows"]
    assert tree["mean_surprise"] == pytest.approx(-row.teacher.realised_logp_P.mean(), rel=1e-5)
    assert [said["t"] for said in tree["most_surprising"]] == (row.source_index_P[hottest] + 1).tolist()


def test_surprise_has_its_legend_on_a_terminal_and_text_keeps_its_green(inspect, folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, output, _ = inspect(folder / "dump", "--row", 3)
    assert "≥ 4.6" in output
    assert "\x1b[1;32m" not in output
    assert "\x1b[1;38;5;231;48;5;160m" in output
    assert "most surprising" in output
    _, output, _ = inspect(folder / "dump.yaml", "--row", 3)
    assert "\x1b[1;32m" in output
    assert "≥ 4.6" not in output
    assert "most surprising" not in output


def test_tokens_are_one_line_each_in_a_file_however_long(inspect, folder):
    row = LogitDataset.open(folder / "dump").read_shard(0)[3]
    _, output, _ = inspect(folder / "dump", "--row", 3, "--tokens")
    lines = output[: output.index("most surprising")].splitlines()
    assert len(lines) == 3 + row.num_tokens  # the row, its surprise, the table's head
    assert "'<|im_start|>'" in lines[3]


def test_at_shows_all_that_is_kept_and_marks_the_token_that_came(tokenizer, inspector):
    a, b, c, d = tokenizer("abcd", add_special_tokens=False).input_ids
    row = spoken_row([a, b, c], [{a: 0.1, b: 0.7}, {a: 0.5, b: 0.3, d: 0.1}])
    *above, tail, tail_1, tail_2, entropy, realised = printed(inspector, row, at=1).splitlines()
    table = [line.split() for line in above[3:]]
    assert above[1].split() == ["a", "⟦'b'⟧"]
    assert [line[:5] for line in table] == [
        ["▶", str(b), "'b'", "0.7", "-0.357"],
        [str(a), "'a'", "0.1", "-2.303", "██▍"],
    ]
    assert len(table[0][5]) > 6 * len(table[1][4]) - 4  # the bars are as the probabilities
    assert "mass 0.2 " in tail
    assert "= -1.609 at T = 1" in tail_1
    assert "= -0.609 at T = 2" in tail_2
    assert entropy.split() == ["entropy", "0.500", "nats"]
    assert realised.split(maxsplit=1)[1] == f"{b} 'b'  p 0.7, log p -0.357: number 1 of the 2 kept"
    missed = printed(inspector, row, at=2)
    assert "▶" not in missed
    assert missed.endswith(f"{c} 'c'  p 1e-05, log p -11.513: not kept, part of the tail\n")
    assert [line.split()[0] for line in missed.splitlines()[3:6]] == [str(a), str(b), str(d)]


def test_at_of_a_threshold_sample_shows_weights_and_no_tail(tokenizer, inspector):
    a, b, c = tokenizer("abc", add_special_tokens=False).input_ids
    row = spoken_row([a, b, c], [{a: 0.02, b: 0.97}, {a: 0.5, b: 0.52}], num_temperatures=0)
    shown = printed(inspector, row, at=2)
    assert "weight  log weight" in shown
    assert "Σ weight = 1.0200" in shown
    assert "log Σ" not in shown
    assert "mass" not in shown
    assert shown.endswith("p 1e-05, log p -11.513: not kept\n")
    table = printed(inspector, row, tokens=True)
    assert "Σ weight" in table
    assert "0.99 " in table
    said = inspector.as_json(row, "here", tokens=False, at=2)["at"]
    assert said["kept_are"] == "log weights"
    assert said["tail_logsum"] == []
    assert said["realised_rank"] is None


def test_at_for_programs_holds_what_the_dataset_holds(inspect, folder):
    row = LogitDataset.open(folder / "dump").read_shard(0)[3]
    position = 4
    t = int(row.source_index_P[position]) + 1
    only = row.teacher.split([position, 1, row.num_positions - position - 1])[1]
    code, output, _ = inspect(folder / "kd.yaml", "--row", 3, "--at", t, "--json")
    assert code == 0
    said = json.loads(output)["rows"][0]["at"]
    assert said["t"] == t
    assert said["token"][0] == row.input_ids_L[t]
    assert {token: logp for token, _, logp in said["kept"]} == dict(
        zip(only.kept_ids_E.tolist(), only.kept_logp_E.tolist(), strict=True)
    )
    assert said["tail_logsum"] == only.tail_logsum_PT[0].tolist()
    assert said["realised_logprob"] == only.realised_logp_P[0]
    _, table, _ = inspect(folder / "dump", "--row", 3, "--at", t)
    assert "at T = 2" in table


def test_at_says_which_tokens_there_are(inspect, folder, inspector):
    row = LogitDataset.open(folder / "dump").read_shard(0)[3]
    ts = np.flatnonzero(row.label_mask_L)
    for options in ([], ["--json"]):
        code, output, errors = inspect(folder / "dump", "--row", 3, "--at", 0, *options)
        assert (code, output) == (2, "")
        assert f"token 0 is not supervised; {len(ts)} are, the first at t = {ts[0]}, the last at t = {ts[-1]}" in errors
        assert f"next: --at {ts[0]} is the nearest" in errors
    code, _, errors = inspect(folder / "dump.yaml", "--at", ts[0])
    assert code == 2
    assert "is text, of which no teacher has said anything yet" in errors
    with pytest.raises(ConfigError, match="no supervised token"):
        printed(inspector, row.cut(int(ts[0])), at=1)


def test_a_row_of_a_dataset_without_a_position_is_shown(inspector, folder):
    row = LogitDataset.open(folder / "dump").read_shard(0)[3].cut(3)
    assert row.num_positions == 0
    assert printed(inspector, row).count("\n") == 2
    assert "mean_surprise" not in inspector.as_json(row, "here", tokens=True)


# --- text of tokens


@pytest.mark.parametrize("text", ["five 🦊🎉 birds", "ünïcödé\n\tfox", "數字", "  two  three ", "🦊", "a\ufffdb", ""])
@pytest.mark.parametrize("kind", ["byte level", "first", "legacy"])
def test_parts_of_a_row_are_its_text(tokenizer, text, kind):
    if kind != "byte level":
        tokenizer = make_spaced_tokenizer(kind, template=CHATML, control=[])
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(f"two{text}<|im_end|>three {text}").ids
    parts = Inspector(backend).tokens.of_row(ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == backend.decode(ids, skip_special_tokens=False)


def test_parts_of_characters_say_so(tokenizer, inspector):
    fox = tokenizer("a🦊b", add_special_tokens=False).input_ids
    assert inspector.tokens.of_row(fox) == ["a", "", "", "", "🦊", "b"]
    assert [inspector.tokens.quoted(token) for token in fox] == [
        "'a'", r"'\xf0'", r"'\x9f'", r"'\xa6'", r"'\x8a'", "'b'"
    ]  # fmt: skip
    assert inspector.tokens.name(fox[1]) == r"\xf0"
    assert inspector.tokens.name(10**6) == "<no token>"
    spaced = make_spaced_tokenizer("first", template=CHATML, control=[]).backend_tokenizer
    tokens = Inspector(spaced).tokens
    assert tokens.name(spaced.token_to_id("<0xF0>")) == r"\xf0"
    assert tokens.name(spaced.token_to_id("▁fox")) == " fox"


def test_bytes_that_never_become_a_character_take_linear_time(tokenizer, monkeypatch, inspector):
    broken = tokenizer("🦊", add_special_tokens=False).input_ids[1]
    decoded = []
    decode = inspector.tokens.decode
    monkeypatch.setattr(inspector.tokens, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    assert "".join(inspector.tokens.of_row([broken] * 2000)) == "\ufffd" * 2000
    assert max(decoded) < 100


def test_a_row_cannot_command_the_terminal(tokenizer, inspector):
    ids = tokenizer("a\x1b[31m\x07", add_special_tokens=False).input_ids
    row = spoken_row(ids, [{ids[-1]: 0.5}])
    for options in ({}, {"tokens": True}, {"at": len(ids) - 1}):
        assert "\x1b" not in printed(inspector, row, **options)
    assert "␛[31m" in printed(inspector, row)
