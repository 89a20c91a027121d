"""How small a dataset is, what its rounding loses, and how fast it is written and read; beside rivals in the same run.

    python -m tests.bench.codec [--logits FILE.npz] [--json FILE]

Without --logits a seeded synthetic teacher is made up, whose ids cannot be guessed from context: pessimistic.  A file
has, for N positions, natural logarithms and p over the full vocabulary: `ids`, `logp` [N, K] by falling probability,
`realised`, `realised_logp`, `tail_logsum_t1`, `tail_logsum_t2`, `entropy` [N], `vocab_size`, and a threshold sample:
`n_thr` [N], `thr_ids`, `thr_p`, one position after the other.

Variants:
- `ours`: kept ids, log p, realised log p, entropy and tails at T = 1 and 2, at the default accuracy and level;
  `ours_zstd9` and `ours_exact` differ in one of these.
- `raw`: ids as int32 and log p as fp16, with pyarrow's defaults; no tail, no entropy, no checksum.
- `ours_threshold`: the sample, its realised log p and entropy.
- `rs_kd`: 50 draws with replacement at 3 bytes for each distinct id, as published (arXiv 2503.16870); computed.

`bytes_per_position` are compressed column chunks, levels and page headers included.  `mean_kl_nats` is computed here,
in fp64, from what was read back; the rivals get the exact tail for nothing.  `noise` is E‖p̂ − p‖², the variance of a
sampled target.  Writing includes rounding, measuring and reading back; reading is from file to checked arrays, digest
and page checksums included.  One thread; the fastest of --repeats.  `peak_bytes` is what a fresh process needs
to stream a shard beyond what it needs to start.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.manifest import Shard
from shared.rows import Positions
from shared.schema import RowFormat
from shared.shard_reader import read_row_groups
from shared.shard_writer import Storage, encode_shard
from tests.bench.codec_teachers import Teacher, load_teacher, made_up_teacher

DEFAULT_KL, RS_KD_DRAWS, RS_KD_BYTES = 1e-4, 50, 3
PATH = "data/part-00000.parquet"
STREAM = """
import json, re, sys
from pathlib import Path
from shared.manifest import Shard
from shared.schema import RowFormat
from shared.shard_reader import read_row_groups

def peak_kib():
    return int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1])

folder, tree, vocab_size = json.load(sys.stdin)
form = RowFormat(vocab_size=vocab_size, temperatures=(1.0, 2.0), has_tails=True)
Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of starting up
before = peak_kib()
for rows in read_row_groups(Path(folder), Shard.model_validate(tree), form):
    pass
print((peak_kib() - before) * 1024)
"""


def main() -> None:
    arguments = parse_arguments()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    teacher = load_teacher(arguments.logits) if arguments.logits else made_up_teacher()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(teacher=teacher, folder=Path(scratch), repeats=arguments.repeats)
        for k in (10, 16, 32, 64):
            results += [bench.ours("ours", k=k), bench.raw(k)]
        results.append(bench.ours("ours", k=64, min_prob=1e-4))
        results.append(bench.ours("ours_zstd9", k=64, zstd_level=9))
        results.append(bench.ours("ours_zstd9", k=64, min_prob=1e-4, zstd_level=9))
        results.append(bench.ours("ours_exact", k=64, max_kl=0.0))
        results += [bench.threshold(), bench.rs_kd()]
        results += [bench.reader_peak(copies) for copies in (1, 8)]
    show(teacher, results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


SHOWN = [
    ("kept_per_position", 6, ".1f"),
    ("bytes_per_position", 7, ".1f"),
    ("mean_kl_nats", 8, ".1e"),
    ("kl_nats_t2", 8, ".1e"),
    ("noise", 8, ".1e"),
    ("encode_positions_per_s", 9, ",.0f"),
    ("decode_positions_per_s", 10, ",.0f"),
]


@dataclass(frozen=True, kw_only=True)
class Bench:
    teacher: Teacher
    folder: Path
    repeats: int

    def ours(
        self, variant: str, *, k: int, min_prob: float = 0.0, max_kl: float = DEFAULT_KL, zstd_level: int | None = None
    ) -> dict[str, Any]:
        exact = self.teacher.kept(k, min_prob)
        form = RowFormat(vocab_size=self.teacher.vocab_size, temperatures=(1.0, 2.0), has_tails=True)
        storage = Storage(max_kl=max_kl) if zstd_level is None else Storage(max_kl=max_kl, zstd_level=zstd_level)
        row, stored = self._measure(variant, exact, form, storage)
        losses = {f"kl_nats_t{t:g}": float(kl(exact, stored, t, j).mean()) for j, t in enumerate(form.temperatures)}
        mean_kl = losses.pop("kl_nats_t1")
        return row | {"k": k, "min_prob": min_prob, "mean_kl_nats": mean_kl} | losses

    def threshold(self) -> dict[str, Any]:
        exact, tau = self.teacher.sampled, self.teacher.tau
        form = RowFormat(vocab_size=self.teacher.vocab_size, temperatures=(1.0,), has_tails=False)
        storage = Storage(max_kl=DEFAULT_KL, untouched_logp=float(np.float32(np.log(tau))))
        row, _ = self._measure("ours_threshold", exact, form, storage)
        p_NK, tail_N = np.exp(self.teacher.logp_NK.astype(np.float64)), np.exp(self.teacher.tail_logsum_NT[:, 0])
        noise_N = np.where(p_NK < tau, p_NK * (tau - p_NK), 0.0).sum(1) + tail_N * tau
        return row | {"tau": tau, "noise": float(noise_N.mean())}

    def rs_kd(self) -> dict[str, Any]:
        """What is not among the K is taken to be drawn once at most, and to have no Σ p²."""
        p_NK, tail_N = np.exp(self.teacher.logp_NK.astype(np.float64)), np.exp(self.teacher.tail_logsum_NT[:, 0])
        distinct = float(((1 - (1 - p_NK) ** RS_KD_DRAWS).sum(1) + RS_KD_DRAWS * tail_N).mean())
        noise = float(((1 - (p_NK**2).sum(1)) / RS_KD_DRAWS).mean())
        common = {"variant": "rs_kd", "vocab": self.teacher.vocab_size, "kept_per_position": distinct, "noise": noise}
        return common | {"bytes_per_position": RS_KD_BYTES * distinct}

    def raw(self, k: int) -> dict[str, Any]:
        ids_NK, logp_NK = self.teacher.ids_NK[:, :k], self.teacher.logp_NK[:, :k].astype(np.float16)
        file = self.folder / "raw.parquet"

        def write() -> None:
            offsets = pa.array(np.arange(0, ids_NK.size + 1, k, dtype=np.int32))
            columns = [np.ascontiguousarray(each).ravel() for each in (ids_NK, logp_NK)]
            lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in columns]
            pq.write_table(pa.table(lists, names=["ids", "logp"]), file)

        def read() -> Any:
            table = pq.read_table(file, use_threads=False)
            return [table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in ("ids", "logp")]

        encode_s, decode_s = self._fastest(write), self._fastest(read)
        stored_NK = read()[1].reshape(logp_NK.shape).astype(np.float32)
        exact = self.teacher.kept(k, 0.0)
        order = np.argsort(ids_NK, axis=1)
        stored = Positions(**vars(exact) | {"kept_logp_E": np.take_along_axis(stored_NK, order, 1).ravel()})
        metadata = pq.read_metadata(file)
        chunks = [metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(2)]
        return self._row("raw", exact, encode_s, decode_s) | {
            "k": k,
            "bytes_per_position": sum(chunk.total_compressed_size for chunk in chunks) / exact.num_positions,
            "mean_kl_nats": float(kl(exact, stored, 1.0, 0).mean()),
        }

    def reader_peak(self, copies: int) -> dict[str, Any]:
        rows = self.teacher.rows(self.teacher.kept(64, 0.0), copies)
        form = RowFormat(vocab_size=self.teacher.vocab_size, temperatures=(1.0, 2.0), has_tails=True)
        data, shard = encode_shard(rows, form, Storage(max_kl=DEFAULT_KL), PATH)
        self._write(data)
        request = json.dumps([str(self.folder), shard.model_dump(), self.teacher.vocab_size])
        ran = subprocess.run([sys.executable, "-c", STREAM], input=request, capture_output=True, text=True, check=True)
        groups = pq.read_metadata(self.folder / PATH).num_row_groups
        return {
            "variant": f"reader_peak_{groups}_row_group{'s' * (groups > 1)}",
            "k": 64,
            "vocab": self.teacher.vocab_size,
            "positions": shard.positions,
            "size_bytes": shard.size_bytes,
            "peak_bytes": int(ran.stdout),
        }

    def _measure(
        self, variant: str, exact: Positions, form: RowFormat, storage: Storage
    ) -> tuple[dict[str, Any], Positions]:
        rows = self.teacher.rows(exact)
        encode_s = self._fastest(lambda: encode_shard(rows, form, storage, PATH))
        data, shard = encode_shard(rows, form, storage, PATH)
        self._write(data)
        decode_s = self._fastest(lambda: stream(self.folder, shard, form))
        stored = Positions.concatenate(
            [row.teacher for rows in read_row_groups(self.folder, shard, form) for row in rows]
        )
        row = self._row(variant, exact, encode_s, decode_s)
        return row | {"bytes_per_position": shard.teacher_bytes / shard.positions}, stored

    def _row(self, variant: str, exact: Positions, encode_s: float, decode_s: float) -> dict[str, Any]:
        return {
            "variant": variant,
            "vocab": self.teacher.vocab_size,
            "dtype": "float16" if variant == "raw" else "float32",
            "positions": exact.num_positions,
            "kept_per_position": len(exact.kept_ids_E) / exact.num_positions,
            "encode_positions_per_s": exact.num_positions / encode_s,
            "decode_positions_per_s": exact.num_positions / decode_s,
        }

    def _write(self, data: pa.Buffer) -> None:
        (self.folder / PATH).parent.mkdir(exist_ok=True)
        (self.folder / PATH).write_bytes(data)

    def _fastest(self, work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(self.repeats):
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)


def stream(folder: Path, shard: Shard, form: RowFormat) -> int:
    return sum(row.num_positions for rows in read_row_groups(folder, shard, form) for row in rows)


def kl(exact: Positions, stored: Positions, temperature: float, column: int) -> Any:
    """KL in nats per position over kept ids and tail, both normalised, by its definition."""
    starts_P = np.cumsum(exact.kept_counts_P, dtype=np.int64) - exact.kept_counts_P
    logs = []
    for positions in (exact, stored):
        kept_E = positions.kept_logp_E.astype(np.float64) / temperature
        tail_P = positions.tail_logsum_PT[:, column].astype(np.float64)
        total_P = np.log(np.add.reduceat(np.exp(kept_E), starts_P) + np.exp(tail_P))
        logs.append((kept_E - np.repeat(total_P, exact.kept_counts_P), tail_P - total_P))
    (p_E, p_tail_P), (q_E, q_tail_P) = logs
    with np.errstate(invalid="ignore"):
        tail_P = np.where(np.isneginf(p_tail_P), 0.0, np.exp(p_tail_P) * (p_tail_P - q_tail_P))
    return np.add.reduceat(np.exp(p_E) * (p_E - q_E), starts_P) + tail_P


def show(teacher: Teacher, results: list[dict[str, Any]]) -> None:
    print(f"{teacher.name}: {len(teacher.ids_NK):,} positions, vocabulary of {teacher.vocab_size:,}")
    head = f"{'variant':<26} {'k':>3} {'min_prob':>8} {'ids':>6} {'bytes':>7} {'KL T=1':>8} {'KL T=2':>8} {'noise':>8}"
    print(f"{head} {'write/s':>9} {'read/s':>10} {'peak MiB':>9}")
    for row in results:
        cells = [f"{row[key]:{width}{form}}" if key in row else " " * width for key, width, form in SHOWN]
        peak = f"{row['peak_bytes'] / 2**20:9.1f}" if "peak_bytes" in row else ""
        print(f"{row['variant']:<26} {row.get('k', ''):>3} {row.get('min_prob', '') or '':>8} {' '.join(cells)} {peak}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--logits", type=Path, help="an .npz with the fields above; made up by default")
    parser.add_argument("--json", help="write a list with one object for each variant")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
