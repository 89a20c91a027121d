"""Names of models with a slip in them."""

from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.models_config import ModelSettings
from shared.pretrained import load_tokenizer


@pytest.mark.parametrize("mistyped", ["techer", "./techer", "{folder}/techer"])
def test_a_folder_with_a_slip_in_its_name_is_proposed(mistyped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that could be a Hub name is asked for there first: tests have no network."""
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(ModelSettings(model=mistyped.format(folder=tmp_path)))
    assert "did you mean" in str(refused.value)
    assert "teacher?" in str(refused.value)


def test_a_name_that_is_like_nothing_here_has_plain_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="check the path, or give a Hub name owner/model"):
        load_tokenizer(ModelSettings(model="./nothing"))
