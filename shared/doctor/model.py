"""A model's config and its tokenizer, opened once for all checks that ask for them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from shared.doctor.finding import Finding, attempt
from shared.models_config import ModelSettings


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model's config and its tokenizer, or what became of them."""

    config: Any = None
    tokenizer: Any = None
    no_config: list[Finding] = field(default_factory=list)
    no_tokenizer: list[Finding] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size


def open_model(settings: ModelSettings, setting: str) -> Opened:
    """`setting` is the name of these settings: teacher."""
    from shared.pretrained import load_config, load_tokenizer

    config, no_config = attempt("model", partial(load_config, settings))
    if not Path(settings.model).is_dir():
        no_config = [_with_advice(settings.model, setting, finding) for finding in no_config]
    if no_config and settings.tokenizer is None:
        # It would be looked for in the same place, and a Hub that does not answer takes half a minute to say so.
        return Opened(no_config=no_config)
    tokenizer, no_tokenizer = attempt("tokenizer", partial(load_tokenizer, settings))
    return Opened(config=config, tokenizer=tokenizer, no_config=no_config, no_tokenizer=no_tokenizer)


def _with_advice(name: str, setting: str, finding: Finding) -> Finding:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return finding  # meant as a folder, of which it says that it is missing
    advice = f"check the name; without a network here: hf download {name} --local-dir FOLDER where there is one, "
    return replace(finding, next_step=f"{advice}bring the folder and name it as {setting}.model")


def model_found(settings: ModelSettings, opened: Opened, dtype: str) -> Iterator[Finding]:
    """`dtype` is what people are told that it computes in."""
    yield from opened.no_config
    if opened.config is not None:
        name = (opened.config.architectures or [type(opened.config).__name__])[0]
        yield Finding("model", "ok", f"{settings.model}: {name}, a vocabulary of {opened.vocab_size:,}, {dtype}")


def tokenizer_found(settings: ModelSettings, opened: Opened) -> Iterator[Finding]:
    yield from opened.no_tokenizer
    if opened.tokenizer is not None:
        name = settings.tokenizer or settings.model
        template = "a" if opened.tokenizer.chat_template else "no"
        yield Finding("tokenizer", "ok", f"{name}: {len(opened.tokenizer):,} tokens, {template} chat template")
