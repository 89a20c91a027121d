"""A sealed dataset: open it, read verified shards, say what is in it, check all of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from shared.errors import DamagedDataError, LogitferryError
from shared.files import sha256_of_file
from shared.fingerprint import tokenizer_fingerprint
from shared.manifest import MANIFEST_NAME, Manifest, read_manifest
from shared.rows import LogitRow
from shared.shards import read_sample_ids, read_shard

TOKENIZER_FOLDER = "tokenizer"
DATA_FOLDER = "data"
CARD_NAME = "README.md"
MASS_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class LogitDataset:
    """A dataset folder and its manifest."""

    folder: Path
    manifest: Manifest

    @staticmethod
    def open(folder: str | Path) -> "LogitDataset":
        """Read the manifest; shards are verified when they are read.

        Raises:
            UnsealedDatasetError, UnknownVersionError, DamagedDataError: see `read_manifest`.
        """
        return LogitDataset(folder=Path(folder), manifest=read_manifest(Path(folder)))

    def read_shard(self, index: int) -> list[LogitRow]:
        """The rows of one shard, verified; raises DamagedDataError."""
        manifest = self.manifest
        return read_shard(self.folder, manifest.shards[index], manifest.temperatures, manifest.vocab_size)

    def sample_ids(self) -> list[list[str]]:
        """The ids of every shard's rows, from that one column; nothing else is read or verified yet.

        Raises:
            DamagedDataError: a shard is missing, or its column cannot be read.
        """
        return [read_sample_ids(self.folder, shard) for shard in self.manifest.shards]

    def identity(self) -> str:
        """sha256 of the manifest, which holds the digest of everything else."""
        return sha256_of_file(self.folder / MANIFEST_NAME)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, checked against the manifest's fingerprint."""
        path = self.folder / TOKENIZER_FOLDER / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DamagedDataError(f"{path}: cannot be read: {error}") from None
        if tokenizer_fingerprint(tokenizer) != self.manifest.tokenizer_fingerprint:
            raise DamagedDataError(f"{path}: is not the tokenizer that the manifest names")
        return tokenizer

    def info(self) -> dict[str, Any]:
        """What `logit-shards info --json` prints; all of it stands in the manifest."""
        manifest = self.manifest
        positions = manifest.total("positions")
        per_position = 1 / positions if positions else float("nan")
        return {
            "format_version": manifest.format_version,
            "rows": manifest.total("rows"),
            "tokens": manifest.total("tokens"),
            "positions": positions,
            "kept_per_position": manifest.total("kept") * per_position,
            "kept_mass": manifest.total("kept_mass") * per_position,
            "bytes_per_position": manifest.total("teacher_bytes") * per_position,
            "mean_kl_nats": manifest.total("kl_nats") * per_position,
            "keep": manifest.keep,
            "temperatures": manifest.temperatures,
            "vocab_size": manifest.vocab_size,
            "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
            "chat_template_sha256": manifest.chat_template_sha256,
            "teacher": manifest.teacher.model_dump(),
            "input": manifest.input.model_dump(),
            "size_bytes": manifest.total("size_bytes"),
            "shards": len(manifest.shards),
        }


@dataclass(kw_only=True)
class Verification:
    """What `verify` found: every fault, not only the first."""

    shards: int = 0
    rows: int = 0
    positions: int = 0
    faults: list[str] = field(default_factory=list)


def verify(dataset: LogitDataset, on_shard: Callable[[], None] = lambda: None) -> Verification:
    """Read every byte of the dataset; `on_shard` is called after each shard."""
    manifest, found = dataset.manifest, Verification()
    for path, digest in manifest.files.items():
        file = dataset.folder / path
        if not file.resolve().is_relative_to(dataset.folder.resolve()):
            found.faults.append(f"{path}: leads outside the dataset")
        elif not file.is_file():
            found.faults.append(f"{file}: is missing")
        elif sha256_of_file(file) != digest:
            found.faults.append(f"{file}: damaged: its sha256 is not the manifest's")
    try:
        dataset.tokenizer()
    except LogitferryError as error:
        found.faults.append(str(error))
    sample_ids: set[str] = set()
    for index, shard in enumerate(manifest.shards):
        try:
            rows = dataset.read_shard(index)
        except LogitferryError as error:
            found.faults.append(str(error))
        else:
            found.faults += [f"{shard.path}: {fault}" for row in rows for fault in _row_faults(row, sample_ids)]
            found.shards += 1
            found.rows += len(rows)
            found.positions += sum(row.num_positions for row in rows)
        on_shard()
    known = {shard.path for shard in manifest.shards} | {MANIFEST_NAME, *manifest.files}
    present = {path.relative_to(dataset.folder).as_posix() for path in dataset.folder.rglob("*") if not path.is_dir()}
    found.faults += [f"{path}: is not in the manifest" for path in sorted(present - known)]
    return found


def _row_faults(row: LogitRow, sample_ids: set[str]) -> list[str]:
    """What can be told from a row alone: a repeated id, mass that does not add up, distributions of other tokens.

    A realised token is either kept, and then its two values are equal, or it is part of the tail and no larger than
    it.  Rows that are shifted by a token do not pass that.
    """
    faults = [f"sample id {row.sample_id!r} comes twice"] if row.sample_id in sample_ids else []
    sample_ids.add(row.sample_id)
    teacher = row.teacher
    position_E = np.repeat(np.arange(row.num_positions), teacher.kept_counts_P)
    is_label_E = teacher.kept_ids_E == row.label_ids_P[position_E]
    is_kept_P = np.zeros(row.num_positions, dtype=bool)
    is_kept_P[position_E[is_label_E]] = True
    tail_P = teacher.tail_logsum_PT[:, 0]
    mass_P = np.bincount(position_E, np.exp(teacher.kept_logp_E), row.num_positions) + np.exp(tail_P)
    agrees = np.array_equal(teacher.kept_logp_E[is_label_E], teacher.realised_logp_P[is_kept_P])
    if not agrees or np.any(teacher.realised_logp_P[~is_kept_P] > tail_P[~is_kept_P] + MASS_TOLERANCE):
        faults.append(f"row {row.sample_id!r}: realised_logprob does not fit the distributions beside it")
    if not np.allclose(mass_P, 1.0, atol=MASS_TOLERANCE):
        faults.append(f"row {row.sample_id!r}: kept ids and tail do not add up to one")
    return faults
