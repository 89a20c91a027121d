"""`logit-shards inspect --html`: the page says what the dataset says, and nothing that is in data runs."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from shared import inspection_html
from shared.dataset import LogitDataset
from shared.errors import ConfigError
from shared.inspection import Inspector, surprise_step
from shared.inspection_html import html_page
from shared.rows import LogitRow, Positions, Row
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.shared.test_inspection import inspect, spoken_row  # noqa: F401
from tests.tiny import make_tokenizer

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    '"><b onclick=x>',
    "' title='&lt;",
    "]]>&amp;",
    "${title}$data",
]


class Page(HTMLParser):
    """Elements of a page with their attributes, the text of each token, and what the scripts hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.spans: list[list[tuple[dict[str, str | None], str]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.style = self.heading = ""
        self.feed(html)
        self.close()
        (self.data,) = [json.loads(text) for attributes, text in self.scripts if attributes]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            if tag == "div" and dict(attrs).get("class") == "text":
                self.spans.append([])
            if tag == "span" and self.open[-1][1].get("class") == "text":
                self.spans[-1].append((dict(attrs), ""))
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside, attributes = self.open[-1] if self.open else ("", {})
        if inside == "script":
            self.scripts.append((attributes, data))
        elif inside == "style":
            self.style += data
        elif inside == "h1":
            self.heading += data
        elif len(self.open) > 1 and any(element.get("class") == "text" for _, element in self.open):
            attributes, text = self.spans[-1][-1]
            self.spans[-1][-1] = (attributes, text + data)

    def text(self, number: int = 0) -> str:
        return "".join(text for _, text in self.spans[number])


@pytest.fixture(scope="module")
def dump(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("pages")
    files = write_jsonl(folder / "chats.jsonl", chat_records(7))
    sealed_dump(dump_settings(teacher_folder, files, folder / "dump", keep__k=5))
    return folder / "dump"


@pytest.fixture
def inspector(tokenizer):
    return Inspector(tokenizer.backend_tokenizer, [1.0, 2.0])


def test_page_holds_what_the_dataset_holds(dump):
    dataset = LogitDataset.open(dump)
    rows = dataset.read_shard(0)[1:4]
    inspector = Inspector(dataset.tokenizer(), dataset.manifest.temperatures)
    page = Page(html_page(inspector, [(row, f"data[{n}]") for n, row in enumerate(rows)], title="a dump"))
    assert page.heading == "a dump"
    assert page.data["temperatures"] == [1.0, 2.0]
    ids = np.array(page.data["ids"])
    assert len(set(page.data["ids"])) == len(ids) == len(page.data["names"])
    # The frequent ones have the short numbers.
    shown_ids = np.concatenate([ids for row in rows for ids in (row.input_ids_L, row.teacher.kept_ids_E)])
    assert np.diff([np.count_nonzero(shown_ids == token) for token in ids]).max() <= 0
    for number, (row, shown) in enumerate(zip(rows, page.data["rows"], strict=True)):
        teacher = shown["teacher"]
        assert ids[shown["tokens"]].tolist() == row.input_ids_L.tolist()
        assert shown["supervised"] == np.flatnonzero(row.label_mask_L).tolist()
        assert teacher["counts"] == teacher["all"] == row.teacher.kept_counts_P.tolist()
        assert not teacher["weighted"]
        for name, exact in (("realised", row.teacher.realised_logp_P), ("entropy", row.teacher.entropy_P)):
            np.testing.assert_allclose(np.array(teacher[name]) / 1000, exact, atol=6e-4)
        np.testing.assert_allclose(np.array(teacher["tail"]) / 1000, row.teacher.tail_logsum_PT, atol=6e-4)
        ends = np.cumsum([0, *teacher["counts"]])
        for begin, end, only in zip(ends, ends[1:], row.teacher.split([1] * row.num_positions), strict=False):
            logps = teacher["logp"][begin:end]
            assert logps == sorted(logps, reverse=True)
            kept = dict(zip(ids[teacher["kept"][begin:end]].tolist(), logps, strict=True))
            exact = dict(zip(only.kept_ids_E.tolist(), only.kept_logp_E.tolist(), strict=True))
            assert kept == pytest.approx({token: logp * 1000 for token, logp in exact.items()}, abs=0.6)
        assert page.text(number) == dataset.tokenizer().decode(row.input_ids_L.tolist(), skip_special_tokens=False)


def test_page_colours_tokens_and_lists_the_most_surprising(dump):
    dataset = LogitDataset.open(dump)
    row = dataset.read_shard(0)[2]
    page = Page(html_page(Inspector(dataset.tokenizer(), [1.0, 2.0]), [(row, "data[2]")], title="a dump"))
    spans = page.spans[0]
    assert len(spans) == row.num_tokens
    surprises = iter(-row.teacher.realised_logp_P)
    for (attributes, _), mark in zip(spans, row.label_mask_L, strict=True):
        classes = (attributes.get("class") or "").split()
        assert [name for name in classes if name[0] == "s"] == ([f"s{surprise_step(next(surprises))}"] if mark else [])
        assert ("title" in attributes) == mark
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    hottest = np.argsort(row.teacher.realised_logp_P, kind="stable")[: len(links)]
    assert links == [f"#r0t{t}" for t in row.source_index_P[hottest] + 1]
    assert len(links) == 10
    assert {f"#{attributes['id']}" for attributes, _ in spans if "id" in attributes} == set(links)


@pytest.mark.parametrize("place", ["token", "row id and title"])
def test_page_runs_nothing_that_is_in_its_data(tmp_path, place):
    tokenizer = make_tokenizer(tmp_path, added=HOSTILE).backend_tokenizer
    ids = tokenizer.encode(f"a{''.join(HOSTILE)} fox").ids
    hostile_ids = [tokenizer.token_to_id(text) for text in HOSTILE]
    assert set(hostile_ids) < set(ids)
    row = spoken_row(ids, [dict.fromkeys(hostile_ids, 0.1)] * (len(ids) - 1))
    plain = spoken_row(ids[:1] * len(ids), [{ids[0]: 0.1}] * (len(ids) - 1))
    inspector, evil = Inspector(tokenizer, [1.0, 2.0]), "".join(HOSTILE)
    if place == "token":
        html = html_page(inspector, [(row, "data[0]")], title="x")
    else:
        named = Row(sample_id=evil, input_ids_L=plain.input_ids_L, label_mask_L=plain.label_mask_L)
        html = html_page(inspector, [(named, evil), (plain, evil)], title=evil)
    page = Page(html)
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "div", "main", "section", "span",
        "details", "summary", "ol", "li", "a", "code", "small", "aside", "script",
    }  # fmt: skip
    names = {name for _, attributes in page.elements for name in attributes}
    assert names <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "id", "title", "dir", "href", "type", "hidden",
        "open", "aria-label", "aria-live",
    }  # fmt: skip
    assert [attributes for attributes, _ in page.scripts] == [{"type": "application/json", "id": "data"}, {}]
    assert page.scripts[1][1] == inspection_html.SCRIPT
    if place == "token":
        assert page.text() == tokenizer.decode(ids, skip_special_tokens=False)
        assert set(HOSTILE) <= set(page.data["names"])
        data = html[html.index('id="data">') + 10 :]
        assert not re.search("[<>&]", data[: data.index("</script>")])
    else:
        assert page.heading == evil


def test_page_needs_nothing_else_and_lets_nothing_else_run(inspector):
    html = html_page(inspector, [(spoken_row([5, 6], [{6: 0.5}]), "data[0]")], title="x")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|innerHTML|document\.write|eval\(", html)
    page = Page(html)
    (policy,) = [attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes]
    digests = [
        base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        for source in (page.style, page.scripts[1][1])
    ]
    assert policy == f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"


def test_page_shows_parts_of_a_character_once(tokenizer, inspector):
    text = "a🦊\n\tb\x00"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    page = Page(html_page(inspector, [(spoken_row(ids, [{ids[0]: 0.5}] * (len(ids) - 1)), "data[0]")], title="x"))
    assert page.text() == "a🦊\n\tb␀"
    assert [(attributes["class"].split()[1:], shown) for attributes, shown in page.spans[0][1:5]] == [
        (["e"], ""),
        (["e"], ""),
        (["e"], ""),
        ([], "🦊"),
    ]
    assert r"\xf0" in page.data["names"]
    assert r"'\xf0' p " in page.spans[0][1][0]["title"]


def test_page_of_a_threshold_sample_and_of_an_empty_tail(tokenizer, inspector):
    a, b = tokenizer("ab", add_special_tokens=False).input_ids
    sample = spoken_row([a, b], [{a: 0.02, b: 0.97}], num_temperatures=0)
    whole = spoken_row([a, b], [{a: 0.25, b: 0.75}])
    page = Page(html_page(inspector, [(sample, "data[0]"), (whole, "data[1]")], title="x"))
    first, second = [row["teacher"] for row in page.data["rows"]]
    assert (first["weighted"], first["tail"]) == (True, [[]])
    assert (second["weighted"], second["tail"]) == (False, [[None, None]])


def test_page_of_text_shows_what_is_supervised(inspect, dump, teacher_folder, tmp_path):  # noqa: F811
    target = tmp_path / "deep" / "page.html"
    code, output, _ = inspect(
        dump.parent / "chats.jsonl", "--tokenizer", teacher_folder, "--count", 2, "--html", target
    )
    assert code == 0
    assert output == f"{target}: 2 rows; open it in a browser\n"
    page = Page(target.read_text(encoding="utf-8"))
    assert page.heading == str(dump.parent / "chats.jsonl")
    for spans, row in zip(page.spans, page.data["rows"], strict=True):
        assert row["teacher"] is None
        marked = [t for t, (attributes, _) in enumerate(spans) if (attributes.get("class") or "").startswith("y")]
        assert marked == row["supervised"] != []


def test_page_comes_from_the_verb_with_the_datasets_temperatures(inspect, dump, tmp_path):  # noqa: F811
    code, output, _ = inspect(dump, "--id", "chat-2", "--html", tmp_path / "page.html")
    assert code == 0
    assert "⟦" not in output
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.data["temperatures"] == [1.0, 2.0]
    assert len(page.spans) == 1


def big_row(num_positions: int, num_kept: int) -> LogitRow:
    """Ids and values that cannot be guessed, as large as they come."""
    rng = np.random.default_rng(0)
    num_entries = num_positions * num_kept
    logp_PK = -np.sort(rng.uniform(0.001, 16, (num_positions, num_kept)), axis=1)
    ids_PK = np.sort(rng.integers(0, 300, (num_positions, num_kept)), axis=1)
    teacher = Positions(
        kept_counts_P=np.full(num_positions, num_kept, np.int32),
        kept_ids_E=ids_PK.reshape(num_entries).astype(np.int32),
        kept_logp_E=logp_PK.reshape(num_entries).astype(np.float32),
        realised_logp_P=logp_PK[:, -1].astype(np.float32),
        entropy_P=np.ones(num_positions, np.float32),
        tail_logsum_PT=np.full((num_positions, 1), -5, np.float32),
    )
    ids_L = rng.integers(0, 300, num_positions + 1).astype(np.int32)
    return LogitRow(sample_id="big", input_ids_L=ids_L, label_mask_L=np.arange(num_positions + 1) > 0, teacher=teacher)


def test_page_of_a_big_row_is_small(inspector):
    row = big_row(4000, 64)
    html = html_page(inspector, [(row, "data[0]")], title="x")
    assert len(html.encode()) < 4_000_000  # 16 bytes for each of the kept
    assert "more kept" not in html.split("<script>")[0]


def test_page_leaves_out_what_is_too_much_and_says_so(inspector, monkeypatch):
    monkeypatch.setattr(inspection_html, "MAX_KEPT", 99)
    row = big_row(31, 17)
    html = html_page(inspector, [(row, "data[0]")], title="x")
    assert "of each position the 3 most probable of the kept are shown" in html
    teacher = Page(html).data["rows"][0]["teacher"]
    assert teacher["counts"] == [3] * 31
    assert teacher["all"] == [17] * 31
    best = np.sort(row.teacher.kept_logp_E.reshape(31, 17), axis=1)[:, :-4:-1]
    np.testing.assert_allclose(np.array(teacher["logp"]).reshape(31, 3) / 1000, best, atol=6e-4)
    monkeypatch.setattr(inspection_html, "MAX_TOKENS", 63)
    with pytest.raises(ConfigError, match="2 rows with 64 tokens are too many for one page, which holds 63"):
        html_page(inspector, [(row, "data[0]")] * 2, title="x")
