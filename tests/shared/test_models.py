"""Models are loaded whole or refused, and taken apart only where body and head explain all of the logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shared.errors import ConfigError, MismatchError
from shared.models import load_model, split_model
from shared.models_config import ModelSettings
from shared.pretrained import load_tokenizer, model_identity
from tests.tiny import FAMILIES, make_model

CPU = torch.device("cpu")


def load(folder: Path | str) -> Any:
    return load_model(ModelSettings(model=str(folder)), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_body_and_head_give_the_models_own_logits(family: str, tmp_path: Path):
    model = load(make_model(tmp_path, family=family, spread=2.0))
    body, head = split_model(model)
    ids = torch.randint(0, head.vocab_size, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(head.logits(body(input_ids=ids).last_hidden_state), model(input_ids=ids).logits)


def test_a_device_map_without_accelerate_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shared.models.find_spec", lambda name: None if name == "accelerate" else object())
    folder = make_model(tmp_path)
    with pytest.raises(ConfigError, match=r"next: pip install 'logitferry\[device-map\]'"):
        load_model(ModelSettings(model=str(folder)), dtype=torch.float32, device=CPU, device_map="auto")
    load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_does_more_than_its_config_says_is_refused(dtype: torch.dtype, tmp_path: Path):
    """By two percent, which no rounding explains; and the same model as it is passes in every dtype."""
    model = load(make_model(tmp_path, family="gemma2_softcap", spread=2.0)).to(dtype)
    split_model(model)
    forward = model.forward
    model.forward = lambda **inputs: transformers.modeling_outputs.CausalLMOutput(
        logits=forward(**inputs).logits * 0.98
    )
    with pytest.raises(MismatchError, match="does more between its hidden states and its logits"):
        split_model(model)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path):
    """transformers alone would fill them with noise and say so in a warning."""
    make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"lacks 1 weights of its architecture, first .*up_proj"):
        load(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path: Path):
    make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no (model|config) can be loaded"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_wrong_path_is_called_a_wrong_path(name: str):
    with pytest.raises(ConfigError, match="does not exist"):
        load(name)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(ModelSettings(model=name))


def test_an_empty_folder_is_no_model(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no (model|config) can be loaded"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(ModelSettings(model=str(tmp_path)))


def test_a_models_identity_is_its_weights(tmp_path: Path):
    one, same, other = (make_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    settings = [ModelSettings(model=str(folder)) for folder in (one, same, other)]
    identities = [model_identity(each, dtype="auto", engine="transformers 1") for each in settings]
    digests = [identity.weights_sha256 for identity in identities]
    assert digests[0] == digests[1] != digests[2]
    assert identities[0].vocab_size == 307
    assert identities[0].dtype == "float32", "that of the checkpoint"
    assert identities[0].architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_in_bfloat16(family: str, tmp_path: Path):
    split_model(load(make_model(tmp_path, family=family, spread=2.0)).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 50])
def test_broken_files_of_a_model_are_a_config_error(name: str, content: bytes, tmp_path: Path):
    make_model(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"no (model|config) can be loaded from {tmp_path}"):
        load(tmp_path)


def test_a_softcap_within_attention_is_not_left_out(tmp_path: Path):
    """As transformers does in silence with its default kind of attention."""
    folder = make_model(tmp_path, family="gemma2_softcap", spread=2.0, attn_logit_softcapping=2.0)
    exact = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        got, expected, other = (
            model(ids).logits
            for model in (load(folder), exact, transformers.AutoModelForCausalLM.from_pretrained(folder).eval())
        )
    torch.testing.assert_close(got, expected)
    assert float((got - other).abs().max()) > 0.1, "the default would have been another model"
