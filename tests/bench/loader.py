"""What the student's stream delivers, how well it mixes, and how long a student waits for it.

    python -m tests.bench.loader [--shards 24] [--kept 64] [--dataset FOLDER --student FOLDER] [--json FILE]

Without a dataset one is made up: rows of unlike lengths, half of their tokens supervised.  Three tables:

*Delivery.*  Positions per second of what is asked for as fast as it comes, each variant in a process of its own, and
that process's memory above what it had before it began.
- `ours`: verified, shuffled over 16 shards, packed, collated, by 1, 2 and 4 threads; `per_worker` is for each of these.
- `shards alone`: our reader, shard by shard, nothing shuffled or packed.
- `datasets`: `load_dataset(streaming=True).shuffle(buffer_size=8192)`, rows as numpy arrays: neither verified, nor
  packed, nor collated.  `pyarrow`: record batches in their order, not even rows.

*Shuffling.*  100,000 rows that lie sorted by source, in shards of 512, in batches of 64.  `mixture` is the standard
deviation of a source's share of a batch, `shard_mates` the share of pairs in a batch that come from one shard, both
over those of a uniform permutation: 1 is perfect.  Rivals with as many rows in memory: `windows` permutes shards, takes
16 at a time and shuffles these; `buffer` permutes shards and draws from a buffer that is refilled, as `datasets` does.

*Waiting.*  A student of the quickstart's shape is trained; `wait` is the share of a step's time that it waited for its
batch, from the third step on.  `padded` is the same run without packing, rows of like length side by side; `masked`
packs for a block mask; `speed` is tokens per second over those of `padded`.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.dataset import LogitDataset
from shared.device import host_peak_bytes
from shared.rows import LogitRow, Positions
from student_train.config import TrainSettings
from student_train.order import epoch_order
from student_train.train import Trainer
from tests.shared.made_datasets import write_dataset
from tests.tiny import make_model, make_tokenizer

BLOCK_ROWS, BATCH_ROWS, SHUFFLED_ROWS, SPREAD = 512, 64, 100_000, 16
VOCAB = 8192


def made_up_rows(shard: int, kept: int) -> list[LogitRow]:
    random = np.random.default_rng(shard)
    rows = []
    for n in range(BLOCK_ROWS):
        num_tokens = int(np.clip(random.lognormal(np.log(180), 0.6), 16, 1000))
        mask = np.arange(num_tokens) >= num_tokens // 2
        count = int(mask.sum())
        logits = np.sort(random.normal(size=(count, kept + 1)) * 3)[:, ::-1]
        logp = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
        ids = np.arange(kept) * (300 // kept) + random.integers(max(1, 300 // kept), size=(count, kept))
        teacher = Positions(
            kept_counts_P=np.full(count, kept, np.int32),
            kept_ids_E=ids.ravel().astype(np.int32),
            kept_logp_E=logp[:, :-1].ravel(),
            realised_logp_P=np.minimum(logp[:, 0], 0),
            entropy_P=np.ones(count, np.float32),
            tail_logsum_PT=np.stack([logp[:, -1]] * 2, axis=1),
        )
        rows.append(
            LogitRow(
                sample_id=f"{shard}/{n}",
                input_ids_L=random.integers(300, size=num_tokens).astype(np.int32),
                label_mask_L=mask,
                teacher=teacher,
            )
        )
    return rows


def made_up(folder: Path, num_shards: int, kept: int) -> tuple[Path, Path]:
    """A dataset, and a student of the quickstart's shape."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    student = make_model(
        folder / "student", vocab_size=512, spread=0.1, max_position_embeddings=1024, tie_word_embeddings=True,
        **shape, num_key_value_heads=4, head_dim=16,
    )  # fmt: skip
    tokenizer = make_tokenizer(student)
    shards = (made_up_rows(shard, kept) for shard in range(num_shards))
    dataset = write_dataset(
        folder / "dataset", shards, tokenizer=tokenizer.backend_tokenizer, vocab_size=512,
        keep={"method": "topk", "k": kept, "max_kl": 1e-4},
    )  # fmt: skip
    return dataset, student


def settings(dataset_folder: Path, student_folder: Path, output: Path, **changes: Any) -> TrainSettings:
    tree: dict[str, Any] = {
        "student": {"model": str(student_folder)},
        "data": {"dataset": str(dataset_folder)},
        "output": str(output),
        "steps": 60,
        "rows_per_step": 16,
        "optimizer": {"learning_rate": 1e-3},
        "shuffle_blocks": SPREAD,
        "device": "cpu",
        "checkpoint": {"every_minutes": None},
    }
    return TrainSettings.model_validate(tree | changes)


# Delivery


def ours(dataset: Path, student: Path, threads: int) -> Iterator[int]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(settings(dataset, student, Path(output), rows_per_step=BATCH_ROWS, loader_threads=threads))
        yield 0
        for batch in trainer.data.batches(0, trainer.data.num_rows // BATCH_ROWS):
            yield batch.num_positions


def shards_alone(dataset: Path, _student: Path, _threads: int) -> Iterator[int]:
    opened = LogitDataset.open(dataset)
    yield 0
    for index in range(len(opened.manifest.shards)):
        yield sum(row.num_positions for row in opened.read_shard(index))


def by_datasets(dataset: Path, _student: Path, _threads: int) -> Iterator[int]:
    from datasets import load_dataset

    files = [str(path) for path in sorted(dataset.glob("data/*.parquet"))]
    stream: Any = load_dataset("parquet", data_files=files, split="train", streaming=True)
    yield 0
    for row in stream.shuffle(seed=0, buffer_size=SPREAD * BLOCK_ROWS).with_format("numpy"):
        yield len(row["entropy"])


def by_pyarrow(dataset: Path, _student: Path, _threads: int) -> Iterator[int]:
    import pyarrow.dataset as arrow_dataset

    opened = arrow_dataset.dataset(dataset / "data", format="parquet")
    yield 0
    for batch in opened.to_batches(batch_size=BATCH_ROWS):
        yield len(batch.column("entropy").flatten())


def deliver(work: Callable[..., Iterator[int]], dataset: Path, student: Path, threads: int, send: Any) -> None:
    counts = work(dataset, student, threads)
    next(counts)  # opened
    before = host_peak_bytes()
    begin_s = time.perf_counter()
    positions = sum(counts)
    send.send((positions, time.perf_counter() - begin_s, host_peak_bytes() - before))


def delivery(dataset: Path, student: Path) -> list[dict[str, Any]]:
    rows = []
    variants: list[tuple[str, Callable[..., Iterator[int]], int]] = [
        *((f"ours, {threads} threads", ours, threads) for threads in (1, 2, 4)),
        ("shards alone", shards_alone, 1),
        ("datasets", by_datasets, 1),
        ("pyarrow", by_pyarrow, 1),
    ]
    context = multiprocessing.get_context("spawn")
    for name, work, threads in variants:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=deliver, args=(work, dataset, student, threads, send))
        process.start()
        positions, seconds, memory = receive.recv()
        process.join()
        rows.append(
            {
                "variant": name,
                "positions": positions,
                "seconds": seconds,
                "positions_per_s": positions / seconds,
                "per_worker": positions / seconds / threads,
                "peak_bytes": memory,
            }
        )
    for row in rows:
        row["of_datasets"] = row["positions_per_s"] / next(
            each["positions_per_s"] for each in rows if each["variant"] == "datasets"
        )
    return rows


# Shuffling


def windows(blocks: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    groups = [blocks[begin : begin + SPREAD].ravel() for begin in range(0, len(blocks), SPREAD)]
    return np.concatenate([random.permutation(group) for group in groups])


def buffered(blocks: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    rows, size = blocks.ravel().tolist(), SPREAD * BLOCK_ROWS
    buffer, out = rows[:size], []
    for row in rows[size:]:
        place = int(random.integers(size))
        out.append(buffer[place])
        buffer[place] = row
    return np.array([*out, *random.permutation(buffer)])


def mixing() -> list[dict[str, Any]]:
    num_blocks = SHUFFLED_ROWS // BLOCK_ROWS
    stored = np.arange(num_blocks * BLOCK_ROWS)
    random = np.random.default_rng(0)

    def permuted() -> NDArray[np.int64]:
        return stored.reshape(num_blocks, BLOCK_ROWS)[random.permutation(num_blocks)]

    orders: dict[str, Callable[[int], NDArray[np.int64]]] = {
        "uniform": lambda _: random.permutation(stored),
        **{
            f"ours, {spread} shards": lambda seed, spread=spread: epoch_order([BLOCK_ROWS] * num_blocks, spread, seed)
            for spread in (4, SPREAD, 64)
        },
        f"windows, {SPREAD} shards": lambda _: windows(permuted(), random),
        f"buffer, {SPREAD} shards": lambda _: buffered(permuted(), random),
        "as it lies": lambda _: stored,
    }
    found = {name: np.mean([quality(order(seed)) for seed in range(5)], axis=0) for name, order in orders.items()}
    return [
        {"variant": name, "mixture": values[0] / found["uniform"][0], "shard_mates": values[1] / found["uniform"][1]}
        for name, values in found.items()
    ]


def quality(order: NDArray[np.int64]) -> tuple[float, float]:
    """The spread of a source's share among batches, and how many pairs of a batch are of one shard."""
    batches = order[: len(order) // BATCH_ROWS * BATCH_ROWS].reshape(-1, BATCH_ROWS)
    share = (batches < len(order) // 2).mean(axis=1)
    mates = [sum(n * (n - 1) for n in Counter((batch // BLOCK_ROWS).tolist()).values()) for batch in batches]
    return float(share.std()), float(np.mean(mates)) / (BATCH_ROWS * (BATCH_ROWS - 1))


# Waiting


def waiting(
    dataset: Path, student: Path, scratch: Path, *, steps: int, rows_per_step: int, batch_tokens: int
) -> list[dict[str, Any]]:
    rows = []
    kinds: dict[str, dict[str, Any]] = {
        "packed": {},
        "packed, masked": {"student": {"model": str(student), "attention": "sdpa"}},
        "padded": {"packing": False},
    }
    for name, changes in kinds.items():
        budget = {"rows_per_step": rows_per_step, "batch_tokens": batch_tokens, "steps": steps}
        Trainer(settings(dataset, student, scratch / name, **budget | changes)).run()
        entries = [json.loads(line) for line in (scratch / name / "log.jsonl").read_text().splitlines()]
        entries = [entry for entry in entries if "loss" in entry][2:]
        seconds = [entry["elapsed_s"] for entry in entries]
        rows.append(
            {
                "variant": name,
                "wait": statistics.fmean(entry["wait"] for entry in entries),
                "worst_wait": max(entry["wait"] for entry in entries),
                "tokens_per_s": statistics.median(entry["tokens_per_s"] for entry in entries),
                "waste": statistics.fmean(entry["waste"] for entry in entries),
                "seconds": seconds[-1] - seconds[0],
            }
        )
    for row in rows:
        row["speed"] = row["tokens_per_s"] / rows[-1]["tokens_per_s"]
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    names = [name for name in rows[0] if name != "variant"]
    print(f"{'':<20}" + "".join(f"{name:>17}" for name in names))
    for row in rows:
        print(f"{row['variant']:<20}" + "".join(f"{row[name]:>17,.{0 if row[name] > 1e3 else 4}f}" for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--kept", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="that the student is trained")
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of one forward pass")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dataset, student = arguments.dataset, arguments.student
        if dataset is None or student is None:
            dataset, student = made_up(Path(scratch), arguments.shards, arguments.kept)
        tables = {
            "delivery": delivery(dataset, student),
            "shuffling": mixing(),
            "waiting": waiting(
                dataset,
                student,
                Path(scratch),
                steps=arguments.steps,
                rows_per_step=arguments.rows_per_step,
                batch_tokens=arguments.batch_tokens,
            ),
        }
    for title, rows in tables.items():
        show(title, rows)
    if arguments.json:
        told = [{"table": title} | row for title, rows in tables.items() for row in rows]
        arguments.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
