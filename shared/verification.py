"""Is a dataset what was written?  Every fault, not only the first.

By default the digest of every file and what the footers say; `deep` also decodes every value and asks whether the
distributions are those of the tokens beside them.  A card that was written anew, as people do, is told and no fault.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from shared.dataset import CARD_NAME, LogitDataset
from shared.errors import LogitferryError
from shared.files import sha256_of_file, why_no_file
from shared.manifest import MANIFEST_NAME, Manifest
from shared.rounding import mass_tolerance
from shared.rows import LogitRow
from shared.shard_reader import check_shard

FP32_TOLERANCE = 1e-3


@dataclass(kw_only=True)
class Verification:
    """What was read, and what is wrong with it."""

    shards: int = 0
    rows: int = 0
    positions: int = 0
    faults: list[str] = field(default_factory=list)
    damaged_shards: list[str] = field(default_factory=list)
    """Paths of those with a fault of their own."""
    card_is_new: bool = False
    """Whether the card is another than the dataset was sealed with."""


def verify(dataset: LogitDataset, *, deep: bool, on_shard: Callable[[], None] = lambda: None) -> Verification:
    """Read every byte of the dataset; `on_shard` is called after each shard."""
    manifest, found = dataset.manifest, Verification()
    found.faults += _faults_of_other_files(dataset)
    card = dataset.folder / CARD_NAME
    found.card_is_new = not why_no_file(dataset.folder, card) and sha256_of_file(card) != manifest.files.get(CARD_NAME)
    seen: set[str] = set()
    for index, shard in enumerate(manifest.shards):
        faults: list[str] = []
        try:
            if deep:
                for rows in dataset.row_groups(index):
                    faults += [f"{shard.path}: {fault}" for row in rows for fault in _row_faults(row, manifest)]
                    faults += _repeats([row.sample_id for row in rows], seen, shard.path)
            else:
                faults += _repeats(check_shard(dataset.folder, shard, manifest.row_format), seen, shard.path)
        except LogitferryError as error:
            faults.append(str(error))
        found.faults += faults
        if faults:
            found.damaged_shards.append(shard.path)
        else:
            found.shards, found.rows = found.shards + 1, found.rows + shard.rows
            found.positions += shard.positions
        on_shard()
    found.faults += [f"{path}: is not in the manifest" for path in strange_files(dataset)]
    return found


def strange_files(dataset: LogitDataset) -> list[str]:
    """Paths of what the manifest does not name; but for a card, and what begins with a dot, such as .git, unless it is
    data."""
    manifest = dataset.manifest
    known = {shard.path for shard in manifest.shards} | {MANIFEST_NAME, CARD_NAME, *manifest.files}
    files = (path.relative_to(dataset.folder) for path in dataset.folder.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in files if path.as_posix() not in known and path.parts[0][0] != ".")


def _faults_of_other_files(dataset: LogitDataset) -> list[str]:
    faults: list[str] = []
    for path, digest in dataset.manifest.files.items():
        file = dataset.folder / path
        if fault := why_no_file(dataset.folder, file):
            faults.append(f"{file}: {fault}")
        elif path != CARD_NAME and sha256_of_file(file) != digest:
            faults.append(f"{file}: damaged: its sha256 is not the manifest's")
    try:
        dataset.tokenizer()
    except LogitferryError as error:
        faults.append(str(error))
    return faults


def _repeats(sample_ids: list[str], seen: set[str], where: str) -> list[str]:
    faults: list[str] = []
    for sample_id in sample_ids:
        if sample_id in seen:
            faults.append(f"{where}: sample id {sample_id!r} comes twice")
        seen.add(sample_id)
    return faults


def _row_faults(row: LogitRow, manifest: Manifest) -> list[str]:
    """What can be told from a row alone: mass that does not add up, distributions of other tokens.

    A realised token that is kept has the same value twice; one that is not is part of the tail and no larger than it,
    or, where ids are sampled, less probable than tau.  Rows that are shifted by a token do not pass that.
    """
    teacher = row.teacher
    position_E = np.repeat(np.arange(row.num_positions), teacher.kept_counts_P)
    is_label_E = teacher.kept_ids_E == row.label_ids_P[position_E]
    is_kept_P = np.zeros(row.num_positions, dtype=bool)
    is_kept_P[position_E[is_label_E]] = True
    label_logp, realised_logp = teacher.kept_logp_E[is_label_E], teacher.realised_logp_P[is_kept_P]
    others_logp = teacher.realised_logp_P[~is_kept_P]
    mass_P = np.bincount(position_E, np.exp(teacher.kept_logp_E), row.num_positions)
    tolerance = mass_tolerance(float(manifest.keep.get("max_kl", 0.0)))
    if manifest.row_format.has_tails:
        tail_P = teacher.tail_logsum_PT[:, 0]
        fits = np.array_equal(label_logp, realised_logp) and np.all(others_logp <= tail_P[~is_kept_P] + FP32_TOLERANCE)
        mass_P += np.exp(tail_P)
    else:
        tau = float(manifest.keep["tau"])
        is_sampled = label_logp == np.float32(np.log(tau))
        fits = np.array_equal(label_logp[~is_sampled], realised_logp[~is_sampled])
        least_probable = np.concatenate([others_logp, realised_logp[is_sampled]])
        fits = fits and np.all(least_probable <= np.log(tau) + tolerance)
        tolerance += 2 * tau
    faults = [] if fits else [f"row {row.sample_id!r}: realised_logprob does not fit the distributions beside it"]
    if not np.allclose(mass_P, 1.0, rtol=0, atol=tolerance):
        faults.append(f"row {row.sample_id!r}: kept ids and tail do not add up to one")
    return faults
