"""Whole datasets without a teacher: distributions out of a random generator, kept as the format says.

They pass `verify --deep`: the realised token's value fits, kept ids and tail add up to one.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

from shared.card import dataset_card
from shared.fingerprint import tokenizer_fingerprint
from shared.manifest import FORMAT_VERSION, Input, InputFile, Manifest, Teacher, row_format, write_manifest
from shared.rows import LogitRow, Positions
from shared.shard_writer import Storage, encode_shard

LETTERS = "abcdefghijklmnopqrstuvwxyzäöüß√中"
MERGES = [("a", "b"), ("ab", "c"), ("√", "中")]


def tiny_tokenizer(letters: str = LETTERS) -> Tokenizer:
    tokens = [*letters, *(a + b for a, b in MERGES)]
    return Tokenizer(BPE(vocab={token: token_id for token_id, token in enumerate(tokens)}, merges=MERGES))


V = tiny_tokenizer().get_vocab_size() + 2  # a teacher's vocabulary has a little padding


def random_logp(state: np.random.Generator, num_positions: int) -> Any:
    """Log-probabilities of a whole vocabulary, sharp in some positions and flat in others [P, V]."""
    logits_PV = state.normal(size=(num_positions, V)) * state.uniform(0.5, 6, (num_positions, 1))
    return (logits_PV - np.logaddexp.reduce(logits_PV, axis=1, keepdims=True)).astype(np.float32)


def made_row(state: np.random.Generator, name: str, num_tokens: int, kept: Callable[..., Positions]) -> LogitRow:
    mask = state.random(num_tokens) < 0.6
    mask[:2] = False, True
    input_ids = state.integers(0, V, num_tokens).astype(np.int32)
    logp_PV = random_logp(state, int(mask.sum()))
    input_ids[1] = logp_PV[0].argmax()  # one realised token at least is among the kept
    teacher = kept(logp_PV, input_ids[mask], name)
    return LogitRow(
        sample_id=name, source=f"text-{len(name) % 2}.jsonl", input_ids_L=input_ids, label_mask_L=mask, teacher=teacher
    )


def topk(logp_PV: Any, labels_P: Any, name: str) -> Positions:
    """Six ids and tails at 1 and 2; every third position keeps one id, the last all of them: an empty tail."""
    num_kept_P = np.where(np.arange(len(logp_PV)) % 3, 6, 1)
    is_kept_PV = np.argsort(np.argsort(-logp_PV, axis=1), axis=1) < num_kept_P[:, None]
    is_kept_PV[-1] = True
    rest_PV = np.where(is_kept_PV, -np.inf, logp_PV.astype(np.float64))
    tails = [np.logaddexp.reduce(rest_PV / temperature, axis=1) for temperature in (1.0, 2.0)]
    return _positions(logp_PV, is_kept_PV, labels_P, logp_PV, np.stack(tails, axis=1).astype(np.float32))


def threshold(logp_PV: Any, labels_P: Any, name: str, *, tau: float = 0.05, seed: int = 3) -> Positions:
    """By the definition in FORMAT.md, one position after the other."""
    p_PV = np.exp(logp_PV.astype(np.float64))
    is_large_PV = p_PV >= tau
    digest = hashlib.shake_256(f"{seed}:{name}".encode()).digest(8 * len(p_PV))
    u_P = (np.frombuffer(digest, dtype="<u8") >> 11) / 2.0**53
    steps_PV = np.floor(u_P[:, None] + np.cumsum(np.where(is_large_PV, 0, p_PV / tau), axis=1))
    is_drawn_PV = np.diff(steps_PV, axis=1, prepend=0) > 0
    is_kept_PV = is_large_PV | is_drawn_PV
    is_kept_PV[np.arange(len(p_PV)), p_PV.argmax(axis=1)] = True
    weights_PV = np.where(is_large_PV, logp_PV, np.float32(np.log(tau)))
    return _positions(weights_PV, is_kept_PV, labels_P, logp_PV, np.zeros((len(p_PV), 0), np.float32))


def _positions(values_PV: Any, is_kept_PV: Any, labels_P: Any, logp_PV: Any, tail_PT: Any) -> Positions:
    p_PV = np.exp(logp_PV.astype(np.float64))
    return Positions(
        kept_counts_P=is_kept_PV.sum(axis=1).astype(np.int32),
        kept_ids_E=np.nonzero(is_kept_PV)[1].astype(np.int32),
        kept_logp_E=np.minimum(values_PV[is_kept_PV], 0).astype(np.float32),
        realised_logp_P=np.minimum(logp_PV[np.arange(len(labels_P)), labels_P], 0),
        entropy_P=-(p_PV * logp_PV).sum(axis=1).astype(np.float32),
        tail_logsum_PT=tail_PT,
    )


def made_rows(seed: int, num_rows: int, kept: Callable[..., Positions] = topk) -> list[LogitRow]:
    state = np.random.default_rng(seed)
    return [made_row(state, f"{seed}-zeile-ü-{n}", int(state.integers(4, 24)), kept) for n in range(num_rows)]


def write_dataset(
    folder: Path,
    shards: Iterable[Sequence[LogitRow]],
    *,
    max_kl: float = 1e-4,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = V,
    **changes: Any,
) -> Path:
    """A sealed dataset of these rows; `changes` go to the manifest."""
    keep = changes.pop("keep", {"method": "topk", "k": 6, "max_kl": max_kl})
    temperatures = [1.0, 2.0] if keep["method"] == "topk" else [1.0]
    untouched = float(np.float32(np.log(keep["tau"]))) if keep["method"] == "threshold" else None
    storage, form = Storage(max_kl=max_kl, untouched_logp=untouched), row_format(keep, temperatures, vocab_size)
    entries = []
    for number, rows in enumerate(shards):
        data, entry = encode_shard(rows, form, storage, f"data/part-{number:05d}.parquet")
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / entry.path).write_bytes(data)
        entries.append(entry)
    tokenizer = tokenizer or tiny_tokenizer()
    tree: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "created_by": "logitferry tests",
        "teacher": Teacher(
            name="made up", architecture="None", dtype="float32", vocab_size=vocab_size, revision="0" * 40
        ),
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "chat_template_sha256": None,
        "keep": keep,
        "temperatures": temperatures,
        "inputs": [Input(files=[InputFile(name="none", sha256="0" * 64)], settings={}, tally={"records": 1})],
        "unit_records": 8,
        "shards": entries,
        "missing": [],
        "history": [],
        "files": {},
    }
    manifest = Manifest.model_validate(tree | changes)
    others = {"tokenizer/tokenizer.json": tokenizer.to_str(pretty=True), "README.md": dataset_card(manifest)}
    for path, text in others.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(text.encode())
    files = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in others.items()}
    write_manifest(folder, manifest.model_copy(update={"files": manifest.files | files}))
    return folder


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    tree = json.loads(path.read_bytes())
    edit(tree)
    path.write_text(json.dumps(tree))


def reseal(folder: Path, index: int = 0, **counts: Any) -> None:
    """Give a shard the digest and size it has now, and other counts: a careless or hostile writer, not a bad disk."""

    def edit(tree: dict[str, Any]) -> None:
        shard = tree["shards"][index]
        data = (folder / shard["path"]).read_bytes()
        shard.update(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), **counts)

    edit_manifest(folder, edit)


def rewrite_shard(folder: Path, change: Callable[[bytes], bytes], index: int = 0, **counts: Any) -> None:
    """Change the bytes of a shard, and seal it again."""
    path = folder / json.loads((folder / "manifest.json").read_bytes())["shards"][index]["path"]
    path.write_bytes(change(path.read_bytes()))
    reseal(folder, index, **counts)
