"""Shares of static workers: every unit is somebody's and nobody else's, for any number of them."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.workers import Share, array_hint


@given(count=st.integers(1, 50), num_units=st.integers(0, 400))
def test_every_unit_is_of_exactly_one_worker_and_all_have_as_many(count: int, num_units: int):
    of_worker = Counter(index for unit in range(num_units) for index in range(count) if Share(index, count).has(unit))
    assert sum(of_worker.values()) == num_units
    assert max(of_worker.values(), default=0) - min([of_worker[index] for index in range(count)]) <= 1


@given(count=st.integers(2, 32), next_count=st.integers(2, 32))
def test_what_a_lost_worker_leaves_is_spread_over_the_next_ones(count: int, next_count: int):
    """Also where one number divides the other, as 8 and 4 do; with the same number they are the same worker's again."""
    assume(count != next_count)
    left = [unit for unit in range(count * 200) if Share(0, count).has(unit)]
    next_shares = Counter(index for unit in left for index in range(next_count) if Share(index, next_count).has(unit))
    assert len(left) == 200
    mean = 200 / next_count
    assert max(next_shares.values()) < mean + 6 * mean**0.5 + 2, "as even as chance makes it"


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("environment", "share", "said"),
    [
        ({}, Share(0, 1), None),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Share(3, 8), "RANK=3 and WORLD_SIZE=8"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Share(0, 1), "SLURM_PROCID=0 and SLURM_NTASKS=1"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"} | TORCHRUN, Share(0, 3), "RANK=0 and WORLD_SIZE=3"),
        ({"RANK": "3"}, Share(0, 1), None),
    ],
)  # fmt: skip
def test_the_environment_says_which_share(environment: dict[str, str], share: Share, said: str | None):
    assert Share.of_environment(environment) == (share, said)


@pytest.mark.parametrize("environment", [{"RANK": "8", "WORLD_SIZE": "8"}, {"RANK": "x", "WORLD_SIZE": "8"}])
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str]):
    with pytest.raises(ConfigError, match=r"RANK=. and WORLD_SIZE=8: workers are counted from 0"):
        Share.of_environment(environment)


def test_a_share_is_read_as_it_is_written():
    assert Share.parse("0/4") == Share(0, 4)
    assert str(Share.parse("3/4")) == "3/4"


@pytest.mark.parametrize("text", ["", "1", "4/4", "1/0", "-1/4", "a/b", "1/4/8", "1 / 4", "9999999999/99999999999"])
def test_a_share_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="--worker"):
        Share.parse(text)


def test_tasks_of_an_array_job_are_warned_where_all_do_the_same():
    hint = array_hint({"SLURM_ARRAY_TASK_COUNT": "16"})
    assert hint is not None
    assert "one of 16 tasks" in hint
    assert array_hint({}) is array_hint({"SLURM_ARRAY_TASK_COUNT": "1"}) is None
