"""Chunks, halving when memory is short, and what becomes of it."""

import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import teacher_dump.keep as keep
import teacher_dump.scoring as scoring
from shared.errors import LogitferryError
from shared.rows import Positions, Row
from teacher_dump.keep import Threshold, TopK
from teacher_dump.scoring import Asked, Halved, Scorer

V, D = 53, 6
CPU = torch.device("cpu")
RULES = [TopK(k=5, min_prob=0.0, always_ids=(2,)), Threshold(tau=0.1, seed=1, always_ids=())]


def some_rows() -> list[Row]:
    random = np.random.default_rng(0)
    lengths = [9, 2, 30]
    return [
        Row(
            sample_id=str(n),
            input_ids_L=random.integers(0, V, length).astype(np.int32),
            label_mask_L=np.arange(length) > 0,
        )
        for n, length in enumerate(lengths)
    ]


def scored(
    rule: TopK | Threshold, *, chunk: int, in_step: bool = False, calls: list[int] | None = None, padding: int = 3
) -> Positions:
    """By a head with so much padding behind the vocabulary."""
    rows = some_rows()
    torch.manual_seed(0)
    hidden_ND = torch.randn(sum(row.num_positions for row in rows), D)
    weight_WD = torch.randn(V + 3, D)[: V + padding]

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(len(hidden))
        return hidden @ weight_WD.T

    temperatures = [1.0, 2.0] if isinstance(rule, TopK) else [1.0]
    scorer = Scorer(rule, temperatures, vocab_size=V, chunk_positions=chunk)
    positions = scorer.score(hidden_ND, Asked.of(rows, rule), logits_of, in_step_with_others=in_step)
    assert positions is not None
    return positions


def assert_same(one: Positions, other: Positions) -> None:
    np.testing.assert_array_equal(one.kept_ids_E, other.kept_ids_E)
    for name in ("kept_logp_E", "realised_logp_P", "entropy_P", "tail_logsum_PT"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_chunks_change_nothing_and_padding_of_the_vocabulary_is_no_outcome(rule: TopK | Threshold):
    whole = scored(rule, chunk=1000)
    assert whole.kept_ids_E.max() < V
    assert_same(scored(rule, chunk=7), whole)


def short_of_memory(most: int) -> Any:
    keep_chunk = scoring.keep_chunk

    def short(logits_NV: torch.Tensor, *rest: Any) -> Any:
        if len(logits_NV) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.32 GiB")
        return keep_chunk(logits_NV, *rest)

    return short


@pytest.mark.parametrize("rule", RULES)
def test_short_of_memory_chunks_are_halved_and_give_the_same(
    rule: TopK | Threshold, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    whole = scored(rule, chunk=1000)
    monkeypatch.setattr(scoring, "keep_chunk", short_of_memory(6))
    assert_same(scored(rule, chunk=16), whole)
    assert [record.message for record in caplog.records] == [
        "out of memory on cpu: teacher.chunk_positions is 8 from now on",
        "out of memory on cpu: teacher.chunk_positions is 4 from now on",
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("failing", range(4))
def test_memory_that_runs_out_in_the_middle_of_a_chunk_leaves_no_trace(
    failing: int, padding: int, in_step: bool, rule: TopK | Threshold, monkeypatch: pytest.MonkeyPatch
):
    """`keep_chunk` works in place: what it has overwritten by then must not be what is tried again."""
    whole = scored(rule, chunk=1000)
    monkeypatch.setattr(keep, "block_bytes", lambda _device: 16 * V * 3)  # blocks of three positions
    keep_block, calls = keep._keep_block, iter(range(1000))

    def once_short(*arguments: Any) -> Any:
        kept = keep_block(*arguments)  # overwrites the logits
        if next(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kept

    monkeypatch.setattr(keep, "_keep_block", once_short)
    assert_same(scored(rule, chunk=16, in_step=in_step, padding=padding), whole)


def test_in_step_with_other_ranks_every_chunk_of_logits_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    """Each is a collective call: a rank that made one more than the others would wait for ever."""
    expected = scored(RULES[0], chunk=1000)
    monkeypatch.setattr(scoring, "keep_chunk", short_of_memory(3))
    calls: list[int] = []
    assert_same(scored(RULES[0], chunk=16, in_step=True, calls=calls), expected)
    assert calls == [16, 16, 6]


def test_a_rank_without_logits_gives_nothing():
    scorer = Scorer(RULES[0], [1.0], vocab_size=V, chunk_positions=4)
    assert scorer.score(torch.zeros(38, D), Asked.of(some_rows(), RULES[0]), lambda _hidden: None) is None


def test_memory_for_not_even_one_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "keep_chunk", short_of_memory(0))
    with pytest.raises(LogitferryError, match=r"out of memory on cpu with teacher\.chunk_positions at 1"):
        scored(RULES[0], chunk=8)


def test_other_errors_are_not_taken_for_want_of_memory():
    halved = Halved("rows", 8)

    def broken(_rows: slice) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        halved.over(20, CPU, broken)
    assert halved.size == 8


def test_the_cpus_own_allocator_without_memory_is_recognised(tmp_path: Path):
    """A process with 1.5 GiB of address space to spare and a chunk that would want four."""
    script = tmp_path / "short.py"
    script.write_text(
        textwrap.dedent("""
        import logging, resource, sys, torch
        from teacher_dump.scoring import Halved
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29),) * 2)
        rows = Halved("teacher.chunk_positions", 64)
        sums = rows.over(64, torch.device("cpu"), lambda at: torch.ones(at.stop - at.start, 1 << 24).sum(dim=1))
        print(rows.size, float(torch.cat(sums).sum()) == 64 * (1 << 24))
        """)
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    *log, last = run.stdout.splitlines()
    assert last == "16 True"
    assert log == [f"out of memory on cpu: teacher.chunk_positions is {size} from now on" for size in (32, 16)]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, "the limit was the other process's"


def test_a_chunk_takes_no_more_memory_than_is_counted_for_it(tmp_path: Path):
    """By the operating system's account, of a process of its own, for bf16 logits that the head turns into fp32."""
    script = tmp_path / "peak.py"
    script.write_text(
        textwrap.dedent("""
        from pathlib import Path
        import torch
        from shared.models import OutputHead
        from teacher_dump.keep import TopK
        from teacher_dump.scoring import Asked, Scorer, logits_bytes
        import numpy as np
        torch.set_num_threads(1)
        def peak():
            status = Path("/proc/self/status").read_text().split()
            return 1024 * int(status[status.index("VmHWM:") + 1])
        head = OutputHead(weight_VD=torch.randn(100_003, 8).bfloat16(), bias_V=None, softcap=None, scale=1.0)
        rule = TopK(k=64, min_prob=0.0, always_ids=())
        def run(n, chunk):
            scorer = Scorer(rule, [1.0, 2.0], vocab_size=100_003, chunk_positions=chunk)
            asked = Asked(label_N=np.zeros(n, dtype=np.int64), draws_N=None)
            scorer.score(torch.randn(n, 8).bfloat16(), asked, head.logits)
        with torch.inference_mode():
            run(4, 4)
            Path("/proc/self/clear_refs").write_text("5")  # what importing took does not count
            before = peak()
            run(1200, 400)
        print((peak() - before) / logits_bytes(400, 100_003, 2, torch.device("cpu")))
        """)
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert 0.5 < float(run.stdout) < 1.05, "three chunks of 400 positions take the memory of one"
