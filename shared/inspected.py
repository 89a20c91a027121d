"""What `logit-shards inspect` is pointed at: a dataset, the config of either phase, or text with a tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import ConfigDict
from tokenizers import Tokenizer

from shared.config import CONFIG_SUFFIXES, Settings, check_settings, read_yaml
from shared.dataset import LogitDataset
from shared.errors import ConfigError
from shared.manifest import MANIFEST_NAME
from shared.models_config import ModelSettings
from shared.raw_records import BadRecord
from shared.records import Record, RecordReader
from shared.rows import Row
from shared.text_config import TextSettings
from shared.text_files import find_text_files

Thing = TypeVar("Thing")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows: `count` from the one with number `first` on, or those of one sample id."""

    first: int = 0
    count: int = 1
    sample_id: str | None = None
    worst_first: bool = False
    """In order of their most surprising tokens; a dataset's alone."""

    def picks(self, things: Iterable[tuple[str | None, Thing]]) -> Iterator[Thing]:
        """Those that are meant, in order; each comes with its sample id.  Reads no further than it must."""
        if self.sample_id is None:
            return (thing for _, thing in islice(things, self.first, self.first + self.count))
        return islice((thing for sample_id, thing in things if sample_id == self.sample_id), 1)


class Inspected(Protocol):
    """Rows that can be looked at."""

    tokenizer: Tokenizer
    temperatures: Sequence[float]
    """Those that a dataset declares; text has none."""

    def rows(self, selection: Selection) -> Iterator[tuple[Row, str]]:
        """The selected rows with their places.

        Raises:
            ConfigError: the worst of text.
        """
        ...

    def summary(self) -> str:
        """Reads everything and says what becomes of it."""
        ...


class InspectedDataset:
    """Rows of a sealed dataset, verified as they are read."""

    def __init__(self, folder: str) -> None:
        self._dataset = LogitDataset.open(folder)
        self.tokenizer = self._dataset.tokenizer()
        self.temperatures: Sequence[float] = self._dataset.manifest.temperatures

    def rows(self, selection: Selection) -> Iterator[tuple[Row, str]]:
        places = self._worst_places() if selection.worst_first else self._places()
        picked = list(selection.picks(places))
        found: dict[tuple[int, int], Row] = {}
        for shard, of_shard in groupby(sorted(picked), key=lambda place: place[0]):
            rows = self._dataset.read_shard(shard)
            found |= {(shard, row): rows[row] for _, row in of_shard}
        for shard, row in picked:
            yield found[shard, row], f"{self._dataset.manifest.shards[shard].path}[{row}]"

    def _places(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for shard, names in enumerate(self._dataset.sample_ids()):
            for row, name in enumerate(names):
                yield name, (shard, row)

    def _worst_places(self) -> list[tuple[str, tuple[int, int]]]:
        """Reads everything."""
        found = []
        for shard in range(len(self._dataset.manifest.shards)):
            for number, row in enumerate(self._dataset.read_shard(shard)):
                found.append((float(row.teacher.realised_logp_P.min()), row.sample_id, (shard, number)))
        return [(name, place) for _, name, place in sorted(found)]

    def summary(self) -> str:
        info = self._dataset.info()
        return f"{info['rows']:,} rows, {info['tokens']:,} tokens, {info['positions']:,} positions"


class InspectedText:
    """Text, as a run with these settings will read it.  `context` is whether the model's context is a limit."""

    def __init__(self, settings: TextSettings, model: ModelSettings, *, context: bool) -> None:
        from shared.pretrained import context_tokens, load_tokenizer  # a dataset is inspected without transformers
        from shared.text_rows import TextRows

        self._reader = RecordReader(settings)
        tokenizer = load_tokenizer(model)
        self.tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self.temperatures: Sequence[float] = ()
        limit = context_tokens(model) if context else None
        self._all = TextRows(tokenizer, settings, context_tokens=limit)
        few = settings.model_copy(update={"processes": 1})  # not worth starting others for
        self._few = TextRows(tokenizer, few, context_tokens=limit)

    def rows(self, selection: Selection) -> Iterator[tuple[Row, str]]:
        from shared.text_rows import Tally

        if selection.worst_first:
            raise ConfigError("--worst is for a dataset: of text no teacher has said anything yet")
        records = selection.picks((_name_of(record), record) for record in self._reader.records())
        for record in records:
            for row in self._few.rows([record], Tally()):
                yield row, record.where if isinstance(record, Record) else ""

    def summary(self) -> str:
        from shared.text_rows import Tally

        tally = Tally()
        with self._all:
            for _ in self._all.rows(self._reader.records(), tally):
                pass
        return tally.summary()


class _Model(ModelSettings):
    model_config = ConfigDict(extra="ignore")


class _DumpConfig(Settings):
    """The part of a dump's config that is about text."""

    model_config = ConfigDict(extra="ignore")
    teacher: _Model
    data: TextSettings


class _TrainData(Settings):
    model_config = ConfigDict(extra="ignore")
    dataset: str | None = None
    text: TextSettings | None = None


class _TrainConfig(Settings):
    """The part of a training's config that is about its rows."""

    model_config = ConfigDict(extra="ignore")
    student: _Model
    data: _TrainData


def open_inspected(path: str, tokenizer: str | None, overrides: Sequence[str]) -> Inspected:
    """What a path names.

    Raises:
        ConfigError: text without a tokenizer, or a config that has neither teacher nor student.
    """
    if (Path(path) / MANIFEST_NAME).is_file():
        return _open_dataset(path, tokenizer, overrides)
    if not path.endswith(CONFIG_SUFFIXES):
        settings = check_settings(TextSettings, {"files": [path]}, overrides, name=path)
        find_text_files(settings.files)  # a slip in the path is told as one
        if tokenizer is None:
            raise ConfigError(
                f"{path} is text, and text needs a tokenizer to be rows",
                next_step=f"logit-shards inspect {path} --tokenizer MODEL, or name the config of the run",
            )
        return InspectedText(settings, ModelSettings(model=tokenizer), context=False)
    tree = read_yaml(Path(path))
    if "teacher" in tree:
        dump = check_settings(_DumpConfig, tree, overrides, name=path)
        model, text = dump.teacher, dump.data
    elif "student" in tree:
        train = check_settings(_TrainConfig, tree, overrides, name=path)
        model, text = train.student, train.data.text
        if train.data.dataset is not None:
            return _open_dataset(train.data.dataset, tokenizer, [])
    else:
        raise ConfigError(f"{path} has neither teacher nor student", next_step="name a dump's or a training's config")
    if text is None:
        raise ConfigError(
            f"{path}: names neither data.dataset nor data.text",
            next_step="of a mix, name one of its datasets or files: logit-shards inspect PATH",
        )
    if tokenizer is not None:
        model = model.model_copy(update={"tokenizer": tokenizer})
    return InspectedText(text, model, context=True)


def _open_dataset(folder: str, tokenizer: str | None, overrides: Sequence[str]) -> InspectedDataset:
    if tokenizer is not None or overrides:
        raise ConfigError(f"{folder} is a dataset: it has its own tokenizer, and nothing is left to set")
    return InspectedDataset(folder)


def _name_of(record: Record | BadRecord) -> str | None:
    return record.sample_id if isinstance(record, Record) else None


def next_step(path: str) -> str | None:
    """The command that reads what was inspected."""
    if not path.endswith(CONFIG_SUFFIXES):
        return None
    command = "teacher-dump" if "teacher" in read_yaml(Path(path)) else "student-train"
    return f"{command} run {path}"
