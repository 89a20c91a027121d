"""Datasets whose text the teacher itself has written, so that alignment shows; and what other toolkits make of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.dataset import LogitDataset
from shared.exchange.exporting import ExportSettings, export_dataset
from shared.rows import LogitRow, Positions
from tests.shared.made_datasets import V, random_logp, tiny_tokenizer, write_dataset


def written_row(state: np.random.Generator, name: str, num_tokens: int, *, k: int = 6) -> LogitRow:
    """Tokens drawn from the teacher's own distributions, of which the k most probable ids are kept."""
    logp_LV = random_logp(state, num_tokens).astype(np.float64)
    logp_LV -= np.logaddexp.reduce(logp_LV, axis=1, keepdims=True)
    input_ids = np.array([state.choice(V, p=np.exp(logp_V)) for logp_V in logp_LV], dtype=np.int32)
    mask = state.random(num_tokens) < 0.7
    mask[:2] = False, True
    logp_PV = logp_LV[mask]
    is_kept_PV = np.argsort(np.argsort(-logp_PV, axis=1), axis=1) < k
    teacher = Positions(
        kept_counts_P=is_kept_PV.sum(axis=1).astype(np.int32),
        kept_ids_E=np.nonzero(is_kept_PV)[1].astype(np.int32),
        kept_logp_E=logp_PV[is_kept_PV].astype(np.float32),
        realised_logp_P=logp_PV[np.arange(len(logp_PV)), input_ids[mask]].astype(np.float32),
        entropy_P=-(np.exp(logp_PV) * logp_PV).sum(axis=1).astype(np.float32),
        tail_logsum_PT=np.stack(
            [np.logaddexp.reduce(np.where(is_kept_PV, -np.inf, logp_PV) / t, axis=1) for t in (1, 2)], axis=1
        ).astype(np.float32),
    )
    return LogitRow(sample_id=name, source="novel.txt", input_ids_L=input_ids, label_mask_L=mask, teacher=teacher)


def written_rows(seed: int, num_rows: int, *, k: int = 6) -> list[LogitRow]:
    state = np.random.default_rng(seed)
    return [written_row(state, f"row-{n}", int(state.integers(5, 30)), k=k) for n in range(num_rows)]


def sealed(folder: Path, rows: Sequence[LogitRow], *, max_kl: float = 0.0) -> LogitDataset:
    """In two shards."""
    return LogitDataset.open(write_dataset(folder, [rows[:5], rows[5:]] if rows[5:] else [rows], max_kl=max_kl))


def exported(dataset: LogitDataset, output: Path, **settings: Any) -> Path:
    export_dataset(dataset, output, ExportSettings(**{"form": "axolotl", **settings}))
    return output


def tokenizer_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer().to_str())
    return folder


def all_rows(dataset: LogitDataset) -> list[LogitRow]:
    return [row for index in range(len(dataset.manifest.shards)) for row in dataset.read_shard(index)]
