"""Versions that logitferry asks for, and whether what is here is older."""

import importlib.metadata

import pytest

from shared.doctor import requirements


def test_requirements_come_from_pyproject_where_nothing_is_installed(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", not_installed)
    extras = {each.name: each.extra for each in requirements.requirements()}
    assert (extras["pyarrow"], extras["torch"], extras["pyright"]) == ("", "torch", "dev")


@pytest.mark.parametrize(
    ("version", "floor", "older"),
    [("2.10.1", "2.9", False), ("2.9", "2.10", True), ("2.6.0+cpu", "2.6", False), ("18", "18.0.0", False),
     ("0.9rc1", "1", True), ("26.0.1", "18", False)],
)  # fmt: skip
def test_requirements_compare_versions_by_their_numbers(version, floor, older):
    assert requirements.is_older(version, floor) is older
