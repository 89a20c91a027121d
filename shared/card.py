"""The dataset card: what a stranger reads first, and the YAML that makes `datasets.load_dataset` and the Hub work.

It is made of the manifest, of the licences that somebody stated, and of what people wrote below the line that says so.
The manifest names the digest that the card had when the dataset was sealed; nobody compares it, for a card may be
written anew, here or on the Hub, and the dataset is the same.
"""

from collections.abc import Sequence

import yaml

from shared.dataset import CARD_NAME, LogitDataset
from shared.errors import ConfigError, OutputError
from shared.files import why_no_file
from shared.licences import HEADER, NOT_STATED, Licences, licences_in
from shared.manifest import Manifest, Teacher

KEPT_BELOW = "<!-- What is written below this line is kept when the card is written anew. -->"
MAX_CARD_BYTES = 1 << 24
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
READING = """## Reading it
Plain Parquet; `folder` is a copy of this dataset, such as `logit-shards pull` makes:

```python
folder = "my-dataset"

import datasets

row = datasets.load_dataset(folder, split="train")[0]
print(row["kept_ids"][0], row["kept_logprobs"][0])  # at the first supervised token
```

```python
folder = "my-dataset"

import duckdb

print(duckdb.sql(f"SELECT source, count(*) AS rows FROM '{folder}/data/*.parquet' GROUP BY source"))
```

```python
folder = "my-dataset"

import polars

print(polars.read_parquet(f"{folder}/data/*.parquet").select("sample_id", polars.col("entropy").list.mean()))
```

```python
folder = "my-dataset"

from shared.dataset import LogitDataset  # of logitferry: every byte is compared with its digest

row = LogitDataset.open(folder).read_shard(0)[0]
print(row.sample_id, row.num_positions, row.teacher.kept_logp_E[:3])
```

`logit-shards verify` checks every byte; `manifest.json` holds all digests.  A student is trained from it with
`student-train run`; its tokenizer must be the one in `tokenizer/`.
"""


def dataset_card(manifest: Manifest, licences: Licences | None = None, *, kept: str = "") -> str:
    """The whole text; `kept` is what people wrote."""
    licences = licences or Licences()
    teacher, keep = manifest.teacher, manifest.keep
    positions = max(manifest.total("positions"), 1)
    tails = _tails(manifest)
    loss = manifest.loss_nats[0] if manifest.shards else 0.0
    files = [file for each in manifest.inputs for file in each.files]
    sources = "\n".join(f"- `{_line(file.name)}`, sha256 `{file.sha256}`" for file in files)
    name, settings = _line(teacher.name), _line(", ".join(f"{key} {value}" for key, value in keep.items()))
    missing = f"\n**{len(manifest.missing)} shards are missing.**\n" if manifest.missing else ""
    history = "".join(
        f"- {event.operation} of {', '.join(f'`{parent[:16]}…`' for parent in event.parents)}"
        f"{f': {_line(event.reason)}' if event.reason else ''}\n"
        for event in manifest.history
    )
    return f"""---
{_header(manifest, licences)}---
# Log-probabilities of {name}

Made by {_line(manifest.created_by)}, format version {manifest.format_version}.  One row is one sequence; for every
supervised token it holds what the teacher `{name}` ({_line(teacher.architecture)}) predicted there.
{missing}
| | |
|---|---|
| teacher | `{name}`, {_revision(teacher)} |
| licence of the teacher | {_told(licences.teacher)} |
| licence of the texts | {_told(licences.texts)} |
| licence of this dataset | {_told(licences.dataset)} |
| rows | {manifest.total("rows"):,} |
| tokens | {manifest.total("tokens"):,} |
| positions (supervised tokens) | {manifest.total("positions"):,} |
| kept ids per position | {manifest.total("kept") / positions:.2f} ({settings}) |
| kept probability mass | {manifest.total("kept_mass") / positions:.4%} |
| mass of the rest | {tails} |
| lost by rounding | {loss:.2g} nats per position |
| size on disk | {manifest.total("size_bytes"):,} bytes in {len(manifest.shards):,} shards |
| of the teacher alone | {manifest.total("teacher_bytes") / positions:.1f} bytes per position |
| tokenizer | fingerprint `{_line(manifest.tokenizer_fingerprint)}` |
| vocabulary | {manifest.vocab_size:,} |

{READING}
## Made from
{sources}
{history}
{KEPT_BELOW}
{kept}"""


def written_card(dataset: LogitDataset) -> str:
    """The card that lies in a dataset's folder; an empty text where there is none that can be read."""
    path = dataset.folder / CARD_NAME
    if why_no_file(dataset.folder, path) or path.stat().st_size > MAX_CARD_BYTES:
        return ""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}", next_step="mend its permissions") from None


def card_again(dataset: LogitDataset, licences: Licences | None = None) -> str:
    """The card made anew, with the licences given, or those that it states, and with what people wrote.

    Raises:
        ConfigError: there is more of that than a card may hold.
    """
    path = dataset.folder / CARD_NAME
    if not why_no_file(dataset.folder, path) and (size := path.stat().st_size) > MAX_CARD_BYTES:
        raise ConfigError(
            f"{path}: {size:,} bytes, a card that is written anew has {MAX_CARD_BYTES:,} at most",
            next_step="move it elsewhere, then run the same command again",
        )
    card = written_card(dataset)
    return dataset_card(dataset.manifest, licences or licences_in(card), kept=_written_by_people(card))


def _written_by_people(card: str) -> str:
    """What is below the line, or all that follows the header where somebody has taken the line away."""
    card = card.replace("\r\n", "\n")  # as editors of some systems and web pages leave it
    _, line, kept = f"{card}\n".partition(f"\n{KEPT_BELOW}\n")
    if line:
        return kept.removesuffix("\n")
    return HEADER.sub("", card, count=1).lstrip("\n")


def _header(manifest: Manifest, licences: Licences) -> str:
    tree = licences.header() | {
        "configs": [{"config_name": "default", "data_files": "data/*.parquet"}],
        "size_categories": [_size_category(manifest.total("rows"))],
        "tags": ["knowledge-distillation", "logits", "logitferry"],
        "task_categories": ["text-generation"],
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _size_category(rows: int) -> str:
    """As the Hub names them."""
    limits = [10 ** (3 + number) for number in range(len(SIZES))]
    above = [name for name, limit in zip(SIZES, limits, strict=True) if rows >= limit]
    if not above:
        return "n<1K"
    return f"{above[-1]}<n<{SIZES[len(above)]}" if len(above) < len(SIZES) else "n>1T"


def _revision(teacher: Teacher) -> str:
    if teacher.revision:
        return f"revision `{_line(teacher.revision)}`"
    if teacher.weights_sha256:
        return f"weights of sha256 `{_line(teacher.weights_sha256)}`"
    return "revision not stated"


def _told(names: Sequence[str]) -> str:
    return _line(", ".join(names)) or NOT_STATED


def _line(text: str) -> str:
    """Text of others as a part of one line, of a cell and of `code`: it makes no heading, row or end of the header."""
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")


def _tails(manifest: Manifest) -> str:
    if not manifest.row_format.has_tails:
        return "none: ids are sampled, with weights"
    if manifest.tail_is_unknown:
        return "not known: imported lists had been renormalised; train with `loss.tail: renormalise`"
    if manifest.is_imported:
        return "1 − what is kept: imported, see `inputs` in the manifest"
    return f"exact, at T = {', '.join(f'{t:g}' for t in manifest.temperatures)}"
