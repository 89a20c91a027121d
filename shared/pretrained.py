"""What of a Hugging Face model can be had without loading it: its tokenizer, its identity, what its config says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from shared.errors import ConfigError
from shared.files import nearest_folder, sha256_of_file
from shared.fingerprint import sha256_of_json
from shared.manifest import Teacher
from shared.models_config import ModelSettings


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: there is none at that place.
    """
    name = settings.tokenizer or settings.model
    revision = settings.revision if settings.tokenizer is None else None  # a revision of the model's repository
    with foreign_errors("tokenizer", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=settings.trust_remote_code
        )
    # Where a folder holds none, transformers makes up an empty one of the model's architecture.
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise ConfigError(
            f"no tokenizer can be loaded from {name}: what transformers makes of it knows {len(tokenizer)} tokens, "
            "all of them special",
            next_step="copy tokenizer.json and tokenizer_config.json there, or name a tokenizer of its own",
        )
    return tokenizer


def load_config(settings: ModelSettings) -> Any:
    """The model's config.

    Raises:
        ConfigError: there is none at that place, or it needs remote code.
    """
    with foreign_errors("config", settings.model):
        return transformers.AutoConfig.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )


def has_softcap(config: Any) -> bool:
    """Whether attention has a softcap, which transformers' eager one alone applies: the others leave it out in
    silence, and Gemma 2 would say something else."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def context_tokens(settings: ModelSettings) -> int | None:
    """The longest row that the model takes, as set or from its config alone; None where nothing states a limit."""
    if settings.max_model_len is not None:
        return settings.max_model_len
    return getattr(load_config(settings).get_text_config(), "max_position_embeddings", None)


def model_identity(settings: ModelSettings, *, dtype: str, engine: str) -> Teacher:
    """What makes this very model recognisable: Hub commit, or digests of its config and weights.

    `dtype` is that of the settings, where auto is the checkpoint's; `engine` is what runs the model.
    """
    config = load_config(settings)
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    identity: dict[str, Any] = {
        "name": settings.model,
        "architecture": (config.architectures or [type(config).__name__])[0],
        "vocab_size": config.get_text_config().vocab_size,
        "dtype": dtype,
        "engine": engine,
    }
    folder = Path(settings.model)
    if not folder.is_dir():
        return Teacher(**identity, revision=getattr(config, "_commit_hash", None) or settings.revision)
    return Teacher(
        **identity, config_sha256=sha256_of_file(folder / "config.json"), weights_sha256=weights_digest(folder)
    )


def weights_digest(folder: Path) -> str:
    """Of all files of weights in a model's folder."""
    return sha256_of_json({file.name: sha256_of_file(file) for file in sorted(folder.glob("*.safetensors"))})


@contextmanager
def foreign_errors(what: str, name: str) -> Iterator[None]:
    """transformers and safetensors raise all kinds of exceptions for files they cannot use; ours says where."""
    is_folder = Path(name).is_dir()
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        advice = nearest_folder(name) or "check the path, or give a Hub name owner/model"
        raise ConfigError(f"model folder {name} does not exist", next_step=advice)
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = name if is_folder else f"{name}, of which there is no folder here, from the Hub"
        advice = (None if is_folder else nearest_folder(name)) or "check the path and the files in it"
        raise ConfigError(f"no {what} can be loaded from {where}: {reason}", next_step=advice) from error
