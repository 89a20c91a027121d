"""The verbs of `logit-shards` that hand a dataset on: its card, `push` and `pull`."""

import click

from shared.card import card_again, written_card
from shared.cli import emit, json_option
from shared.dataset import CARD_NAME, LogitDataset
from shared.files import write_atomically
from shared.folders import local_output
from shared.licences import NOT_STATED, Licences, licences_in
from shared.progress import progress
from shared.pull import Source, num_files, part_of, pull
from shared.push import num_files as num_pushed
from shared.push import open_destination, push


@click.command("card")
@click.argument("dataset")
@click.option("--license", "licences", multiple=True, metavar="NAME", help="Licence of this dataset; repeatable.")
@click.option("--teacher-license", "teacher", multiple=True, metavar="NAME", help="Licence of the teacher.")
@click.option("--data-license", "texts", multiple=True, metavar="NAME", help="Licence of the texts.")
@click.option("--print", "only_print", is_flag=True, help="Print the card that would be written.")
@json_option
def card_command(
    dataset: str,
    licences: tuple[str, ...],
    teacher: tuple[str, ...],
    texts: tuple[str, ...],
    only_print: bool,
    as_json: bool,
) -> None:
    """Write the card (README.md) of DATASET anew.

    What it is, its licences, how to read it.  A licence that is not given stays as the card states it; '' takes it
    away.  Nothing else of the dataset changes, nor does its identity.
    """
    opened = LogitDataset.open_here(dataset)
    stated = licences_in(written_card(opened))
    given = Licences(
        dataset=_given(licences, stated.dataset),
        teacher=_given(teacher, stated.teacher),
        texts=_given(texts, stated.texts),
    )
    card = card_again(opened, given)
    path = opened.folder / CARD_NAME
    if not only_print:
        write_atomically(path, card.encode())
    result = {"card": card if only_print else str(path), "licences": vars(given)}
    lines = [
        str(path),
        *(f"  {name:<8} {', '.join(names) or NOT_STATED}" for name, names in vars(given).items()),
    ]
    emit(result, [card.removesuffix("\n")] if only_print else lines, as_json=as_json)


def _given(names: tuple[str, ...], stated: tuple[str, ...]) -> tuple[str, ...]:
    names_given = (name.encode(errors="replace").decode() for name in names)  # of a terminal with another encoding
    return tuple(dict.fromkeys(filter(None, names_given))) if names else stated


@click.command("push")
@click.argument("dataset")
@click.argument("destination")
@click.option("--public", is_flag=True, help="On the Hub: everybody may see it; otherwise a new repository is private.")
@click.option("--replace", is_flag=True, help="Take away another dataset that lies there.")
@json_option
def push_command(dataset: str, destination: str, public: bool, replace: bool, as_json: bool) -> None:
    """Bring DATASET to the Hub, to a folder or any fsspec URL.

    As hf://datasets/ORG/NAME, or s3://bucket/name.  What lies there already is not sent again.  Tokens and keys come
    from the environment: HF_TOKEN, AWS_….
    """
    opened = LogitDataset.open_here(dataset)
    with progress("push", num_pushed(opened), "files") as ticker:
        done = push(opened, open_destination(destination, public=public), replace=replace, on_file=ticker.advance)
    lines = [
        f"{done.destination}: {done.sent:,} files sent, {done.sent_bytes:,} bytes; {done.kept:,} were there"
        + (f"; {done.removed:,} of another dataset removed" if done.removed else ""),
        f"  identity  {done.identity}",
        f"  next: logit-shards pull {done.destination} FOLDER, or name it as a dataset of `student-train run`",
    ]
    emit(done.as_json(), lines, as_json=as_json)


@click.command("pull")
@click.argument("source")
@click.argument("folder")
@click.option("--shards", metavar="0-3,7", help="Only these shards, numbered from 0.")
@click.option("--share", type=float, metavar="0.1", help="Only this share of the rows, taken evenly.")
@json_option
def pull_command(source: str, folder: str, shards: str | None, share: float | None, as_json: bool) -> None:
    """Bring the dataset at SOURCE, or a part of it, to FOLDER.

    SOURCE is a path or URL as for `push`; every byte is compared with its digest.  What lies in FOLDER whole is not
    fetched again.  A part is a dataset of its own.
    """
    found = Source.open(source, local_output(folder))
    part = part_of(found.manifest, shards, share)
    with progress("pull", num_files(found.manifest, part), "files") as ticker:
        done = pull(found, part, on_file=ticker.advance)
    lines = [
        f"{done.folder}: {done.rows:,} rows in {done.shards:,} shards; "
        f"{done.fetched:,} files fetched, {done.kept:,} were here",
        f"  identity  {done.identity}" + ("" if part is None else f", {part.said} of {done.source_identity[:16]}…"),
        f"  next: logit-shards info {done.folder}",
    ]
    emit(done.as_json(), lines, as_json=as_json)


SHARING = (card_command, push_command, pull_command)
