"""Positions per second from text to a sealed dataset, beside the bare engine and beside how others take log-probs.

    python -m tests.bench.dump [--engine vllm|transformers …] [--supervised 0.5] [--rows 192] [--json FILE]

A made-up teacher (random weights; 8 layers, D 512, V 32,768 unless told otherwise) reads rows of 512 tokens, of which
a share is supervised, one stretch at the end, as an answer stands behind its prompt.  k is 64.

- `bare`: the engine does the same prefill and gives no log-probabilities.  Positions are those of the rows, though
  nothing is known of them.
- `ours`: `teacher-dump run` on a file of these rows, from the loaded engine to the sealed dataset: reading twice,
  forward pass, stored values, rounding, encoding, hashing, writing.
- `usual`: what others do.  vLLM: `prompt_logprobs=64`, `flat_logprobs` off.  transformers: log_softmax of all logits,
  topk, `.tolist()`.  Nothing is written.

On a GPU, with a teacher of 1.3 billion parameters:

    python -m tests.bench.dump --engine transformers --dtype bfloat16 --layers 22 --hidden 2048 --intermediate 8192 \
        --vocab 151936 --rows 512 --usual-rows 64 --unit-records 128 --batch-tokens 16384

Rounds are interleaved, so that a machine that drifts does so for all; `seconds` is the median, `of_bare` the median
over rounds of a variant's positions per second over those of the round's bare engine.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.batching import PaddedBatch, batches_by_length
from shared.rows import Row
from teacher_dump.config import DumpSettings, TeacherSettings
from teacher_dump.engines import open_engine, teacher_identity
from teacher_dump.keep import TopK
from tests.data import sealed_dump
from tests.tiny import make_model, make_tokenizer

KEPT = 64


def write_rows(path: Path, arguments: argparse.Namespace) -> list[Row]:
    """Rows of made-up tokens, as ready tokens in a file."""
    random = np.random.default_rng(0)
    mask = np.arange(arguments.tokens) >= max(1, round(arguments.tokens * (1 - arguments.supervised)))
    rows = []
    with path.open("w") as file:
        for n in range(arguments.rows):
            ids = random.integers(3, 300, size=arguments.tokens)
            file.write(json.dumps({"id": str(n), "input_ids": ids.tolist(), "label_mask": mask.astype(int).tolist()}))
            file.write("\n")
            rows.append(Row(sample_id=str(n), input_ids_L=ids.astype(np.int32), label_mask_L=mask))
    return rows


def settings_of(engine: str, folder: Path, arguments: argparse.Namespace) -> DumpSettings:
    teacher: dict[str, Any] = {"model": str(folder / "teacher"), "engine": engine, "dtype": arguments.dtype}
    teacher |= {"batch_tokens": arguments.batch_tokens, "chunk_positions": arguments.chunk_positions}
    if engine == "vllm":
        teacher["vllm"] = {"enforce_eager": True, "engine_args": {"max_logprobs": KEPT}}
    return DumpSettings.model_validate(
        {
            "teacher": teacher,
            "data": {"files": [str(folder / "rows.jsonl")]},
            "output": str(folder / "dump"),
            "keep": {"k": KEPT},
            "unit_records": arguments.unit_records,
        }
    )


class Bench:
    """A loaded engine and its three ways through the rows."""

    def __init__(self, settings: DumpSettings, engine: Any, rows: list[Row]) -> None:
        self._settings, self._engine, self._rows = settings, engine, rows

    def ours(self) -> None:
        """With the engine that is loaded already, closed by nobody."""
        loaded = contextlib.nullcontext(self._engine)
        with tempfile.TemporaryDirectory() as folder:
            settings = self._settings.model_copy(update={"output": f"{folder}/dump"})
            sealed_dump(settings, load=lambda *_args, **_more: loaded)

    def bare(self) -> None:
        if self._settings.teacher.engine == "vllm":
            self._generate()
            return
        with torch.inference_mode():
            for batch in self._batches():
                batch.hidden_at_positions(self._engine._body)
            self._wait()

    def usual(self) -> None:
        if self._settings.teacher.engine == "vllm":
            self._generate(prompt_logprobs=KEPT)
            return
        with torch.inference_mode():
            for batch in self._batches():
                hidden_BLD = self._engine._body(input_ids=batch.input_ids_BL, use_cache=False).last_hidden_state
                for hidden_LD in hidden_BLD:
                    top = self._engine._head.logits(hidden_LD).log_softmax(dim=1).topk(KEPT, dim=1)
                    top.values.tolist()
                    top.indices.tolist()

    def _batches(self) -> Iterator[PaddedBatch]:
        lengths = [row.num_tokens for row in self._rows]
        for indices in batches_by_length(lengths, self._settings.teacher.batch_tokens):
            yield PaddedBatch.of([self._rows[index] for index in indices], self._engine._device)

    def _wait(self) -> None:
        if self._engine._device.type != "cpu":
            torch.accelerator.synchronize()

    def _generate(self, **more: Any) -> None:
        from vllm import SamplingParams

        engine = self._engine._engine
        for n, row in enumerate(self._rows):
            parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **more)
            engine.add_request(f"bench-{n}", {"prompt_token_ids": row.input_ids_L[:-1].tolist()}, parameters)
        while engine.has_unfinished_requests():
            engine.step()


def measure(bench: Bench, rows: Sequence[Row], repeats: int, usual_rows: int) -> dict[str, list[float]]:
    """Positions per second of every variant in every round; `usual` goes over fewer rows, since it takes so long."""
    few = Bench(bench._settings, bench._engine, list(rows[:usual_rows]))
    variants: dict[str, tuple[Callable[[], None], Sequence[Row]]] = {
        "bare": (bench.bare, rows),
        "ours": (bench.ours, rows),
        "usual": (few.usual, rows[:usual_rows]),
    }
    few.bare()  # warm
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (run, of_rows) in variants.items():
            begin_s = time.perf_counter()
            run()
            speeds[name].append(sum(row.num_positions for row in of_rows) / (time.perf_counter() - begin_s))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", nargs="*", choices=["vllm", "transformers"], default=["vllm", "transformers"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--usual-rows", type=int, default=32)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of a row's tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--chunk-positions", type=int, default=256)
    parser.add_argument("--unit-records", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_teacher(folder / "teacher", arguments)
        rows = write_rows(folder / "rows.jsonl", arguments)
        for engine in arguments.engine:
            settings = settings_of(engine, folder, arguments)
            results += results_of(engine, settings, rows, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def make_teacher(folder: Path, arguments: argparse.Namespace) -> None:
    heads = arguments.hidden // 64
    shape = {"hidden_size": arguments.hidden, "intermediate_size": arguments.intermediate, "head_dim": 64}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": arguments.layers}
    shape |= {"vocab_size": arguments.vocab, "max_position_embeddings": 2 * arguments.tokens}
    make_tokenizer(make_model(folder, **shape))


def results_of(
    engine: str, settings: DumpSettings, rows: list[Row], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    teacher: TeacherSettings = settings.teacher
    identity = teacher_identity(teacher)
    rule = TopK(k=KEPT, min_prob=0.0, always_ids=())
    with open_engine(teacher, identity, rule, [1.0], longest_row=arguments.tokens) as loaded:
        speeds = measure(Bench(settings, loaded, rows), rows, arguments.repeats, arguments.usual_rows)
    results = []
    for variant, of_variant in speeds.items():
        of_bare = statistics.median(one / bare for one, bare in zip(of_variant, speeds["bare"], strict=True))
        speed = statistics.median(of_variant)
        result = {"engine": identity.engine, "variant": variant, "k": KEPT, "positions_per_s": round(speed, 1)}
        result |= {"of_bare": round(of_bare, 3), "vocab": arguments.vocab, "dtype": arguments.dtype}
        results.append(result | {"supervised": arguments.supervised})
        print(f"{identity.engine}  {variant:6} {speed:10,.0f} positions/s  {of_bare:6.3f} of bare", flush=True)
    return results


if __name__ == "__main__":
    main()
