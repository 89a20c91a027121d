"""How fast text becomes rows, beside two rivals in the same run; and whether the masks say what the assistant wrote.

    python -m tests.bench.text [--tokenizer FOLDER --files FILE…] [--processes 1 2] [--json FILE]

Variants:
- `ours`: files to rows with their masks, records checked, sample ids made; by so many processes.  Up to the first row
  is `start_s`, which is not in the rates: processes import and load a tokenizer first.
- `encode_batch`: the `tokenizers` library alone on texts that are rendered already; no mask.  The bound.
- `growing_prefixes`: the usual recipe, `apply_chat_template` for each prefix of each record, and masks by counting.
Each runs `--repeats` times; the fastest counts.  `tokens_per_s_per_core` divides by processor seconds, with
several processes by their number.  `--copies` writes the records that often, with ids of their own.

With no arguments a small tokenizer and chats are made up; with real ones the figures mean something.
"""

import argparse
import json
import random
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from shared.layout import Chat, column_names
from shared.raw_records import raw_records
from shared.records import Record, RecordReader
from shared.rows import Row
from shared.text_config import TextSettings
from shared.text_files import find_text_files
from shared.text_rows import Tally, TextRows
from tests.data import chat_records, write_jsonl
from tests.tiny import make_tokenizer


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.tokenizer or str(made_up_tokenizer(Path(scratch)))
        files = arguments.files or [str(write_jsonl(Path(scratch) / "chats.jsonl", chat_records(3000)))]
        if arguments.copies > 1:
            files = copied(files, arguments.copies, Path(scratch))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        records = [record for record in RecordReader(TextSettings(files=files)).records() if isinstance(record, Record)]
        chats = [record.content for record in records if isinstance(record.content, Chat)]
        check_masks(tokenizer, files, chats)
        texts = [tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False) for chat in chats]
        variants: dict[str, Callable[[], Run]] = {
            **{f"ours_{n}": lambda n=n: ours(tokenizer, files, n) for n in arguments.processes},
            "encode_batch": lambda: encode_batch(tokenizer, texts),
            "growing_prefixes": lambda: growing_prefixes(tokenizer, chats),
        }
        runs = {name: [variant() for _ in range(arguments.repeats)] for name, variant in variants.items()}
    results = [row_of(name, min(of, key=lambda run: run.seconds)) for name, of in runs.items()]
    show(results, len(chats))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


class Run(NamedTuple):
    tokens: int
    seconds: float
    cores_s: float
    """Processor seconds."""
    start_s: float = 0.0


def ours(tokenizer: Any, files: list[str], processes: int) -> Run:
    created_s = time.perf_counter()
    rows = rows_of(tokenizer, files, processes)
    num_tokens = next(rows).num_tokens
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    num_tokens += sum(row.num_tokens for row in rows)
    seconds, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    cores_s = cpu_s if processes == 1 else seconds * processes
    return Run(tokens=num_tokens, seconds=seconds, cores_s=cores_s, start_s=begin_s - created_s)


def rows_of(tokenizer: Any, files: list[str], processes: int = 1) -> Iterator[Row]:
    settings = TextSettings(files=files, processes=processes)
    with TextRows(tokenizer, settings) as text:
        yield from text.rows(RecordReader(settings).records(), Tally())


def encode_batch(tokenizer: Any, texts: list[str]) -> Run:
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    num_tokens = sum(len(encoding.ids) for encoding in encodings)
    return Run(num_tokens, time.perf_counter() - begin_s, time.process_time() - begin_cpu_s)


def growing_prefixes(tokenizer: Any, chats: list[Chat]) -> Run:
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    num_tokens = 0
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat.messages, return_dict=False)
        mask = [False] * len(ids)
        for index, turn in enumerate(chat.messages):
            if turn["role"] == "assistant":
                before = chat.messages[:index]
                begin = len(tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False))
                end = len(tokenizer.apply_chat_template(chat.messages[: index + 1], return_dict=False))
                mask[begin:end] = [True] * (end - begin)
        num_tokens += len(ids)
    return Run(num_tokens, time.perf_counter() - begin_s, time.process_time() - begin_cpu_s)


def check_masks(tokenizer: Any, files: list[str], chats: list[Chat]) -> None:
    """Decode every supervised run and compare it with what the file says, read without any code of ours but its turns.

    Raises AssertionError where a run is not the assistant's content and one control token.  For templates that print
    contents as they are.
    """
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    turns = tokens = 0
    for chat, row in zip(chats, rows_of(tokenizer, files), strict=True):
        pairs = zip(row.label_mask_L.tolist(), row.input_ids_L.tolist(), strict=True)
        runs = [[i for _, i in run] for mark, run in groupby(pairs, key=lambda pair: pair[0]) if mark]
        said = [turn["content"] for turn in chat.messages if turn["role"] == "assistant"]
        assert len(runs) == len(said), f"{row.sample_id}: {len(runs)} supervised runs of {len(said)} turns"
        for ids, content in zip(runs, said, strict=True):
            assert ids[-1] in control, f"{row.sample_id}: the turn has no end"
            assert not control & set(ids[:-1]), f"{row.sample_id}: a control token within a turn"
            decoded = tokenizer.backend_tokenizer.decode(ids[:-1], skip_special_tokens=False)
            assert unicodedata.normalize("NFC", content) == decoded, f"{row.sample_id}: {decoded!r} is not {content!r}"
            turns, tokens = turns + 1, tokens + len(ids)
    print(f"masks: {len(chats):,} records, {turns:,} turns, {tokens:,} supervised tokens decode to what was said")


def row_of(name: str, run: Run) -> dict[str, Any]:
    return {
        "variant": name,
        "seconds": run.seconds,
        "start_s": run.start_s,
        "tokens": run.tokens,
        "tokens_per_s": run.tokens / run.seconds,
        "tokens_per_s_per_core": run.tokens / run.cores_s,
    }


def show(results: list[dict[str, Any]], num_records: int) -> None:
    rival = results[-1]["tokens_per_s_per_core"]
    print(f"{num_records:,} records, {results[0]['tokens']:,} tokens")
    print(f"{'variant':<18} {'start':>6} {'seconds':>8} {'tokens/s':>11} {'per core':>11} {'x growing_prefixes':>19}")
    for row in results:
        ratio = row["tokens_per_s_per_core"] / rival
        times = f"{row['start_s']:>6.2f} {row['seconds']:>8.2f}"
        rates = f"{row['tokens_per_s']:>11,.0f} {row['tokens_per_s_per_core']:>11,.0f}"
        print(f"{row['variant']:<18} {times} {rates} {ratio:>19.2f}")


def copied(files: list[str], copies: int, scratch: Path) -> list[str]:
    """The raw records of all files that often, in one; with no id, so that none comes twice."""
    settings = TextSettings(files=files)
    found = [raw for file in find_text_files(files) for raw in raw_records(file, column_names(settings))]
    fields = [{name: value for name, value in raw.fields.items() if name != "id"} for raw in found]
    return [str(write_jsonl(scratch / "copies.jsonl", fields * copies))]


def made_up_tokenizer(folder: Path) -> Path:
    words = ["".join(random.Random(n).choices("abcdefghijklmnop", k=1 + n % 7)) for n in range(3000)]
    make_tokenizer(folder, vocab_size=2000, sentences=[" ".join(words)])
    return folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", help="folder or Hub name; made up by default")
    parser.add_argument("--files", nargs="+", help="chats, or prompts with responses; made up by default")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write a list with one object for each variant")
    return parser.parse_args()


if __name__ == "__main__":
    main()
