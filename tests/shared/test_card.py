"""The card says what a stranger wants to know, and what it says about reading is run as it stands there."""

import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from click.testing import CliRunner

from shared.card import KEPT_BELOW, MAX_CARD_BYTES, dataset_card, written_card
from shared.dataset import LogitDataset
from shared.errors import ConfigError
from shared.licences import Licences, header_of, joined, licences_in
from shared.logit_shards import cli
from shared.manifest import Event, Input, InputFile, Teacher
from shared.reseal import filter_rows, merge, repair
from shared.verification import verify
from tests.shared.made_datasets import made_rows, write_dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("made") / "set", [made_rows(number, 4) for number in range(3)])


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def card(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(cli, ["card", str(folder), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return (folder / "README.md").read_text(encoding="utf-8")


def test_card_says_what_the_dataset_is(folder: Path):
    text = card(folder, "--license", "cc-by-4.0", "--teacher-license", "Apache-2.0", "--data-license", "ODC-BY")
    for said in (
        "| teacher | `made up`, revision `0000000000000000000000000000000000000000` |",
        "| licence of the teacher | Apache-2.0 |",
        "| licence of the texts | ODC-BY |",
        "| licence of this dataset | cc-by-4.0 |",
        "| rows | 12 |",
        "| vocabulary | 37 |",
    ):
        assert said in text
    manifest = LogitDataset.open(folder).manifest
    size = sum(path.stat().st_size for path in folder.glob("data/*"))
    assert f"| size on disk | {size:,} bytes in 3 shards |" in text
    assert f"{manifest.total('teacher_bytes') / manifest.total('positions'):.1f} bytes per position" in text
    assert f"{manifest.loss_nats[0]:.2g} nats per position" in text
    assert manifest.tokenizer_fingerprint in text
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["size_categories"] == ["n<1K"]


def test_card_without_licences_says_that_nobody_stated_them(folder: Path):
    text = card(folder)
    assert text.count("| not stated |") == 3
    assert "license" not in header_of(text)


def test_card_changes_neither_the_identity_nor_what_verify_says(folder: Path):
    before = LogitDataset.open(folder).identity()
    card(folder, "--license", "mit")
    after = LogitDataset.open(folder)
    assert after.identity() == before
    assert verify(after, deep=False).faults == []


def test_a_licence_stays_until_another_is_given_or_it_is_taken_away(folder: Path):
    card(folder, "--license", "mit", "--teacher-license", "Qwen Research")
    card(folder, "--data-license", "CC0-1.0")
    found = licences_in(card(folder))
    assert found == Licences(dataset=("mit",), teacher=("Qwen Research",), texts=("CC0-1.0",))
    assert licences_in(card(folder, "--teacher-license", "")).teacher == ()


def test_a_licence_that_the_hub_does_not_know_is_other_with_a_name(folder: Path):
    header = header_of(card(folder, "--license", "Ours: as is", "--license", "MIT"))
    assert header["license"] == ["mit", "other"]
    assert header["license_name"] == "Ours: as is"
    assert licences_in(card(folder)).dataset == ("Ours: as is", "MIT")


def test_a_licence_that_was_edited_on_the_hub_is_taken(folder: Path):
    text = card(folder, "--license", "mit").replace("license: mit", "license: cc-by-4.0")
    (folder / "README.md").write_text(text, encoding="utf-8")
    assert licences_in(text).dataset == ("cc-by-4.0",)
    assert "| licence of this dataset | cc-by-4.0 |" in card(folder)


@pytest.mark.parametrize("text", ["", "no header", "---\n- a\n---\n", "---\n{\n---\n", "---\nlogitferry: 7\n---\n"])
def test_a_card_that_cannot_be_read_states_nothing(text: str):
    assert licences_in(text) == Licences()


def test_what_people_wrote_below_the_line_is_kept(folder: Path):
    text = card(folder)
    (folder / "README.md").write_text(text + "## Thanks\nto all.\n", encoding="utf-8")
    assert card(folder, "--license", "mit").endswith(f"{KEPT_BELOW}\n## Thanks\nto all.\n")


def test_what_was_written_with_another_editor_is_kept(folder: Path):
    text = card(folder, "--license", "mit") + "## Thanks\nto all.\n"
    (folder / "README.md").write_bytes(text.replace("\n", "\r\n").encode())
    assert card(folder).endswith(f"\n{KEPT_BELOW}\n## Thanks\nto all.\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Ours\nof 2026\n", encoding="utf-8")
    for _ in range(2):
        text = card(folder)
        assert text.endswith(f"\n{KEPT_BELOW}\n# Ours\nof 2026\n"), "a card without the line is kept below it"
    assert licences_in(text).dataset == ("mit",)


def test_a_card_too_large_to_be_kept_is_not_written_over(folder: Path):
    (folder / "README.md").write_bytes(large := b"x" * (MAX_CARD_BYTES + 1))
    result = CliRunner().invoke(cli, ["card", str(folder)])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.next_step
    assert (folder / "README.md").read_bytes() == large


@pytest.mark.parametrize(
    "name", ["mine ---", "---", "a\n---\nb", "a: b", "a\r\nb", "a|b", KEPT_BELOW, "null", "\udcff"]
)
def test_a_licence_may_have_any_name(name: str, folder: Path):
    text = card(folder, "--license", name, "--teacher-license", name)
    stated = (name.replace("\udcff", "?"),)
    assert (licences_in(text).dataset, licences_in(text).teacher) == (stated, stated)
    assert card(folder) == text
    (line,) = [line for line in text.splitlines() if "licence of this dataset" in line]
    assert line.replace("\\|", "").count("|") == 3


def test_what_a_manifest_says_stays_in_its_line(tmp_path: Path):
    evil = f"x`\n---\n| licence of the texts | mit |\n{KEPT_BELOW}\n# y"
    teacher = Teacher(name=evil, architecture=evil, dtype="float32", vocab_size=37, revision=evil)
    inputs = [Input(files=[InputFile(name=evil, sha256="0" * 64)], settings={}, tally={})]
    history = [Event(operation="filter", parents=["0" * 64], reason=evil)]
    folder = write_dataset(
        tmp_path / "set", [made_rows(0, 2)], teacher=teacher, inputs=inputs, history=history, created_by=evil
    )
    text = card(folder)
    assert card(folder) == text
    lines = text.splitlines()
    assert lines.count(KEPT_BELOW) == 1
    assert lines.count("---") == 2
    assert len([line for line in lines if line.startswith("| licence of the texts")]) == 1
    assert len([line for line in lines if line.startswith("# ")]) == 1


def test_card_prints_and_writes_nothing(folder: Path):
    before = (folder / "README.md").read_bytes()
    result = CliRunner().invoke(cli, ["card", str(folder), "--license", "mit", "--print"])
    assert "license: mit" in result.output
    assert (folder / "README.md").read_bytes() == before
    told = json.loads(CliRunner().invoke(cli, ["card", str(folder), "--license", "mit", "--json"]).output)
    assert told == {"card": str(folder / "README.md"), "licences": {"dataset": ["mit"], "teacher": [], "texts": []}}


def test_licences_go_on_to_what_is_merged_filtered_and_repaired(folder: Path, tmp_path: Path):
    other = write_dataset(tmp_path / "other", [made_rows(7, 3)])
    card(folder, "--license", "mit", "--teacher-license", "apache-2.0", "--data-license", "odc-by")
    card(other, "--license", "cc0-1.0", "--teacher-license", "apache-2.0")
    one, two = LogitDataset.open(folder), LogitDataset.open(other)
    merged = licences_in(written_card(merge([one, two], tmp_path / "merged")))
    assert merged == Licences(dataset=("mit", "cc0-1.0"), teacher=("apache-2.0",), texts=())
    filtered = filter_rows(one, tmp_path / "filtered", sample_ids=["0-zeile-ü-0"])
    assert licences_in(written_card(filtered)).texts == ("odc-by",)
    (folder / "data/part-00000.parquet").write_bytes(b"")
    repair(one)
    repaired = written_card(LogitDataset.open(folder))
    assert licences_in(repaired).dataset == ("mit",)
    assert "**1 shards are missing.**" in repaired


def test_where_one_states_no_licence_nobody_knows_that_of_the_whole():
    stated, silent = Licences(dataset=("mit",), texts=("odc-by",)), Licences(dataset=("mit",))
    assert joined([stated, silent]) == Licences(dataset=("mit",))


@pytest.mark.parametrize(
    ("rows", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (123_456, "100K<n<1M"), (10**12 - 1, "100B<n<1T"), (10**12, "n>1T")],
)
def test_size_categories_are_those_of_the_hub(rows: int, category: str, made: Path):
    manifest = LogitDataset.open(made).manifest
    shard = manifest.shards[0].model_copy(update={"rows": rows})
    assert header_of(dataset_card(manifest.model_copy(update={"shards": [shard]})))["size_categories"] == [category]


def test_what_the_card_says_about_reading_is_true(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    blocks = re.findall(r"```python\n(.*?)```", card(folder, "--license", "mit"), flags=re.DOTALL)
    assert [name for name in ("load_dataset", "duckdb", "polars", "LogitDataset") if name in "".join(blocks)]
    assert len(blocks) == 4
    monkeypatch.chdir(folder.rename(folder.with_name("my-dataset")).parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder.parent / "cache"))
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
        assert capsys.readouterr().out
