"""The pictures of the guides, from what `make quickstart` leaves: `make pictures`.

Terminal pictures are drawn by `logit-shards inspect --svg`; pages are photographed in Chromium, which has to be there.
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

import shared.logit_shards
import student_train.cli

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DATASET, ROW, SLIP = "dumps/student_train", 257, 37
"""A row with an error in its label, and the token of it that is wrong; the corpus is the same for everybody."""


def terminal_pictures(quickstart: Path, output: Path) -> None:
    """A record and a row of a dataset, as `inspect` shows them."""
    tokenizer = str(quickstart / "teacher/model")
    with contextlib.chdir(HERE.parent):
        chat = ["inspect", "examples/chat.jsonl", "--tokenizer", tokenizer]
        _run(shared.logit_shards.cli, *chat, "--svg", str(output / "inspect.svg"))
    with contextlib.chdir(quickstart):
        row = ["inspect", DATASET, "--row", str(ROW)]
        _run(shared.logit_shards.cli, *row, "--svg", str(output / "inspect_dataset.svg"))


def pages(quickstart: Path, folder: Path) -> dict[str, tuple[str, tuple[int, int]]]:
    """The address of the page behind each picture, and the window that it is looked at through."""
    row, report = folder / "row.html", folder / "report.html"
    with contextlib.chdir(quickstart):
        _run(shared.logit_shards.cli, "inspect", DATASET, "--row", str(ROW), "--html", str(row))
        _run(student_train.cli.cli, "report", "sft", "kd", "--output", str(report))
    token = f"r0t{SLIP}"
    if f'id="{token}"' not in row.read_text(encoding="utf-8"):
        raise click.ClickException(f"row {ROW} of {quickstart / DATASET} has no surprise at {SLIP}: another corpus?")
    return {"inspect_page.png": (f"{row.as_uri()}#{token}", (1200, 650)), "report.png": (report.as_uri(), (1200, 890))}


def photograph(browser: str, address: str, picture: Path, window: tuple[int, int]) -> None:
    with _new_folder() as profile:
        command = [
            browser, "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}",
            "--window-size={},{}".format(*window), f"--screenshot={picture}", address,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode or not picture.is_file():
        raise click.ClickException(f"{browser} made no {picture}:\n{done.stderr}")


@contextlib.contextmanager
def _new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _run(command: click.Group, *arguments: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        command.main(args=list(arguments), standalone_mode=False)


@click.command()
@click.option("--quickstart", type=click.Path(path_type=Path), default=Path("build/quickstart"), show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), default=HERE, help="Folder; by default where the guides look."
)
def main(quickstart: Path, output: Path) -> None:
    """Draw and photograph all of them."""
    if not (quickstart / "result.json").is_file():
        raise click.ClickException(f"{quickstart} holds no finished quickstart: make quickstart, then make pictures")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise click.ClickException(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    quickstart, output = quickstart.resolve(), output.resolve()
    terminal_pictures(quickstart, output)
    with _new_folder() as folder:
        for name, (address, window) in pages(quickstart, folder).items():
            photograph(browser, address, output / name, window)
    shutil.copy(quickstart / "curves.png", output / "quickstart/curves.png")


if __name__ == "__main__":
    main()
