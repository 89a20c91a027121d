"""What a sampled teacher costs in bytes and in noise of the gradient, beside RS-KD's sampling, in one table.

    python -m tests.bench.sampling [--json FILE]

Two made-up teachers over a vocabulary of 32,003 (a Zipf-Mandelbrot prior and random features; the second one twice as
sure of itself), and a student that is somewhat wrong about them.

- `threshold`: p >= tau exactly, every other id with probability p / tau and weight tau, as `keep.method: threshold`.
- `rs_kd`: so many draws with replacement, each worth 1 / draws (arXiv 2503.16870).

Both estimate forward KL without bias.  `gradient_noise` is the mean of ‖ĝ − g‖² over positions, with g = q − p the
gradient of the logits under the full teacher and ĝ = (Σw) q − w under the sample; `value_noise` is the standard
deviation of −Σ w log q around −Σ p log q.  Bytes are those of the same columns of our format for both;
`published_bytes` are RS-KD's own 3 bytes for each distinct id.  `noise_ratio` is RS-KD's gradient noise at as many
bytes, read off between its rows, over that of the row.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.rows import LogitRow, Positions
from shared.schema import RowFormat
from shared.shard_writer import Storage, encode_shard
from teacher_dump.keep import Threshold, keep_chunk
from tests.bench.codec_teachers import ROW_TOKENS

VOCABULARY, POSITIONS, SEED = 32_003, 4096, 0
TAUS, DRAWS = (0.1, 0.05, 0.02, 0.01), (5, 12, 25, 50, 100, 200, 400)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="write a list with one object for each variant")
    parser.add_argument("--positions", type=int, default=POSITIONS, help=f"a multiple of {ROW_TOKENS}")
    arguments = parser.parse_args()
    rows = []
    for name, sharpness in (("flat", 1.0), ("sharp", 2.0)):
        found = [measure(name, sharpness, "threshold", tau, arguments.positions) for tau in TAUS]
        rivals = [measure(name, sharpness, "rs_kd", draws, arguments.positions) for draws in DRAWS]
        for row in found:
            row["noise_ratio"] = noise_at(row["bytes_per_position"], rivals) / row["gradient_noise"]
        rows += show(name, found + rivals)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def batches(sharpness: float, positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of teacher and student, ROW_TOKENS positions at a time."""
    torch.manual_seed(SEED)
    prior_V = -1.1 * torch.log(torch.arange(VOCABULARY) + 2.7)[torch.randperm(VOCABULARY)]
    features_VR = torch.randn(VOCABULARY, 64) * 0.35
    for _ in range(0, positions, ROW_TOKENS):
        logits_NV = sharpness * (prior_V + torch.randn(ROW_TOKENS, 64) @ features_VR.T)
        yield logits_NV, logits_NV + 0.7 * torch.randn(ROW_TOKENS, 64) @ features_VR.T


def measure(teacher: str, sharpness: float, variant: str, setting: float, positions: int) -> dict[str, Any]:
    parts, gradient_noise, value_noise = [], [], []
    for number, (teacher_NV, student_NV) in enumerate(batches(sharpness, positions)):
        log_p_NV, log_q_NV = torch.log_softmax(teacher_NV, dim=1), torch.log_softmax(student_NV, dim=1)
        if variant == "threshold":
            part = by_threshold(teacher_NV, float(setting), number)
        else:
            part = by_draws(log_p_NV, int(setting))
        w_NV = weights_of(part)
        noise_NV = (w_NV.sum(dim=1, keepdim=True) - 1) * log_q_NV.exp() - (w_NV - log_p_NV.exp())
        gradient_noise.append(noise_NV.square().sum(dim=1))
        value_noise.append(((log_p_NV.exp() - w_NV) * log_q_NV).sum(dim=1))
        parts.append(part)
    sample = Positions.concatenate(parts)
    return {
        "variant": variant,
        "teacher": teacher,
        "tau" if variant == "threshold" else "draws": setting,
        "vocab": VOCABULARY,
        "kept_per_position": len(sample.kept_ids_E) / positions,
        "bytes_per_position": encoded_bytes(sample, setting if variant == "threshold" else 1.0) / positions,
        "gradient_noise": float(torch.cat(gradient_noise).mean()),
        "value_noise": float(torch.cat(value_noise).square().mean().sqrt()),
    } | ({} if variant == "threshold" else {"published_bytes": 3 * len(sample.kept_ids_E) / positions})


def by_threshold(teacher_NV: Tensor, tau: float, number: int) -> Positions:
    rule = Threshold(tau=tau, seed=SEED, always_ids=())
    realised_N = teacher_NV.argmax(dim=1)
    return keep_chunk(teacher_NV.clone(), realised_N, rule, [1.0], rule.draws(str(number), ROW_TOKENS)).positions()


def by_draws(log_p_NV: Tensor, draws: int) -> Positions:
    drawn_NS = torch.multinomial(log_p_NV.exp(), draws, replacement=True)
    counts_NV = torch.zeros_like(log_p_NV).scatter_add_(1, drawn_NS, torch.ones_like(drawn_NS, dtype=torch.float32))
    kept_NV = counts_NV > 0
    return Positions(
        kept_counts_P=kept_NV.sum(dim=1).to(torch.int32).numpy(),
        kept_ids_E=kept_NV.nonzero()[:, 1].to(torch.int32).numpy(),
        kept_logp_E=(counts_NV[kept_NV] / draws).log().numpy(),
        realised_logp_P=log_p_NV.amax(dim=1).numpy(),
        entropy_P=-(log_p_NV.exp() * log_p_NV).sum(dim=1).numpy(),
        tail_logsum_PT=np.zeros((len(log_p_NV), 0), np.float32),
    )


def weights_of(sample: Positions) -> Tensor:
    weights_NV = torch.zeros(sample.num_positions, VOCABULARY)
    row_E = np.repeat(np.arange(sample.num_positions), sample.kept_counts_P)
    weights_NV[torch.from_numpy(row_E), torch.from_numpy(sample.kept_ids_E).long()] = torch.from_numpy(
        sample.kept_logp_E
    ).exp()
    return weights_NV


def encoded_bytes(sample: Positions, untouched: float) -> int:
    """Of ids, weights, realised log p and entropy; weights of the draws are exact counts, so they are not rounded."""
    mask_L = np.arange(ROW_TOKENS + 1) > 0
    ids_L = np.zeros(ROW_TOKENS + 1, np.int32)
    parts = sample.split([ROW_TOKENS] * (sample.num_positions // ROW_TOKENS))
    rows = [
        LogitRow(sample_id=str(n), input_ids_L=ids_L, label_mask_L=mask_L, teacher=part) for n, part in enumerate(parts)
    ]
    form = RowFormat(vocab_size=VOCABULARY, temperatures=(1.0,), has_tails=False)
    storage = Storage(max_kl=1e-4 if untouched < 1 else 0.0, untouched_logp=float(np.float32(np.log(untouched))))
    return encode_shard(rows, form, storage, "data/part-00000.parquet")[1].teacher_bytes


def noise_at(size: float, rivals: list[dict[str, Any]]) -> float:
    """Between the rivals' rows on logarithmic axes; at the last slope beyond them."""
    x = np.log([row["bytes_per_position"] for row in rivals])
    y = np.log([row["gradient_noise"] for row in rivals])
    index = int(np.clip(np.searchsorted(x, np.log(size)), 1, len(x) - 1))
    slope = (y[index] - y[index - 1]) / (x[index] - x[index - 1])
    return float(np.exp(y[index] + slope * (np.log(size) - x[index])))


def show(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    print(f"{name} teacher: {VOCABULARY:,} ids")
    print(
        f"{'variant':<16} {'ids':>6} {'bytes':>7} {'published':>9} "
        f"{'gradient':>10} {'value':>7} {'rs_kd, equal bytes':>19}"
    )
    for row in rows:
        label = f"tau {row['tau']}" if "tau" in row else f"{row['draws']} draws"
        published = f"{row['published_bytes']:9.1f}" if "published_bytes" in row else " " * 9
        ratio = f"{row['noise_ratio']:18.1f}x" if "noise_ratio" in row else ""
        print(
            f"{label:<16} {row['kept_per_position']:6.1f} {row['bytes_per_position']:7.1f} {published} "
            f"{row['gradient_noise']:10.1e} {row['value_noise']:7.3f} {ratio}"
        )
    print()
    return rows


if __name__ == "__main__":
    main()
