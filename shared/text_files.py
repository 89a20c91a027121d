"""Which text files there are: files, folders, globs and URLs, all by way of fsspec."""

import difflib
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
from shared.files import sha256_of_stream
from shared.fingerprint import sha256_of_json

COMPRESSIONS = (".zst", ".gz")
EXPECTED = ".jsonl, .ndjson or .json (also .zst or .gz), .parquet, or the folder of a saved `datasets` dataset"
SAVED_DATASET, SAVED_SPLITS = {"state.json", "dataset_info.json"}, "dataset_dict.json"

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
        with _foreign_errors(self.name):
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
    places: set[tuple[AbstractFileSystem, str]] = set()
    for file in files:
        place = (file.fs, os.path.realpath(file.path) if isinstance(file.fs, LocalFileSystem) else file.path)
        if place in places:
            raise ConfigError(f"{file.name} is named twice in `files`", next_step="name every file once")
        places.add(place)
    return files


def _matches(pattern: str) -> list[TextFile]:
    is_path = os.path.exists(pattern)  # whatever characters are in it
    fs, path = (LocalFileSystem(), os.path.abspath(pattern)) if is_path else url_to_fs(pattern)
    if fs.exists(path):
        return _files_at(fs, path, pattern)
    found = sorted(map(str, fs.glob(path))) if set(path) & set("*?[") else []
    if not found:
        raise ConfigError(f"input file {pattern} does not exist", next_step=_advice(fs, path))
    shown = [place for place in found if not os.path.basename(place).startswith(".")]
    return [file for place in shown for file in _files_at(fs, place, _name(fs, place, pattern))]


def _files_at(fs: AbstractFileSystem, path: str, name: str) -> list[TextFile]:
    """A file, a saved dataset, or the text files below a folder."""
    if fs.isfile(path):
        return [_text_file(fs, path, name)]
    inside = sorted(os.path.relpath(file, path) for file in fs.find(path))
    saved = {os.path.dirname(file) for file in inside if os.path.basename(file) == "state.json"}
    saved = {folder for folder in saved if {os.path.join(folder, part) for part in SAVED_DATASET} <= set(inside)}
    if "" in saved:
        return [TextFile(fs=fs, path=path, name=name, format="datasets")]
    if SAVED_SPLITS in inside:
        splits = ", ".join(os.path.join(name, split) for split in sorted(saved))
        raise ConfigError(f"{name} is a saved dataset with several splits", next_step=f"name those you mean: {splits}")
    others = [file for file in inside if not any(file.startswith(f"{folder}{os.sep}") for folder in saved)]
    texts = {file for file in others if _format_of(file)[0] and not f"{os.sep}{file}".count(f"{os.sep}.")}
    files = [
        TextFile(fs=fs, path=os.path.join(path, file), name=os.path.join(name, file), format="datasets")
        if file in saved
        else _text_file(fs, os.path.join(path, file), os.path.join(name, file))
        for file in sorted(texts | saved)
    ]
    if not files:
        raise ConfigError(f"folder {name} holds no text files", next_step=f"give {EXPECTED}")
    if left_out := len(others) - len(texts):
        logger.info("%s: %d files to read; %d others are left alone", name, len(files), left_out)
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
        return fs.unstrip_protocol(path)  # also of what a chained URL leads to
    return path if os.path.isabs(pattern) else os.path.relpath(path)


def _advice(fs: AbstractFileSystem, path: str) -> str:
    folder = os.path.dirname(path)
    others = [os.path.basename(found) for found in fs.ls(folder, detail=False)] if fs.isdir(folder) else []
    near = difflib.get_close_matches(os.path.basename(path), others, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return "check `files`; paths are relative to the folder where the command is run"


def _sha256(fs: AbstractFileSystem, path: str) -> str:
    with cast(BinaryIO, fs.open(path, "rb")) as file:
        return sha256_of_stream(file)


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
