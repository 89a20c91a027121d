"""The command `logit-shards`: what is in a dataset, and is it whole?  Needs no torch."""

from typing import Any

import click

from shared.cli import command_group, emit, json_option, run_command
from shared.dataset import LogitDataset, verify
from shared.errors import DamagedDataError
from shared.manifest import losses_line
from shared.progress import progress


@command_group("logit-shards", "Look into, check and hand on datasets of teacher log-probabilities.")
def cli() -> None:
    pass


@cli.command("info")
@click.argument("dataset")
@json_option
def info_command(dataset: str, as_json: bool) -> None:
    """Say what DATASET holds, from its manifest alone."""
    info = LogitDataset.open(dataset).info()
    emit(info, _info_lines(dataset, info), as_json=as_json)


@cli.command("verify")
@click.argument("dataset")
@json_option
def verify_command(dataset: str, as_json: bool) -> None:
    """Read every byte of DATASET and check it: digests, page checksums, alignment, values."""
    opened = LogitDataset.open(dataset)
    with progress("verify", len(opened.manifest.shards), "shards") as ticker:
        found = verify(opened, ticker.advance)
    result = {
        "ok": not found.faults,
        "shards": found.shards,
        "rows": found.rows,
        "positions": found.positions,
        "faults": found.faults,
    }
    whole = f"{dataset}: whole; {found.shards} shards, {found.rows:,} rows, {found.positions:,} positions read"
    emit(result, found.faults or [whole], as_json=as_json)
    if found.faults:
        raise DamagedDataError(
            f"{dataset}: {len(found.faults)} fault{'s' * (len(found.faults) > 1)}",
            next_step="copy the damaged files again from where the dataset came from, then verify again",
        )


def _info_lines(dataset: str, info: dict[str, Any]) -> list[str]:
    teacher, keep = info["teacher"], info["keep"]
    revision = teacher["revision"] or (teacher["weights_sha256"] or "")[:16]
    return [
        f"{dataset}: format version {info['format_version']}, {info['shards']} shards, {info['size_bytes']:,} bytes",
        f"  rows        {info['rows']:,} with {info['tokens']:,} tokens, {info['positions']:,} positions"
        + losses_line(info["input"]["tally"]),
        f"  teacher     {teacher['name']} ({teacher['architecture']}, {teacher['dtype']}, {revision})",
        f"  tokenizer   {info['tokenizer_fingerprint'][:16]}…, vocabulary of {info['vocab_size']:,}",
        f"  kept        {', '.join(f'{name} {value}' for name, value in keep.items())}",
        f"              {info['kept_per_position']:.2f} ids per position, {info['kept_mass']:.4%} of the mass",
        f"  temperature {', '.join(f'{temperature:g}' for temperature in info['temperatures'])}",
        f"  size        {info['bytes_per_position']:.1f} bytes per position, "
        f"{info['mean_kl_nats']:.2g} nats lost in storage",
    ]


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
