"""What of a Hugging Face model can be had without torch: its tokenizer, and what its config says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from shared.errors import ConfigError
from shared.models_config import ModelSettings


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: there is none at that place.
    """
    name = settings.tokenizer or settings.model
    revision = settings.revision if settings.tokenizer is None else None  # a revision of the model's repository
    with foreign_errors("tokenizer", name):
        return transformers.AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=settings.trust_remote_code
        )


def context_tokens(settings: ModelSettings) -> int | None:
    """The longest row that the model takes, from its config alone; None where it states no limit."""
    with foreign_errors("config", settings.model):
        config = transformers.AutoConfig.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def foreign_errors(what: str, name: str) -> Iterator[None]:
    """transformers and safetensors raise all kinds of exceptions for files they cannot use; ours says where."""
    is_folder = Path(name).is_dir()
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(
            f"model folder {name} does not exist", next_step="check the path, or give a Hub name owner/model"
        )
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = name if is_folder else f"{name}, of which there is no folder here, from the Hub"
        raise ConfigError(
            f"no {what} can be loaded from {where}: {reason}", next_step="check the path and the files in it"
        ) from error
