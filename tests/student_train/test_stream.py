"""The stream: every row once an epoch, in an order that depends on the rows and the seed alone."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, DamagedDataError, MismatchError
from shared.layout import Chat
from shared.models_config import ModelSettings
from shared.pretrained import load_tokenizer
from shared.records import content_id
from shared.rows import Row
from shared.text_rows import Tally
from student_train.config import DataSettings
from student_train.sources import TextSource, open_source
from student_train.stream import Stream, is_held_out
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import SENTENCES, make_tokenizer


def source_of(block_sizes: list[int]) -> TextSource:
    tokens = np.zeros(3, np.int32)
    blocks = [
        [Row(sample_id=f"{b}/{n}", input_ids_L=tokens, label_mask_L=tokens.astype(bool)) for n in range(size)]
        for b, size in enumerate(block_sizes)
    ]
    return TextSource(
        files=[], blocks=blocks, sample_ids=[[row.sample_id for row in block] for block in blocks], tally=Tally()
    )


def stream_of(source: Any, *, seed: int = 0, shuffle_blocks: int = 2, takes: Any = lambda _: True) -> Stream:
    return Stream(source=source, takes=takes, seed=seed, shuffle_blocks=shuffle_blocks)


def ids(stream: Stream, rows_per_step: int, num_steps: int) -> list[list[str]]:
    return [[row.sample_id for row in batch] for batch in islice(stream.batches(rows_per_step), num_steps)]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 1000),
    pool=st.integers(1, 9),
    rows_per_step=st.integers(1, 7),
)
def test_every_epoch_holds_every_row_once(sizes: list[int], seed: int, pool: int, rows_per_step: int):
    stream = stream_of(source_of(sizes), seed=seed, shuffle_blocks=pool)
    flat = [name for batch in ids(stream, rows_per_step, 3 * sum(sizes)) for name in batch]
    everything = sorted(f"{b}/{n}" for b, size in enumerate(sizes) for n in range(size))
    for epoch in range(2):
        assert sorted(flat[epoch * len(everything) : (epoch + 1) * len(everything)]) == everything


def test_the_order_is_a_function_of_the_seed_and_changes_with_the_epoch():
    source = source_of([50, 50])
    one, again, other = (ids(stream_of(source, seed=seed), 100, 2) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert one[0] != one[1], "the second epoch has an order of its own"


def test_rows_of_the_pooled_blocks_are_mixed():
    first = ids(stream_of(source_of([100] * 4), shuffle_blocks=2), 100, 1)[0]
    assert 20 < max(sum(name.startswith(f"{b}/") for name in first) for b in range(4)) < 80


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


def test_nothing_left_to_train_on_is_an_error():
    with pytest.raises(ConfigError, match="no row is left"):
        next(stream_of(source_of([3]), takes=lambda _: False).batches(2))


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
    for one, other in zip(*(islice(stream_of(s).batches(4), 20) for s in (text, dataset)), strict=True):
        for row, same in zip(one, other, strict=True):
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
        next(stream_of(source).batches(1))
