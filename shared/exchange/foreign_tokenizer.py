"""The tokenizer that made somebody else's ids, from its folder or the Hub; needs no transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from shared.dataset import TOKENIZER_FOLDER
from shared.errors import ConfigError, MismatchError
from shared.fingerprint import sha256_of_text, tokenizer_fingerprint

MAIN = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
FILES = (MAIN, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE)


@dataclass(frozen=True, kw_only=True)
class ForeignTokenizer:
    """`files` by their paths in a dataset."""

    name: str
    size: int
    fingerprint: str
    chat_template_sha256: str | None
    files: dict[str, bytes]

    def require_within(self, vocab_size: int) -> None:
        """Raises MismatchError where the vocabulary has not got all of its tokens."""
        if vocab_size < self.size:
            raise MismatchError(
                f"the tokenizer {self.name} has {self.size} tokens, but the vocabulary ends at {vocab_size}",
                next_step="give the teacher's --vocab-size, which is its config's vocab_size, and its own --tokenizer",
            )


def read_tokenizer(name: str) -> ForeignTokenizer:
    """From a folder, or of that name on the Hub.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    folder = Path(name) if Path(name).is_dir() else _from_hub(name)
    files = {file: (folder / file).read_bytes() for file in FILES if (folder / file).is_file()}
    if MAIN not in files:
        raise ConfigError(
            f"tokenizer {name}: there is no {MAIN}",
            next_step="save it there: AutoTokenizer.from_pretrained(...).save_pretrained(...) with a fast tokenizer",
        )
    try:
        tokenizer = Tokenizer.from_str(files[MAIN].decode())
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{folder / MAIN}: cannot be read: {error}", next_step="copy it again") from None
    template = _template(files)
    return ForeignTokenizer(
        name=name,
        size=tokenizer.get_vocab_size(with_added_tokens=True),
        fingerprint=tokenizer_fingerprint(tokenizer),
        chat_template_sha256=None if template is None else sha256_of_text(template),
        files={f"{TOKENIZER_FOLDER}/{file}": data for file, data in files.items()},
    )


def _template(files: dict[str, bytes]) -> str | None:
    if TEMPLATE in files:
        return files[TEMPLATE].decode()
    try:
        config: Any = json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError:
        return None
    template = config.get("chat_template") if isinstance(config, dict) else None
    return template if isinstance(template, str) else None


def _from_hub(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"tokenizer folder {name} does not exist", next_step="check the path, or give a Hub name owner/model"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"no tokenizer can be had from {name}, of which there is no folder here: {reason}",
            next_step="give the folder that holds its tokenizer.json",
        ) from error
