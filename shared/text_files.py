"""Which text files there are: files, folders, globs and URLs, all by way of fsspec."""

import difflib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from shared.errors import ConfigError, LogitferryError
from shared.fingerprint import sha256_of_json

HASH_BLOCK_BYTES = 1 << 22
COMPRESSIONS = (".zst", ".gz")
EXPECTED = ".jsonl, .ndjson or .json (also .zst or .gz), .parquet, or the folder of a saved `datasets` dataset"
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"

Format = Literal["json", "parquet", "datasets"]
FORMATS: dict[str, Format] = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}

logger = logging.getLogger("logitferry")


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """One file, or the folder of a saved `datasets` dataset.  `name` is what people call it."""

    fs: AbstractFileSystem
    path: str
    name: str
    format: Format
    compression: str | None = None

    def open(self) -> BinaryIO:
        with _foreign_errors(self.name):
            return cast(BinaryIO, self.fs.open(self.path, "rb"))

    def sha256(self) -> str:
        """Of its bytes; of the names and bytes of all files of a folder."""
        if self.format != "datasets":
            return _sha256(self.fs, self.path)
        files = sorted(self.fs.find(self.path))
        return sha256_of_json([[os.path.relpath(file, self.path), _sha256(self.fs, file)] for file in files])


def find_text_files(patterns: Sequence[str]) -> list[TextFile]:
    """The files that the patterns name, in their order; those of a folder or glob by name.

    Raises:
        ConfigError: a pattern matches nothing, or what cannot be read, or a file is named twice.
    """
    files: list[TextFile] = []
    for pattern in patterns:
        with _foreign_errors(pattern):
            files += _matches(pattern)
    places: set[tuple[str, str]] = set()
    for file in files:
        place = (str(file.fs.protocol), file.path)
        if place in places:
            raise ConfigError(f"{file.name} is named twice in `files`", next_step="name every file once")
        places.add(place)
    return files


def _matches(pattern: str) -> list[TextFile]:
    fs, path = url_to_fs(pattern)
    if fs.isfile(path):
        return [_text_file(fs, path, pattern)]
    if fs.isdir(path):
        return _files_of_folder(fs, path, pattern)
    paths = sorted(found for found in fs.glob(path) if fs.isfile(found)) if set(path) & set("*?[") else []
    if not paths:
        raise ConfigError(f"input file {pattern} does not exist", next_step=_advice(fs, path))
    return [_text_file(fs, found, _name(fs, found, pattern)) for found in paths]


def _files_of_folder(fs: AbstractFileSystem, path: str, pattern: str) -> list[TextFile]:
    if fs.exists(f"{path}/{SAVED_DATASET}"):
        return [TextFile(fs=fs, path=path, name=pattern, format="datasets")]
    if fs.exists(f"{path}/{SAVED_SPLITS}"):
        splits = sorted(os.path.basename(split) for split in fs.ls(path, detail=False) if fs.isdir(split))
        raise ConfigError(
            f"{pattern} is a saved dataset with several splits",
            next_step=f"name those you mean: {', '.join(os.path.join(pattern, split) for split in splits)}",
        )
    found = sorted(fs.find(path))
    files = [_text_file(fs, file, _name(fs, file, pattern)) for file in found if _format_of(file)[0]]
    if not files:
        raise ConfigError(f"folder {pattern} holds no text files", next_step=f"give {EXPECTED}")
    if left_out := len(found) - len(files):
        logger.info("%s: %d files to read; %d others are left alone", pattern, len(files), left_out)
    return files


def _text_file(fs: AbstractFileSystem, path: str, name: str) -> TextFile:
    kind, compression = _format_of(path)
    if kind is None:
        raise ConfigError(f"input file {name} is of no form that can be read", next_step=f"give {EXPECTED}")
    return TextFile(fs=fs, path=path, name=name, format=kind, compression=compression)


def _format_of(path: str) -> tuple[Format | None, str | None]:
    """Told from the name alone."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix not in COMPRESSIONS:
        return FORMATS.get(suffix), None
    inner = FORMATS.get(os.path.splitext(stem)[1])
    return (inner, suffix) if inner == "json" else (None, None)


def _name(fs: AbstractFileSystem, path: str, pattern: str) -> str:
    if not isinstance(fs, LocalFileSystem):
        return fs.unstrip_protocol(path)
    return path if os.path.isabs(pattern) else os.path.relpath(path)


def _advice(fs: AbstractFileSystem, path: str) -> str:
    folder = os.path.dirname(path)
    others = [os.path.basename(found) for found in fs.ls(folder, detail=False)] if fs.isdir(folder) else []
    near = difflib.get_close_matches(os.path.basename(path), others, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return "check `files`; paths are relative to the folder where the command is run"


def _sha256(fs: AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with cast(BinaryIO, fs.open(path, "rb")) as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _foreign_errors(name: str) -> Iterator[None]:
    """File systems raise all kinds of exceptions for what they cannot reach; ours says where."""
    try:
        yield
    except LogitferryError:
        raise
    except ImportError as error:
        raise ConfigError(f"{name}: {error}", next_step="pip install 'logitferry[hub]'") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"{name} cannot be read: {reason}", next_step="check `files` and your access") from error
