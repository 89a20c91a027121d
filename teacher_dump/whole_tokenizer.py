"""A tokenizer that is one: transformers makes up an empty one of the architecture where a folder holds none."""

from typing import Any

from shared.errors import ConfigError
from shared.models_config import ModelSettings
from shared.pretrained import load_tokenizer


def load_whole_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: there is none at that place.
    """
    tokenizer = load_tokenizer(settings)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise ConfigError(
            f"{settings.tokenizer or settings.model} holds no tokenizer: what transformers makes of it knows "
            f"{len(tokenizer)} tokens, all of them special",
            next_step="copy tokenizer.json and tokenizer_config.json there, or name a tokenizer of its own",
        )
    return tokenizer
