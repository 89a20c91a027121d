"""What of a config `doctor` looks at: the model, its tokenizer, the first record as a row."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from teacher_dump.config import DumpSettings, TeacherSettings
from teacher_dump.doctor.finding import Finding, attempt
from teacher_dump.first_record import first_record


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model's config and its tokenizer, or what became of them."""

    config: Any = None
    tokenizer: Any = None
    no_config: list[Finding] = field(default_factory=list)
    no_tokenizer: list[Finding] = field(default_factory=list)


def open_model(teacher: TeacherSettings) -> Opened:
    from shared.pretrained import load_config, load_tokenizer

    config, no_config = attempt("model", partial(load_config, teacher))
    if not Path(teacher.model).is_dir():
        no_config = [_with_advice(teacher.model, finding) for finding in no_config]
    if no_config and teacher.tokenizer is None:
        # It would be looked for in the same place, and a Hub that does not answer takes half a minute to say so.
        return Opened(no_config=no_config)
    tokenizer, no_tokenizer = attempt("tokenizer", partial(load_tokenizer, teacher))
    return Opened(config=config, tokenizer=tokenizer, no_config=no_config, no_tokenizer=no_tokenizer)


def _with_advice(name: str, finding: Finding) -> Finding:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return finding  # meant as a folder, of which it says that it is missing
    advice = f"check the name; without a network here: hf download {name} --local-dir FOLDER where there is one, "
    return replace(finding, next_step=f"{advice}bring the folder and name it as teacher.model")


def dtypes_of(teacher: TeacherSettings | None, opened: Opened) -> list[str]:
    """That of the teacher's weights; the usual ones where it is not known."""
    if teacher is not None and teacher.dtype != "auto":
        return [teacher.dtype]
    if opened.config is None:
        return ["float32", "bfloat16"]
    return [str(getattr(opened.config, "dtype", None) or "float32").removeprefix("torch.")]


def model(teacher: TeacherSettings, opened: Opened) -> Iterator[Finding]:
    yield from opened.no_config
    if opened.config is not None:
        name = (opened.config.architectures or [type(opened.config).__name__])[0]
        vocab_size = opened.config.get_text_config().vocab_size
        (dtype,) = dtypes_of(teacher, opened)
        yield Finding("model", "ok", f"{teacher.model}: {name}, a vocabulary of {vocab_size:,}, {dtype}")


def tokenizer(settings: DumpSettings, opened: Opened) -> Iterator[Finding]:
    from teacher_dump.keep import keep_rule

    yield from opened.no_tokenizer
    if opened.tokenizer is not None:
        keep_rule(settings.keep, opened.tokenizer)
        name = settings.teacher.tokenizer or settings.teacher.model
        template = "a" if opened.tokenizer.chat_template else "no"
        yield Finding("tokenizer", "ok", f"{name}: {len(opened.tokenizer):,} tokens, {template} chat template")


def data(settings: DumpSettings, opened: Opened) -> Iterator[Finding]:
    from shared.pretrained import context_tokens
    from shared.text_rows import Tally, TextRows

    first = first_record(settings.data)
    yield Finding("data", "ok", first.describe())
    if opened.tokenizer is None:
        return
    alone = settings.data.model_copy(update={"processes": 1})  # one record is not worth starting others for
    limit = context_tokens(settings.teacher) if opened.config is not None else settings.teacher.max_model_len
    tally = Tally()
    rows = list(TextRows(opened.tokenizer, alone, context_tokens=limit).rows([first.record], tally))
    largest = max((int(row.input_ids_L.max()) for row in rows), default=0)
    vocab_size = opened.config.get_text_config().vocab_size if opened.config is not None else largest + 1
    if largest >= vocab_size:
        raise ConfigError(
            f"the first record has id {largest}, but the teacher's vocabulary ends at {vocab_size}",
            next_step="name the tokenizer that belongs to the teacher as teacher.tokenizer",
        )
    verdict, mend = ("ok", None) if rows else ("warning", "look at more of them: logit-shards inspect CONFIG --all")
    yield Finding("data", verdict, f"the first record: {tally.summary()}", mend)
