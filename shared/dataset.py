"""A sealed dataset: open it, read verified shards, say what is in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer

from shared.dataset_cache import Origin
from shared.errors import ConfigError, DamagedDataError, DamagedShardError, UnsealedDatasetError
from shared.files import sha256_of_bytes, sha256_of_file, why_no_file
from shared.fingerprint import tokenizer_fingerprint
from shared.folders import Folder, LocalFolder, open_folder
from shared.manifest import (
    FINISH,
    MANIFEST_NAME,
    NO_DUMP,
    UNSEALED,
    WORK_FOLDER,
    Manifest,
    Shard,
    parse_manifest,
    read_manifest,
)
from shared.rows import LogitRow
from shared.shard_reader import names_in, read_names, read_outlines, read_row_groups

TOKENIZER_FOLDER = "tokenizer"
DATA_FOLDER = "data"
CARD_NAME = "README.md"
FIND = "check the name, and whether {} lets you read it; or finish its push: run the same command again there"
COPY_TOKENIZER = "copy the tokenizer folder from where the dataset came from"


def shard_path(number: int) -> str:
    return f"{DATA_FOLDER}/part-{number:05d}.parquet"


@dataclass(frozen=True, kw_only=True)
class LogitDataset:
    """A dataset folder and its manifest."""

    folder: Path
    manifest: Manifest
    origin: Origin | None = None
    """Where files that are not in the folder yet come from."""

    @staticmethod
    def open(folder: str | Path, *, cache: Path | None = None) -> "LogitDataset":
        """Read the manifest; shards are verified when they are read.

        Of a dataset at an fsspec URL each file is fetched when it is needed, and kept below `cache` on this machine.

        Raises:
            ConfigError: nothing is known of such URLs.
            OutputError: a URL cannot be reached.
            UnsealedDatasetError, UnknownVersionError, DamagedDataError: see `read_manifest`.
        """
        remote = open_folder(str(folder))
        if isinstance(remote, LocalFolder):
            return LogitDataset(folder=remote.path, manifest=read_manifest(remote.path))
        data = read_manifest_at(remote)
        manifest = parse_manifest(data, f"{remote.name}/{MANIFEST_NAME}")
        origin = Origin.of(remote, data, cache)
        for path, sha256 in manifest.files.items():
            if path != CARD_NAME:  # which may have been written anew since
                origin.provide(path, sha256)
        return LogitDataset(folder=origin.local, manifest=manifest, origin=origin)

    @staticmethod
    def open_here(folder: str) -> "LogitDataset":
        """As `open`, of a dataset that lies on this machine: for what reads or changes all of its files.

        Raises:
            ConfigError: it lies elsewhere.
        """
        if not isinstance(open_folder(folder), LocalFolder):
            raise ConfigError(
                f"dataset {folder}: for this it has to be on this machine",
                next_step=f"copy it here first: logit-shards pull {folder} FOLDER",
            )
        return LogitDataset.open(folder)

    @property
    def name(self) -> str:
        """The path or URL that it was opened by."""
        return self.origin.remote.name if self.origin else str(self.folder)

    def row_groups(self, index: int) -> Iterator[list[LogitRow]]:
        """The rows of one shard, verified, as many at a time as a row group holds; raises DamagedShardError."""
        return read_row_groups(self.folder, self._provided(index), self.manifest.row_format)

    def read_shard(self, index: int) -> list[LogitRow]:
        """All rows of one shard, verified; raises DamagedShardError."""
        return list(chain.from_iterable(self.row_groups(index)))

    def outlines(self, index: int) -> list[LogitRow]:
        """The rows of one shard, verified, without kept ids and tails; raises DamagedShardError."""
        return read_outlines(self.folder, self._provided(index), self.manifest.row_format)

    def _provided(self, index: int) -> Shard:
        """A shard that lies in the folder now."""
        shard = self.manifest.shards[index]
        if self.origin is not None:
            self.origin.provide(shard.path, shard.sha256)
        return shard

    def names(self, index: int) -> pa.Table:
        """The columns `sample_id` and `source` of one shard; nothing else is read, and no digest compared.

        Raises:
            DamagedShardError: it is missing, or the columns cannot be read.
        """
        shard = self.manifest.shards[index]
        if self.origin is None:
            return read_names(self.folder, shard)
        if (self.folder / shard.path).is_file():
            try:
                return read_names(self.folder, shard)
            except DamagedShardError:  # it is fetched again when it is read
                pass
        with self.origin.opened(shard.path) as file:
            return names_in(pa.PythonFile(file, mode="r"), shard, f"{self.name}/{shard.path}")

    def sample_ids(self) -> list[list[str]]:
        """The ids of every shard's rows; see `names`."""
        return [self.names(index)["sample_id"].to_pylist() for index in range(len(self.manifest.shards))]

    def identity(self) -> str:
        """sha256 of the manifest, which holds the digest of everything else."""
        return sha256_of_file(self.folder / MANIFEST_NAME)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, checked against the manifest's fingerprint."""
        path = self.folder / TOKENIZER_FOLDER / "tokenizer.json"
        if fault := why_no_file(self.folder, path):
            raise DamagedDataError(f"{path}: {fault}", next_step=COPY_TOKENIZER)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DamagedDataError(f"{path}: cannot be read: {error}", next_step=COPY_TOKENIZER) from None
        if tokenizer_fingerprint(tokenizer) != self.manifest.tokenizer_fingerprint:
            raise DamagedDataError(f"{path}: is not the tokenizer that the manifest names", next_step=COPY_TOKENIZER)
        return tokenizer

    def info(self) -> dict[str, Any]:
        """See `manifest_info`."""
        return manifest_info(self.manifest, self.identity())


def read_info(url: str) -> dict[str, Any]:
    """What `logit-shards info --json` prints of the dataset at a path or fsspec URL; reads the manifest alone.

    Raises:
        ConfigError, UnsealedDatasetError, UnknownVersionError, DamagedManifestError: see `read_manifest`.
    """
    folder = open_folder(url)
    if isinstance(folder, LocalFolder):
        return LogitDataset.open(folder.path).info()
    data = read_manifest_at(folder)
    return manifest_info(parse_manifest(data, f"{url}/{MANIFEST_NAME}"), sha256_of_bytes(data))


def read_manifest_at(folder: Folder) -> bytes:
    """The bytes of the manifest in a folder anywhere.

    Raises:
        UnsealedDatasetError: it has none, or is not there, or is shown to others alone.
        OutputError: it cannot be reached.
    """
    try:
        return folder.read(MANIFEST_NAME)
    except FileNotFoundError:
        key = "HF_TOKEN" if folder.name.startswith("hf://") else "your key"
        is_begun = bool(folder.files(WORK_FOLDER))
        step = FINISH if is_begun else NO_DUMP if isinstance(folder, LocalFolder) else FIND.format(key)
        raise UnsealedDatasetError(UNSEALED.format(folder.name), next_step=step) from None


def manifest_info(manifest: Manifest, identity: str) -> dict[str, Any]:
    """What a manifest says; `identity` is the sha256 of its bytes."""
    positions = manifest.total("positions")
    per_position = 1 / positions if positions else 0.0
    losses = manifest.loss_nats
    return {
        "format_version": manifest.format_version,
        "identity": identity,
        "rows": manifest.total("rows"),
        "tokens": manifest.total("tokens"),
        "positions": positions,
        "kept_per_position": manifest.total("kept") * per_position,
        "kept_mass": manifest.total("kept_mass") * per_position,
        "bytes_per_position": manifest.total("teacher_bytes") * per_position,
        "mean_kl_nats": losses[0] if losses and manifest.row_format.has_tails else None,
        "mean_loss_nats": {f"{T:g}": loss for T, loss in zip(manifest.temperatures, losses, strict=False)},
        "keep": manifest.keep,
        "temperatures": manifest.temperatures,
        "vocab_size": manifest.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "chat_template_sha256": manifest.chat_template_sha256,
        "teacher": manifest.teacher.model_dump(),
        "inputs": [each.model_dump() for each in manifest.inputs],
        "history": [event.model_dump() for event in manifest.history],
        "size_bytes": manifest.total("size_bytes"),
        "shards": len(manifest.shards),
        "missing": manifest.missing,
    }
