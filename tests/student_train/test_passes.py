"""Rows as tensors: whoever takes part, wherever it is entered, the same rows; and shapes that stay."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from shared.models import load_model
from shared.models_config import ModelSettings
from shared.rows import Row
from shared.text_rows import Tally
from student_train.attention import settle_attention
from student_train.objective import Objective
from student_train.packing import Shape
from student_train.passes import POSITIONS_MULTIPLE, PassMaker
from student_train.sources import TextSource
from student_train.stream import Selection, Stream
from tests.tiny import make_model

CPU = torch.device("cpu")


def rows_of(lengths: list[int], first_id: int = 0) -> list[Row]:
    """Every row has a token of its own, over and over, so that it is known wherever it stands."""
    return [
        Row(
            sample_id=str(first_id + n),
            input_ids_L=np.full(length, first_id + n, np.int32),
            label_mask_L=np.arange(length) > 0,
        )
        for n, length in enumerate(lengths)
    ]


def stream_of(lengths: list[list[int]], rows_per_step: int, num_threads: int) -> Stream:
    firsts = np.cumsum([0, *map(len, lengths)]).tolist()
    blocks = [rows_of(each, first) for each, first in zip(lengths, firsts, strict=False)]
    source = TextSource(files=[], blocks=blocks, tally=Tally())
    return Stream(
        [Selection.of(source, lambda _: True)],
        rows_per_step=rows_per_step,
        seed=5,
        shuffle_blocks=2,
        num_threads=num_threads,
    )


SHAPES = st.one_of(
    st.builds(Shape, batch_tokens=st.integers(1, 60), line_tokens=st.none()),
    st.builds(Shape, batch_tokens=st.integers(1, 60), line_tokens=st.integers(12, 30), is_static=st.booleans()),
)


@given(
    first=st.integers(0, 12),
    count=st.integers(1, 5),
    num_threads=st.integers(1, 4),
    num_ranks=st.integers(1, 4),
    rows_per_step=st.integers(1, 12),
    shape=SHAPES,
)
@settings(deadline=None, max_examples=60)
def test_any_number_of_threads_and_ranks_entered_at_any_step_see_the_rows_that_one_process_sees(
    first: int, count: int, num_threads: int, num_ranks: int, rows_per_step: int, shape: Shape
):
    lengths = [[3, 12, 2], [7], [5, 5, 9, 4]]
    whole = list(stream_of(lengths, rows_per_step, 1).steps(0, first + count))[first:]
    makers = [
        PassMaker(
            objective=Objective(kd_weight=0.0), shape=shape, vocab_size=99, device=CPU, rank=r, num_ranks=num_ranks
        )
        for r in range(num_ranks)
    ]
    for of_one, of_many in zip(
        whole, stream_of(lengths, rows_per_step, num_threads).steps(first, first + count), strict=True
    ):
        assert [row.sample_id for row in of_many.rows] == [row.sample_id for row in of_one.rows]
        expected = Counter(label for row in of_one.rows for label in row.label_ids_P.tolist())
        seen: Counter[int] = Counter()
        for maker in makers:
            for each in maker.make(of_many.rows)[0]:
                counts = each.targets.weight_N > 0
                seen.update(each.targets.label_N[counts].tolist())
                # The hidden state that predicts a label stands in its own row, right before it.
                tokens = each.input_ids_BL.flatten()
                source_n = each.source_N[counts]
                assert torch.equal(tokens[source_n], each.targets.label_N[counts])
                assert torch.equal(tokens[source_n + 1], each.targets.label_N[counts])
                places = each.position_ids_BL.flatten()
                assert torch.equal(places[source_n + 1], places[source_n] + 1)
        assert seen == expected


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_static_shapes_are_compiled_once(kind: str, tmp_path: Path):
    """By torch.compile, which counts; Ascend does the like.  Shapes that move with the rows are compiled again."""
    model = load_model(ModelSettings(model=str(make_model(tmp_path))), dtype=torch.float32, device=CPU)
    attention = settle_attention(model, kind, is_static=False)  # pyright: ignore[reportArgumentType]
    counts = {}
    for is_static in (True, False):
        torch._dynamo.reset()
        counter = CompileCounter()
        body = torch.compile(model.base_model, backend=counter, dynamic=False)
        shape = Shape(batch_tokens=64, line_tokens=32, is_static=is_static)
        maker = PassMaker(objective=Objective(kd_weight=0.0), shape=shape, vocab_size=307, device=CPU)
        for lengths in ([9, 14, 30, 2], [31, 8, 8, 8], [5, 5], [17, 3, 28, 11, 6]):
            for each in maker.make(rows_of(lengths))[0]:
                assert not is_static or len(each.source_N) % POSITIONS_MULTIPLE == 0
                each.hidden_at_positions(body, attention)  # pyright: ignore[reportArgumentType]
        counts[is_static] = counter.frame_count
    assert counts[True] == 1
    assert counts[False] > 1
