"""The verbs `import` and `export` of `logit-shards`."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from shared.cli import emit, json_option
from shared.config import load_settings
from shared.dataset import LogitDataset
from shared.errors import ConfigError
from shared.exchange import axolotl, distillkit
from shared.exchange.alignment import OFFSETS
from shared.exchange.exporting import ExportSettings, Form, export_dataset
from shared.exchange.foreign_tokenizer import read_tokenizer
from shared.exchange.importing import ImportSettings, Tail, import_dataset
from shared.exchange.lists import ForeignRow
from shared.exchange.records import ForeignRecord
from shared.folders import local_output
from shared.manifest import losses_line
from shared.progress import progress
from shared.text_files import find_text_files


@click.command("import")
@click.argument("sources", nargs=-1, required=True)
@click.option("--from", "form", type=click.Choice(["axolotl", "distillkit"]), required=True, help="Whose files.")
@click.option("--output", required=True, type=click.Path(), help="Folder of the new dataset.")
@click.option("--tokenizer", required=True, metavar="MODEL", help="Folder or Hub name of the tokenizer of the ids.")
@click.option("--teacher", required=True, metavar="NAME", help="The model that gave the log-probabilities.")
@click.option("--revision", help="Its commit on the Hub, where it is known.")
@click.option("--vocab-size", required=True, type=click.IntRange(min=1), help="The teacher's config.vocab_size.")
@click.option(
    "--offset", type=click.IntRange(OFFSETS[0], OFFSETS[-1]), default=1, show_default=True,
    help="The list at index i is about token i + OFFSET.",
)  # fmt: skip
@click.option(
    "--tail", type=click.Choice(["auto", "difference", "unknown"]), default="auto", show_default=True,
    help="What lists leave out: 1 − their sum, or unknown since they were renormalised; auto refuses such lists.",
)  # fmt: skip
@click.option(
    "--on-wrong-list", type=click.Choice(["error", "drop"]), default="error", show_default=True,
    help="Lists that add up to more than one: drop leaves their tokens unsupervised.",
)  # fmt: skip
@click.option("--everything", is_flag=True, help="DistillKit's records without labels: supervise every token.")
@click.option("--compression-config", type=click.Path(), help="DistillKit's, where it does not lie beside the files.")
@click.option(
    "--max-kl", type=click.FloatRange(0, 0.01), default=0.0, show_default=True,
    help="Round as far as this loss allows, in nats; 0 stores every bit.",
)  # fmt: skip
@json_option
def import_command(
    sources: tuple[str, ...],
    form: str,
    output: str,
    tokenizer: str,
    teacher: str,
    revision: str | None,
    vocab_size: int,
    offset: int,
    tail: Tail,
    on_wrong_list: str,
    everything: bool,
    compression_config: str | None,
    max_kl: float,
    as_json: bool,
) -> None:
    """Make a dataset from SOURCES of another toolkit.  Files, folders, globs; see shared/EXCHANGE.md."""
    files = find_text_files(sources)
    read: Any = partial(_axolotl_rows, vocab_size=vocab_size)
    columns, read_with = axolotl.COLUMNS, {}
    if form == "distillkit":
        packing = load_settings(distillkit.Packing, compression_config or _config_beside(sources))
        read = partial(_distillkit_rows, packing=packing, everything=everything, vocab_size=vocab_size)
        columns, read_with = distillkit.COLUMNS, {"packing": packing.model_dump(mode="json")}
    elif everything or compression_config:
        raise ConfigError("--everything and --compression-config are for --from distillkit")
    settings = ImportSettings(
        format=form,
        columns=columns,
        read=read,
        teacher=teacher,
        revision=revision,
        vocab_size=vocab_size,
        offset=offset,
        tail=tail,
        drops_wrong_lists=on_wrong_list == "drop",
        max_kl=max_kl,
        read_with=read_with,
    )
    with progress("import", None, "rows") as ticker:
        dataset, alignment = import_dataset(
            files, read_tokenizer(tokenizer), local_output(output), settings, ticker.advance
        )
    info = dataset.info()
    tally = info["inputs"][0]["tally"]
    mine = alignment[f"{offset}"]
    lines = [
        f"{output}: {info['rows']:,} rows, {info['positions']:,} positions" + losses_line(tally),
        f"  alignment   the token at offset {offset} is in {mine['share_in_list']:.1%} of the lists, "
        f"mean log p {mine['mean_logprob']:.2f}",
        f"  tail        {info['keep']['tail'].replace('_', ' ')}; entropy and log p of tokens outside of the lists are "
        "bounds",
        *(["  next: train with loss: {tail: renormalise}"] if info["keep"]["tail"] == "unknown" else []),
        f"  next: logit-shards inspect {output}",
    ]
    emit(info | {"alignment": alignment}, lines, as_json=as_json)


@click.command("export")
@click.argument("dataset")
@click.option("--to", "form", type=click.Choice(["axolotl", "jsonl"]), required=True, help="Whose columns.")
@click.option("--output", required=True, type=click.Path(), help="File: .parquet (axolotl), .jsonl or .jsonl.zst.")
@click.option(
    "--offset", type=click.IntRange(0, 1), default=axolotl.TRAINER_OFFSET, show_default=True,
    help="axolotl: the list at index i is about token i + OFFSET.",
)  # fmt: skip
@click.option("--renormalise", is_flag=True, help="axolotl: lists that add up to one, as its own preparation makes.")
@json_option
def export_command(dataset: str, form: Form, output: str, offset: int, renormalise: bool, as_json: bool) -> None:
    """Write DATASET as other toolkits read it.  Verified on the way; see shared/EXCHANGE.md."""
    if form != "axolotl" and (renormalise or offset != axolotl.TRAINER_OFFSET):
        raise ConfigError("--offset and --renormalise are for --to axolotl")
    opened = LogitDataset.open(dataset)
    settings = ExportSettings(form=form, offset=offset, renormalised=renormalise)
    with progress("export", len(opened.manifest.shards), "shards") as ticker:
        result = export_dataset(opened, local_output(output), settings, ticker.advance)
    line = f"{output}: {result['rows']:,} rows, {result['positions']:,} positions, {result['size_bytes']:,} bytes"
    emit(result, [line], as_json=as_json)


def _axolotl_rows(record: ForeignRecord, sample_id: str, source: str, *, vocab_size: int) -> list[ForeignRow]:
    return axolotl.read(record.fields, record.where, sample_id, source, vocab_size=vocab_size)


def _distillkit_rows(
    record: ForeignRecord,
    sample_id: str,
    source: str,
    *,
    packing: distillkit.Packing,
    everything: bool,
    vocab_size: int,
) -> list[ForeignRow]:
    if record.fields.get("labels") is None and not everything:
        raise ConfigError(
            f"{record.where}: has no labels, and so nobody knows which tokens are to be learnt",
            next_step="add a column `labels`, −100 where a token is not supervised; or give --everything, which "
            "supervises prompts, templates and padding as well",
        )
    return distillkit.read(record.fields, record.where, sample_id, source, packing=packing, vocab_size=vocab_size)


def _config_beside(sources: tuple[str, ...]) -> Path:
    for source in sources:
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        if (folder / distillkit.CONFIG_NAME).is_file():
            return folder / distillkit.CONFIG_NAME
    raise ConfigError(
        f"there is no {distillkit.CONFIG_NAME} beside {sources[0]}",
        next_step="give --compression-config FILE: the settings that the logits were captured with",
    )
