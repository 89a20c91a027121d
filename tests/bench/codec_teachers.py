"""Teachers for the codec's benchmark: from a file, or made up from a seed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shared.rows import Float32, Int32, LogitRow, Positions
from teacher_dump.keep import Threshold, TopK, keep_chunk

ROW_TOKENS = 512
TAU = 0.02
MADE_UP_POSITIONS, MADE_UP_VOCABULARY = 8192, 32_003


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The K most probable ids of N positions, exact, and a threshold sample of the same distributions."""

    name: str
    vocab_size: int
    ids_NK: Int32
    logp_NK: Float32
    realised_N: Int32
    realised_logp_N: Float32
    entropy_N: Float32
    tail_logsum_NT: Float32
    """At T = 1 and 2, off the K."""
    sampled: Positions
    tau: float

    def kept(self, k: int, min_prob: float) -> Positions:
        """What `topk` keeps of it: what is not kept goes to the tails."""
        logp_NK = self.logp_NK.astype(np.float64)
        is_kept_NK = (np.arange(logp_NK.shape[1]) < k) & (np.exp(logp_NK) >= min_prob)
        is_kept_NK[:, 0] = True
        with np.errstate(divide="ignore"):
            tails = [
                np.logaddexp(tail_N, np.log(np.where(is_kept_NK, 0.0, np.exp(logp_NK / temperature)).sum(axis=1)))
                for temperature, tail_N in zip((1.0, 2.0), self.tail_logsum_NT.T.astype(np.float64), strict=True)
            ]
        order = np.argsort(np.where(is_kept_NK, self.ids_NK, self.vocab_size), axis=1)
        is_kept_NK = np.take_along_axis(is_kept_NK, order, axis=1)
        return Positions(
            kept_counts_P=is_kept_NK.sum(axis=1).astype(np.int32),
            kept_ids_E=np.take_along_axis(self.ids_NK, order, axis=1)[is_kept_NK],
            kept_logp_E=np.take_along_axis(self.logp_NK, order, axis=1)[is_kept_NK],
            realised_logp_P=self.realised_logp_N,
            entropy_P=self.entropy_N,
            tail_logsum_PT=np.stack(tails, axis=1).astype(np.float32),
        )

    def rows(self, positions: Positions, copies: int = 1) -> list[LogitRow]:
        """As rows of ROW_TOKENS supervised tokens behind one that is not."""
        lengths = [ROW_TOKENS] * (len(self.realised_N) // ROW_TOKENS)
        mask_L = np.arange(ROW_TOKENS + 1) > 0
        return [
            LogitRow(
                sample_id=f"{copy}-{n}",
                source=self.name,
                input_ids_L=np.concatenate([[0], self.realised_N[n * ROW_TOKENS :][:ROW_TOKENS]]).astype(np.int32),
                label_mask_L=mask_L,
                teacher=teacher,
            )
            for copy in range(copies)
            for n, teacher in enumerate(positions.split(lengths))
        ]


def load_teacher(file: Path) -> Teacher:
    with np.load(file, allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    counts_P = data["n_thr"].astype(np.int32)
    position_E = np.repeat(np.arange(len(counts_P)), counts_P)
    order = np.lexsort([data["thr_ids"], position_E])
    return Teacher(
        name=file.stem,
        vocab_size=int(data["vocab_size"]),
        ids_NK=data["ids"].astype(np.int32),
        logp_NK=data["logp"].astype(np.float32),
        realised_N=data["realised"].astype(np.int32),
        realised_logp_N=data["realised_logp"].astype(np.float32),
        entropy_N=data["entropy"].astype(np.float32),
        tail_logsum_NT=np.stack([data["tail_logsum_t1"], data["tail_logsum_t2"]], axis=1).astype(np.float32),
        sampled=Positions(
            kept_counts_P=counts_P,
            kept_ids_E=data["thr_ids"][order].astype(np.int32),
            kept_logp_E=np.log(data["thr_p"][order]).astype(np.float32),
            realised_logp_P=data["realised_logp"].astype(np.float32),
            entropy_P=data["entropy"].astype(np.float32),
            tail_logsum_PT=np.zeros((len(counts_P), 0), np.float32),
        ),
        tau=TAU,
    )


def made_up_teacher(seed: int = 0) -> Teacher:
    """softmax of a Zipf-Mandelbrot prior and random features of rank 64; tokens are drawn from it."""
    torch.manual_seed(seed)
    prior_V = -1.1 * torch.log(torch.arange(MADE_UP_VOCABULARY) + 2.7)[torch.randperm(MADE_UP_VOCABULARY)]
    features_VR = torch.randn(MADE_UP_VOCABULARY, 64) * 0.35
    topk, sampled, realised = [], [], []
    for begin in range(0, MADE_UP_POSITIONS, ROW_TOKENS):
        logits_NV = prior_V + torch.randn(ROW_TOKENS, 64) @ features_VR.T
        realised_N = torch.multinomial(torch.softmax(logits_NV, dim=1), 1).flatten()
        rule = Threshold(tau=TAU, seed=seed, always_ids=())
        draws_N = rule.draws(str(begin), ROW_TOKENS)
        sampled.append(keep_chunk(logits_NV.clone(), realised_N, rule, [1.0], draws_N).positions())
        rule = TopK(k=64, min_prob=0.0, always_ids=())
        topk.append(keep_chunk(logits_NV, realised_N, rule, [1.0, 2.0]).positions())
        realised.append(realised_N.numpy().astype(np.int32))
    kept = Positions.concatenate(topk)
    order = np.argsort(-kept.kept_logp_E.reshape(-1, 64), axis=1)
    return Teacher(
        name="made up",
        vocab_size=MADE_UP_VOCABULARY,
        ids_NK=np.take_along_axis(kept.kept_ids_E.reshape(-1, 64), order, axis=1),
        logp_NK=np.take_along_axis(kept.kept_logp_E.reshape(-1, 64), order, axis=1),
        realised_N=np.concatenate(realised),
        realised_logp_N=kept.realised_logp_P,
        entropy_N=kept.entropy_P,
        tail_logsum_NT=kept.tail_logsum_PT,
        sampled=Positions.concatenate(sampled),
        tau=TAU,
    )
