"""The stream: every row once an epoch, in an order that depends on the rows and the seed alone."""

import os
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DamagedDataError, MismatchError
from shared.interruption import held_back
from shared.layout import Chat
from shared.models_config import ModelSettings
from shared.pretrained import load_tokenizer
from shared.records import content_id
from shared.rows import Row
from shared.text_rows import Tally
from student_train.data_config import DataSettings
from student_train.order import Competence, EasyToHard, Pace
from student_train.sources import TextSource, open_source
from student_train.stream import Selection, Stream, is_held_out
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import SENTENCES, make_tokenizer


def source_of(block_sizes: list[int], name: str = "") -> TextSource:
    tokens = np.zeros(3, np.int32)
    blocks = [
        [Row(sample_id=f"{name}{b}/{n}", input_ids_L=tokens, label_mask_L=tokens.astype(bool)) for n in range(size)]
        for b, size in enumerate(block_sizes)
    ]
    return TextSource(files=[], blocks=blocks, tally=Tally())


def stream_of(*sources: Any, takes: Any = lambda _: True, **settings: Any) -> Stream:
    selections = [Selection.of(source, takes) for source in sources]
    return Stream(selections, **{"rows_per_step": 4, "seed": 0, "shuffle_blocks": 2} | settings)


def ids(stream: Stream, first: int, last: int) -> list[list[str]]:
    return [[row.sample_id for row in each.rows] for each in stream.steps(first, last)]


def test_the_rows_of_a_step_are_those_that_the_order_says():
    stream = stream_of(source_of([5, 0, 7]), source_of([6], name="other "), rows_per_step=3)
    for each in stream.steps(2, 9):
        refs = stream.order.step(each.step)
        # An empty block is none: the second one that there is has 7 rows.
        names = [["0/{}", "2/{}"], ["other 0/{}"]]
        places = zip(refs.source_R, refs.block_R, refs.row_R, strict=True)
        assert [row.sample_id for row in each.rows] == [names[s][b].format(r) for s, b, r in places]


@given(
    first=st.integers(0, 30),
    count=st.integers(1, 12),
    num_threads=st.integers(1, 4),
    shuffle_blocks=st.integers(1, 9),
    rows_per_step=st.integers(1, 17),
)
@settings(deadline=None, max_examples=50)
def test_a_stream_that_is_entered_anywhere_with_any_number_of_threads_says_the_same(
    first: int, count: int, num_threads: int, shuffle_blocks: int, rows_per_step: int
):
    options = {"shuffle_blocks": shuffle_blocks, "rows_per_step": rows_per_step}
    sources = [source_of([3, 1, 4, 1, 5]), source_of([9, 2], name="other ")]
    whole = ids(stream_of(*sources, **options), 0, first + count)
    assert ids(stream_of(*sources, **options, num_threads=num_threads), first, first + count) == whole[first:]


class Counted(TextSource):
    """Counts the blocks that are read, and how many rows of them are alive."""

    reads: ClassVar[list[int]] = []
    alive: ClassVar[weakref.WeakValueDictionary[int, Row]] = weakref.WeakValueDictionary()

    def read_block(self, index: int) -> list[Row]:
        self.reads.append(index)
        rows = [replace(row) for row in self.blocks[index]]
        self.alive.update({len(self.reads) * 1000 + n: row for n, row in enumerate(rows)})
        return rows


def test_memory_is_bounded_by_the_blocks_that_rows_are_drawn_from():
    """Those under way, one for each that is let go or read ahead; at the border of epochs those of both."""
    source = Counted(files=[], blocks=source_of([100] * 30).blocks, tally=Tally())
    stream, most = stream_of(source, rows_per_step=25, shuffle_blocks=6), {"within": 0, "border": 0}
    for each in stream.steps(0, 360):
        kind = "within" if 40 < each.step % 120 < 110 else "border"
        del each
        most[kind] = max(most[kind], len(Counted.alive))
    assert 500 < most["within"] <= (6 + 3) * 100
    assert most["border"] <= (2 * 6 + 3) * 100


@pytest.mark.parametrize(
    ("sizes", "rows_per_step", "spread", "num_steps", "most"),
    [
        ([[100] * 30], 25, 6, 360, 3 * (30 + 6)),
        ([[100] * 30], 300, 6, 30, 3 * (30 + 6)),  # a step is larger than a block
        ([[100] * 30], 3, 6, 2000, 2 * (30 + 6)),
        ([[100] * 5], 20, 8, 250, 5),  # all are under way, in every epoch
        ([[100] * 30, [8] * 60], 40, 6, 150, (30 + 6) + 7 * (60 + 6)),  # the small blocks go by seven times as often
    ],
)
def test_a_block_is_read_once_an_epoch_and_again_at_its_border(
    sizes: list[list[int]], rows_per_step: int, spread: int, num_steps: int, most: int
):
    Counted.reads.clear()
    sources = [Counted(files=[], blocks=source_of(each).blocks, tally=Tally()) for each in sizes]
    weights = [1.0] * len(sizes)
    for _ in stream_of(*sources, rows_per_step=rows_per_step, shuffle_blocks=spread, weights=weights).steps(
        0, num_steps
    ):
        pass
    assert set(Counted.reads) == set(range(max(map(len, sizes))))
    assert len(Counted.reads) <= most


def test_a_wait_that_is_broken_off_and_a_close_wait_for_nothing():
    """Whoever is asked to stop has a checkpoint to write, however slow the data are and however much is left."""
    source = Slow(files=[], blocks=source_of([10] * 3000).blocks, tally=Tally())
    steps = stream_of(source, rows_per_step=10, shuffle_blocks=1).made_ahead(0, 3000, lambda rows: rows.step)
    assert next(steps) == 0
    begin_s = time.monotonic()
    with held_back() as interruption:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while interruption.unless_asked(lambda: next(steps)) is not None:
            pass
    assert time.monotonic() - begin_s < 5
    assert next(steps) > 0, "the wait can be taken up again"
    begin_s = time.monotonic()
    steps.close()
    assert time.monotonic() - begin_s < 0.2
    read = len(Slow.reads)
    time.sleep(1)
    assert len(Slow.reads) <= read + 8, "nothing more is read than what was begun"


class Slow(TextSource):
    reads: ClassVar[list[int]] = []

    def read_block(self, index: int) -> list[Row]:
        self.reads.append(index)
        time.sleep(0.3)
        return self.blocks[index]


class Broken(TextSource):
    def read_block(self, index: int) -> list[Row]:
        if index == 3:
            raise DamagedDataError("block 3")
        return self.blocks[index]


def test_what_goes_wrong_with_a_block_comes_with_the_first_step_that_needs_it_and_not_before():
    plain = source_of([10] * 8)
    source = Broken(files=[], blocks=plain.blocks, tally=Tally())
    stream = stream_of(source, seed=1, rows_per_step=5)
    first = next(step for step in range(16) if 3 in stream.order.step(step).block_R)
    assert first > 3
    steps = stream.made_ahead(0, 16, lambda rows: rows.step)
    assert [next(steps) for _ in range(first)] == list(range(first))
    with pytest.raises(DamagedDataError, match="block 3"):
        next(steps)


def test_what_is_made_of_a_step_is_ready_before_it_is_asked_for():
    made: list[int] = []
    steps = stream_of(source_of([50])).made_ahead(0, 9, lambda rows: made.append(rows.step) or rows.step)
    assert next(steps) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2]
    assert list(steps) == list(range(1, 9))


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1 / 3])
def test_training_and_held_out_rows_share_nothing(fraction: float):
    names = [f"sample-{n}" for n in range(3000)]
    held_out = [name for name in names if is_held_out(name, fraction)]
    assert len(held_out) == pytest.approx(fraction * 3000, abs=80)
    smaller = [name for name in names if is_held_out(name, fraction / 2)]
    assert set(smaller) <= set(held_out), "a larger fraction only adds"


def test_repeats_of_one_content_are_never_split():
    digest = content_id(Chat(messages=[{"role": "user", "content": "Hello?"}]))
    assert {is_held_out(f"{digest}{suffix}", 0.5) for suffix in ("", "#2", "#3", "#17")} in ({True}, {False})


def test_ids_of_ones_own_are_split_whatever_they_look_like():
    assert {is_held_out(f"gsm8k#{n}", 0.5) for n in range(30)} == {True, False}


@pytest.fixture(scope="module")
def tokenizer(teacher_folder: Path) -> Any:
    """As a student of the teacher's family loads it: transformers chooses the class by the model's config."""
    return load_tokenizer(ModelSettings(model=str(teacher_folder)))


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dumped")
    files = write_jsonl(folder / "chats.jsonl", chat_records(30))
    sealed_dump(dump_settings(teacher_folder, files, folder / "out", unit_records=512))
    return files, folder / "out"


def open_data(tokenizer: Any, **data: Any) -> Any:
    return open_source(DataSettings(**data), tokenizer, vocab_size=307, context_tokens=512)


def test_text_and_the_dataset_made_from_it_stream_alike(dumped: tuple[Path, Path], tokenizer: Any):
    files, folder = dumped
    text = open_data(tokenizer, text={"files": [str(files)]})
    dataset = open_data(tokenizer, dataset=str(folder))
    assert text.sample_ids == dataset.sample_ids
    for one, other in zip(*(stream_of(s).steps(0, 20) for s in (text, dataset)), strict=True):
        for row, same in zip(one.rows, other.rows, strict=True):
            assert row.sample_id == same.sample_id
            np.testing.assert_array_equal(row.input_ids_L, same.input_ids_L)
            np.testing.assert_array_equal(row.label_mask_L, same.label_mask_L)


def test_a_students_foreign_tokenizer_is_refused_with_the_first_difference(dumped: tuple[Path, Path], tmp_path: Path):
    foreign = make_tokenizer(tmp_path, sentences=[*SENTENCES, "zebra zebra zebra zebra zebra"])
    with pytest.raises(MismatchError, match=r"tokenizers differ: the dataset .* the student has .*first at id \d+: '"):
        open_data(foreign, dataset=str(dumped[1]))


def test_a_vocabulary_padded_otherwise_is_no_mismatch(dumped: tuple[Path, Path], tokenizer: Any):
    """Same tokenizer of 300 tokens, embeddings of 307 against 320 or 303 rows, as Qwen2.5 has in its sizes."""
    whole = open_data(tokenizer, dataset=str(dumped[1])).read_block(0)
    for vocab_size in (320, 303):
        data = DataSettings(dataset=str(dumped[1]))
        rows = open_source(data, tokenizer, vocab_size=vocab_size, context_tokens=512).read_block(0)
        for row, before in zip(rows, whole, strict=True):
            assert row.teacher.kept_ids_E.max() < min(vocab_size, 307)
            lost = before.teacher.kept_counts_P.sum() - row.teacher.kept_counts_P.sum()
            assert lost == (before.teacher.kept_ids_E >= vocab_size).sum()
            mass = np.exp(row.teacher.kept_logp_E).sum() + np.exp(row.teacher.tail_logsum_PT[:, 0]).sum()
            assert mass == pytest.approx(row.num_positions, rel=1e-4)


def test_a_student_whose_vocabulary_is_smaller_than_the_tokenizer_is_refused(dumped: tuple[Path, Path], tokenizer: Any):
    for data in (
        DataSettings(dataset=str(dumped[1])),
        DataSettings.model_validate({"text": {"files": [str(dumped[0])]}}),
    ):
        with pytest.raises(
            MismatchError, match="the tokenizer has 300 tokens, but the student's vocabulary ends at 299"
        ):
            open_source(data, tokenizer, vocab_size=299, context_tokens=512)


def test_damage_is_met_before_a_row_of_the_shard_is_seen(dumped: tuple[Path, Path], tokenizer: Any):
    source = open_data(tokenizer, dataset=str(dumped[1]))
    shard = dumped[1] / "data/part-00000.parquet"
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 3] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(DamagedDataError, match=r"part-00000\.parquet: damaged"):
        next(stream_of(source).steps(0, 1))


def pace_of(kind: str, count: int, growing: int = 200) -> Pace:
    difficulty_R = (np.arange(count) * 7919 % count).astype(np.float64)
    if kind == "easy_to_hard":
        return EasyToHard(difficulty_R=difficulty_R)
    return Competence(difficulty_R=difficulty_R, begin=0.1, growing_rows=growing)


@given(
    kind=st.sampled_from(["easy_to_hard", "competence"]),
    first=st.integers(0, 60),
    count=st.integers(1, 12),
    num_threads=st.integers(1, 4),
    rows_per_step=st.integers(1, 17),
)
@settings(deadline=None, max_examples=40)
def test_rows_by_difficulty_are_the_same_wherever_a_stream_is_entered(
    kind: str, first: int, count: int, num_threads: int, rows_per_step: int
):
    sources = [source_of([3, 1, 4, 1, 5]), source_of([9, 2], name="other ")]
    options = {"rows_per_step": rows_per_step, "paces": [pace_of(kind, 14), None]}
    whole = ids(stream_of(*sources, **options), 0, first + count)
    assert ids(stream_of(*sources, **options, num_threads=num_threads), first, first + count) == whole[first:]


@pytest.mark.parametrize("kind", ["easy_to_hard", "competence"])
@pytest.mark.parametrize("rows_per_step", [3, 40, 700])
def test_rows_by_difficulty_are_of_blocks_that_are_read_once_and_stay(kind: str, rows_per_step: int):
    Counted.reads.clear()
    source = Counted(files=[], blocks=source_of([20] * 30).blocks, tally=Tally())
    stream = stream_of(source, rows_per_step=rows_per_step, paces=[pace_of(kind, 600)])
    for _ in stream.steps(0, -(-2000 // rows_per_step)):
        pass
    assert sorted(Counted.reads) == list(range(30))


def test_a_broken_block_comes_with_the_first_step_by_difficulty_that_needs_it():
    source = Broken(files=[], blocks=source_of([10] * 8).blocks, tally=Tally())
    difficulty_R = np.repeat([0.0, 1, 2, 9, 4, 5, 6, 7], 10)  # those of the broken block are the hardest
    stream = stream_of(source, rows_per_step=10, paces=[EasyToHard(difficulty_R=difficulty_R)])
    steps = stream.made_ahead(0, 16, lambda rows: rows.step)
    assert [next(steps) for _ in range(7)] == list(range(7))
    with pytest.raises(DamagedDataError, match="block 3"):
        next(steps)
