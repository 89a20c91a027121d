"""Checkpoints: all that a run needs to go on as if it had never stopped.

    checkpoints/step-00001200/
      shard-00001-model-00001-of-00001.safetensors …   tensors, by torch.distributed.checkpoint
      state.json                                       numbers and names: step, schedule, identity
      complete.json                                    sha256 of every file above; a folder without it is none

Tensors lie in safetensors, all else in JSON: nothing is pickled.  Saved by any number of ranks, whole or sharded, a
checkpoint is loaded by any other number.  It is written under another name, made durable and then renamed, so a
process that is killed while it writes leaves the previous one as it was.

Random numbers need no state of their own: every step draws from a seed of its own, see `seed_step`.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shared.errors import DamagedDataError, MismatchError, OutputError
from shared.files import TEMPORARY_PREFIX, sha256_of_bytes, sha256_of_file, sync_folder, sync_tree
from student_train.ranks import Ranks
from student_train.run_folder import CHECKPOINTS_FOLDER

logger = logging.getLogger("logitferry")

STATE_NAME = "state.json"
COMPLETE_NAME = "complete.json"
VERSION = 1
NAME = re.compile(r"step-(\d{8,})")
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is."""

    step: int
    """Steps that are done."""
    seconds: float
    """That they took, of all the processes that did them."""
    identity: dict[str, Any]
    """What must be the same for a run to go on: `dataset`, `tokenizer`, `model`, `stage`, each any JSON."""
    rows: str
    """Digest of which rows the last step took; tells whether they would come in the same order here."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last steps; see `student_train.anomaly`."""
    skipped: int = 0
    """Steps in a row that were skipped, up to now."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What changes while a student is trained."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler

    def tensors_and_rest(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every tensor by a name of its own, each of those that are tied once; and the optimizer's other settings."""
        weights, optimizer = get_state_dict(self.model, self.optimizer, options=OPTIONS)
        own = {name for name, _ in self.model.named_parameters()} | {name for name, _ in self.model.named_buffers()}
        tensors = {
            f"model.{name}": value for name, value in weights.items() if name in own and isinstance(value, Tensor)
        }
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items() if isinstance(value, Tensor)}
        return tensors, {name: value for name, value in optimizer.items() if not isinstance(value, Tensor)}

    def take(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """What `tensors_and_rest` gave."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=_under("model.", tensors),
            optim_state_dict=_under("optimizer.", tensors) | rest,
            options=replace(OPTIONS, strict=False),  # of weights that are tied only one is there
        )


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, output: Path, *, keep: int, ranks: Ranks) -> None:
        self._folder, self._keep, self._ranks = output / CHECKPOINTS_FOLDER, keep, ranks

    def save(self, progress: Progress, trained: Trained) -> None:
        """Write one, by all ranks together, and remove those that are too many.

        Raises:
            OutputError: it cannot be written; the earlier ones stay.
        """
        name = f"step-{progress.step:08d}"
        aside, target = self._folder / f"{TEMPORARY_PREFIX}{name}", self._folder / name
        try:
            if self._ranks.is_first:
                self._sweep()
                aside.mkdir(parents=True)
            self._ranks.barrier()
            tensors, rest = trained.tensors_and_rest()
            _write_tensors(tensors, aside, self._ranks)
            self._ranks.barrier()
            if self._ranks.is_first:
                state = vars(progress) | {"optimizer": rest, "schedule": trained.schedule.state_dict()}
                (aside / STATE_NAME).write_text(json.dumps({"version": VERSION} | state, indent=1), encoding="utf-8")
                digests = {path.name: sha256_of_file(path) for path in sorted(aside.iterdir())}
                (aside / COMPLETE_NAME).write_text(json.dumps(digests, indent=1), encoding="utf-8")
                sync_tree(aside)
                shutil.rmtree(target, ignore_errors=True)  # of a run that was begun anew
                aside.replace(target)
                sync_folder(self._folder)
                self._remove_old()
            self._ranks.barrier()
        except (OSError, CheckpointException) as error:
            raise OutputError(
                f"checkpoint {target} cannot be written: {_reason(error)}",
                next_step="make room, then run the same command again: it goes on from the one before",
            ) from error
        logger.info("checkpoint: %s", target)

    def newest(self) -> "Checkpoint | None":
        """The newest one, its digests compared; None where there is none.

        Raises:
            DamagedDataError: it is not what was written.
        """
        found = self._found()
        return Checkpoint.read(found[-1], self._ranks) if found else None

    def _found(self) -> list[Path]:
        """Folders of checkpoints, the newest last."""
        paths = self._folder.iterdir() if self._folder.is_dir() else ()
        numbered = [(int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name))]
        return [path for _, path in sorted(numbered)]

    def _sweep(self) -> None:
        """Remove what was killed while it was written."""
        for path in self._folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(path)

    def _remove_old(self) -> None:
        try:
            for path in self._found()[: -self._keep]:
                doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")  # no half of it may look like a whole one
                path.replace(doomed)
                shutil.rmtree(doomed)
        except OSError as error:  # the new one is there, and that is what matters
            logger.warning("an old checkpoint cannot be removed: %s", error)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    progress: Progress
    _rest: dict[str, Any]
    _schedule: dict[str, Any]
    _ranks: Ranks

    @staticmethod
    def read(folder: Path, ranks: Ranks) -> "Checkpoint":
        """Compare every file with its digest and read what is no tensor.

        Raises:
            DamagedDataError: a file is missing, is damaged, or says what no checkpoint does.
            MismatchError: another release wrote it, in a form that this one does not read.
        """
        mend = f"remove {folder}: the run then goes on from the checkpoint before it, or starts over"
        try:
            digests = json.loads((folder / COMPLETE_NAME).read_bytes())
            if unlike := digests.keys() ^ {path.name for path in folder.iterdir() if path.name != COMPLETE_NAME}:
                raise DamagedDataError(f"{folder}: {min(unlike)} is missing, or does not belong there", next_step=mend)
            for name, digest in digests.items():
                if (got := sha256_of_file(folder / name)) != digest:
                    raise DamagedDataError(
                        f"{folder / name}: damaged: expected sha256 {digest[:16]}…, got {got[:16]}…", next_step=mend
                    )
            state = json.loads((folder / STATE_NAME).read_bytes())
            if state.pop("version") != VERSION:
                raise MismatchError(f"{folder} was written by another release", next_step=mend)
            rest, schedule = state.pop("optimizer"), state.pop("schedule")
            return Checkpoint(folder=folder, progress=Progress(**state), _rest=rest, _schedule=schedule, _ranks=ranks)
        except (DamagedDataError, MismatchError):
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedDataError(f"{folder}: is no whole checkpoint: {error}", next_step=mend) from None

    def require_same(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with anything else than what the checkpoint was made with.

        Raises:
            MismatchError: says what differs.
        """
        for part in sorted({*identity, *self.progress.identity}):
            expected, got = flat(self.progress.identity.get(part)), flat(identity.get(part))
            changed = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
            if changed:
                name = changed[0]
                where = f"{part}.{name}" if name else part
                raise MismatchError(
                    f"{self.folder} was made with another {part}: {where} was {_short(expected.get(name))}, "
                    f"now it is {_short(got.get(name))}"
                    + (f" (and {len(changed) - 1} more differ)" if len(changed) > 1 else ""),
                    next_step="undo the change to go on, or give the new run another `output`",
                )

    def restore(self, trained: Trained) -> None:
        """Put everything back, by all ranks together.

        Raises:
            DamagedDataError: the tensors are not those of this model.
        """
        tensors, _ = trained.tensors_and_rest()
        try:
            with _quiet():
                load(tensors, storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=self._ranks.count == 1)
        except (CheckpointException, RuntimeError, ValueError) as error:
            raise DamagedDataError(
                f"{self.folder}: the tensors are not those of this model: {_reason(error)}",
                next_step="give the run another `output`; the checkpoint may still be good for the release it is from",
            ) from None
        trained.take(tensors, self._rest)
        trained.schedule.load_state_dict(self._schedule)


def _reason(error: BaseException) -> str:
    """Of torch's own exception for whatever went wrong on any rank, what that was."""
    if isinstance(error, CheckpointException):
        error = next((failure[0] for failure in error.failures.values()), error)
    return getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout and whatever else draws from torch's generators, on every device."""
    digest = sha256_of_bytes(f"{seed}/{step}/{rank}".encode())
    torch.manual_seed(int(digest[:15], 16))


def _write_tensors(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet():
        save(dict(tensors), storage_writer=writer, no_dist=ranks.count == 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remark that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{prefix}.{key}".lstrip(".")).items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:17]}…"
