"""Which device `auto` is, with processes side by side on one machine."""

import pytest
import torch

from shared.device import pick_device


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four of them, of a kind that can be named and not used."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_auto_is_what_torch_finds_where_there_is_one_process(accelerators: pytest.MonkeyPatch):
    assert pick_device("auto") == torch.device("meta")


@pytest.mark.parametrize(
    ("environment", "index"),
    [
        ({"LOCAL_RANK": "3"}, 3),
        ({"SLURM_LOCALID": "2"}, 2),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1),
        ({"LOCAL_RANK": "6"}, 2),
    ],
)
def test_auto_is_the_one_of_the_local_rank(accelerators: pytest.MonkeyPatch, environment: dict[str, str], index: int):
    for name, value in environment.items():
        accelerators.setenv(name, value)
    assert pick_device("auto") == torch.device("meta", index)


def test_auto_is_the_only_one_where_each_process_sees_its_own(accelerators: pytest.MonkeyPatch):
    accelerators.setattr(torch.accelerator, "device_count", lambda: 1)
    accelerators.setenv("SLURM_LOCALID", "5")
    assert pick_device("auto") == torch.device("meta", 0)


def test_a_rank_changes_nothing_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == torch.device("cpu")
