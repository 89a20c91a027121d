"""Fixtures of the tests that read datasets from elsewhere."""

import pytest

from shared.folders import RemoteFolder


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that are fetched whole."""
    paths: list[str] = []
    read = RemoteFolder.read

    def recorded(self: RemoteFolder, path: str) -> bytes:
        paths.append(path)
        return read(self, path)

    monkeypatch.setattr(RemoteFolder, "read", recorded)
    return paths
