"""The command `logit-shards`: what is in a dataset, and is it whole?  Needs no torch."""

from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from shared.cli import command_group, emit, json_option, run_command
from shared.dataset import LogitDataset, read_info
from shared.errors import ConfigError, DamagedDataError
from shared.exchange.commands import export_command, import_command
from shared.files import write_atomically
from shared.folders import local_output
from shared.inspected import Selection, next_step, open_inspected
from shared.inspection import Inspector
from shared.inspection_html import html_page
from shared.manifest import losses_line
from shared.progress import progress
from shared.reseal import filter_rows, merge, repair
from shared.shard_reader import REPAIR
from shared.sharing import SHARING
from shared.verification import verify

PICTURE_COLUMNS = 100
FILE_COLUMNS = 10_000  # elsewhere than on a terminal one line is one token, however long


@command_group("logit-shards", "Look into, check and hand on datasets of teacher log-probabilities.")
def cli() -> None:
    pass


@cli.command("info")
@click.argument("dataset")
@json_option
def info_command(dataset: str, as_json: bool) -> None:
    """Say what DATASET holds, from its manifest alone."""
    info = read_info(dataset)
    emit(info, _info_lines(dataset, info), as_json=as_json)


@cli.command("verify")
@click.argument("dataset")
@click.option("--deep", is_flag=True, help="Also decode every value and check alignment, ranges and mass.")
@json_option
def verify_command(dataset: str, deep: bool, as_json: bool) -> None:
    """Compare every byte of DATASET with what its manifest says."""
    opened = LogitDataset.open_here(dataset)
    with progress("verify", len(opened.manifest.shards), "shards") as ticker:
        found = verify(opened, deep=deep, on_shard=ticker.advance)
    result = {
        "ok": not found.faults,
        "shards": found.shards,
        "rows": found.rows,
        "positions": found.positions,
        "faults": found.faults,
        "card_is_new": found.card_is_new,
    }
    whole = [f"{dataset}: whole; {found.shards} shards, {found.rows:,} rows, {found.positions:,} positions read"]
    if found.card_is_new:
        whole.append("  README.md was written anew since it was sealed")
    emit(result, found.faults or whole, as_json=as_json)
    if found.faults:
        raise DamagedDataError(
            f"{dataset}: {len(found.faults)} fault{'s' * (len(found.faults) > 1)}",
            next_step=REPAIR.format(dataset),
        )


@cli.command("repair")
@click.argument("dataset")
@json_option
def repair_command(dataset: str, as_json: bool) -> None:
    """Take damaged and missing shards out of DATASET.

    It verifies then, and its dump can make them again.  Their files are moved to a folder beside the dataset.
    """
    opened = LogitDataset.open_here(dataset)
    with progress("verify", len(opened.manifest.shards), "shards") as ticker:
        damaged = repair(opened, ticker.advance)
    manifest = LogitDataset.open_here(dataset).manifest
    rows = manifest.total("rows")
    lines = [f"{dataset}: {len(damaged)} shards taken out, {rows:,} rows left", *(f"  {path}" for path in damaged)]
    if manifest.missing:
        lines.append("  next: run the dump that made it again: it makes the missing shards, and those alone")
    emit({"removed_shards": damaged, "missing": manifest.missing, "rows": rows}, lines, as_json=as_json)


@cli.command("merge")
@click.argument("datasets", nargs=-1, required=True)
@click.option("--output", required=True, help="Folder of the new dataset.")
@json_option
def merge_command(datasets: tuple[str, ...], output: str, as_json: bool) -> None:
    """Join DATASETS of one teacher, tokenizer and setting.  Their shards are copied byte for byte."""
    opened = [LogitDataset.open_here(folder) for folder in datasets]
    with progress("merge", sum(len(dataset.manifest.shards) for dataset in opened), "shards") as ticker:
        merged = merge(opened, local_output(output), ticker.advance)
    _emit_new(merged, as_json=as_json)


@cli.command("filter")
@click.argument("dataset")
@click.option("--output", required=True, help="Folder of the new dataset.")
@click.option("--source", "sources", multiple=True, help="Leave out the rows of this source; repeatable.")
@click.option("--sample-ids", type=click.Path(), help="File with one sample id on each line; these rows are left out.")
@click.option("--reason", help="Why, for the history in the manifest.")
@json_option
def filter_command(
    dataset: str, output: str, sources: tuple[str, ...], sample_ids: str | None, reason: str | None, as_json: bool
) -> None:
    """Write DATASET anew without some of its rows.  A licence was withdrawn, a benchmark leaked in."""
    ids = _read_lines(Path(sample_ids)) if sample_ids else []
    if not ids and not sources:
        raise ConfigError("nothing is to be left out", next_step="give --source NAME or --sample-ids FILE")
    opened = LogitDataset.open_here(dataset)
    with progress("filter", len(opened.manifest.shards), "shards") as ticker:
        filtered = filter_rows(
            opened, local_output(output), sample_ids=ids, sources=sources, reason=reason, on_shard=ticker.advance
        )
    _emit_new(filtered, as_json=as_json)


def _emit_new(dataset: LogitDataset, *, as_json: bool) -> None:
    info = dataset.info()
    emit(info, _info_lines(str(dataset.folder), info), as_json=as_json)


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line.removesuffix("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not (found := [line for line in lines if line]):
        raise ConfigError(f"{path} holds no sample id")
    return found


@cli.command("inspect")
@click.argument("path")
@click.option("--tokenizer", metavar="MODEL", help="Whose tokenizer reads plain text; a config names its own.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override one setting; repeatable.")
@click.option(
    "--row", default=0, show_default=True, type=click.IntRange(min=0), help="Number of the first row to show."
)
@click.option("--count", default=1, show_default=True, type=click.IntRange(min=1), help="How many rows to show.")
@click.option("--id", "sample_id", help="Show the row with this sample id instead.")
@click.option("--worst", is_flag=True, help="Of all rows of a dataset, those with the most surprising tokens first.")
@click.option("--tokens", is_flag=True, help="One line for each token; of a dataset also what the teacher said.")
@click.option("--at", metavar="T", type=int, help="All that the teacher said about token T of each row.")
@click.option("--all", "read_all", is_flag=True, help="Read everything and say what becomes of it.")
@click.option("--svg", type=click.Path(dir_okay=False), help="Also draw it as a picture into this file.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write the rows as a page for a browser instead.")
@json_option
def inspect_command(
    path: str,
    tokenizer: str | None,
    overrides: tuple[str, ...],
    row: int,
    count: int,
    sample_id: str | None,
    worst: bool,
    tokens: bool,
    at: int | None,
    read_all: bool,
    svg: str | None,
    html: str | None,
    as_json: bool,
) -> None:
    """Show rows as the trainer will see them.  Supervised tokens in colour, by the teacher's surprise in a dataset.

    PATH is a text file (with --tokenizer), the config of a dump or a training, or a dataset.
    """
    inspected = open_inspected(path, tokenizer, overrides)
    inspector = Inspector(inspected.tokenizer, inspected.temperatures)
    shown = list(inspected.rows(Selection(first=row, count=count, sample_id=sample_id, worst_first=worst)))
    if not shown and not read_all:
        wanted = f"sample id {sample_id!r}" if sample_id else f"number {row}"
        raise ConfigError(
            f"{path}: there is no row to show with {wanted}",
            next_step=f"rows are counted from 0; logit-shards inspect {path} --all says how many there are",
        )
    summary = inspected.summary() if read_all else None
    if html is not None:
        write_atomically(Path(html), html_page(inspector, shown, title=path).encode("utf-8", "replace"))
    if as_json:
        rows = [inspector.as_json(each, where, tokens=tokens, at=at) for each, where in shown]
        emit({"rows": rows, "summary": summary}, [], as_json=True)
        return
    if svg is not None:
        picture = Console(record=True, file=StringIO(), width=PICTURE_COLUMNS, color_system="truecolor")
        for each, where in shown:
            picture.print(*inspector.lines(each, where, plain=False, tokens=tokens, at=at), sep="\n")
        write_atomically(Path(svg), picture.export_svg(title=f"logit-shards inspect {path}").encode())
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = FILE_COLUMNS
    for each, where in shown if html is None or at is not None else []:
        for line in inspector.lines(each, where, plain=console.color_system is None, tokens=tokens, at=at):
            console.print(line)
    if html is not None:
        click.echo(f"{html}: {len(shown)} row{'s' * (len(shown) != 1)}; open it in a browser")
    if summary:
        console.print(f"all of {path}: {summary}")
    if shown and not overrides and (step := next_step(path)):
        console.print(f"  next: {step}")


for verb in (*SHARING, import_command, export_command):
    cli.add_command(verb)


def _info_lines(dataset: str, info: dict[str, Any]) -> list[str]:
    teacher, keep = info["teacher"], info["keep"]
    losses = ", ".join(f"{loss:.2g} nats at T = {temperature}" for temperature, loss in info["mean_loss_nats"].items())
    revision = teacher["revision"] or (teacher["weights_sha256"] or "")[:16]
    return [
        f"{dataset}: format version {info['format_version']}, {info['shards']} shards, {info['size_bytes']:,} bytes",
        f"  identity    {info['identity']}",
        f"  rows        {info['rows']:,} with {info['tokens']:,} tokens, {info['positions']:,} positions"
        + losses_line(sum((Counter(each["tally"]) for each in info["inputs"]), Counter())),
        f"  teacher     {teacher['name']} ({teacher['architecture']}, {teacher['dtype']}, {revision})",
        f"  tokenizer   {info['tokenizer_fingerprint'][:16]}…, vocabulary of {info['vocab_size']:,}",
        f"  kept        {', '.join(f'{name} {value}' for name, value in keep.items())}",
        f"              {info['kept_per_position']:.2f} ids per position, {info['kept_mass']:.4%} of the mass",
        f"  temperature {', '.join(f'{temperature:g}' for temperature in info['temperatures'])}",
        f"  size        {info['bytes_per_position']:.1f} bytes per position",
        f"  rounding    lost {losses} on average",
        *(f"  missing     {path}: run the dump again to make it" for path in info["missing"]),
        *(f"  history     {_event_line(event)}" for event in info["history"]),
    ]


def _event_line(event: dict[str, Any]) -> str:
    removed = f"{event['removed_rows']:,} rows removed" if event["removed_rows"] else ""
    shards = f"without {', '.join(event['removed_shards'])}" if event["removed_shards"] else ""
    sources = f"sources {', '.join(event['removed_sources'])}" if event["removed_sources"] else ""
    parents = "of " + ", ".join(identity[:16] + "…" for identity in event["parents"])
    return "; ".join(filter(None, [f"{event['operation']} {parents}", removed, sources, shards, event["reason"]]))


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
