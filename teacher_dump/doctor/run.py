"""What of a config `doctor` looks at: the model, its tokenizer, the first record as a row."""

from collections.abc import Iterator

from shared.doctor.finding import Finding
from shared.doctor.model import Opened, model_found, tokenizer_found
from shared.errors import ConfigError
from shared.first_record import first_record
from teacher_dump.config import DumpSettings, TeacherSettings


def dtypes_of(teacher: TeacherSettings | None, opened: Opened) -> list[str]:
    """That of the teacher's weights; the usual ones where it is not known."""
    if teacher is not None and teacher.dtype != "auto":
        return [teacher.dtype]
    if opened.config is None:
        return ["float32", "bfloat16"]
    return [str(getattr(opened.config, "dtype", None) or "float32").removeprefix("torch.")]


def model(teacher: TeacherSettings, opened: Opened) -> Iterator[Finding]:
    yield from model_found(teacher, opened, dtypes_of(teacher, opened)[0])


def tokenizer(settings: DumpSettings, opened: Opened) -> Iterator[Finding]:
    from teacher_dump.keep import keep_rule

    if opened.tokenizer is not None:
        keep_rule(settings.keep, opened.tokenizer)
    yield from tokenizer_found(settings.teacher, opened)


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
    vocab_size = opened.vocab_size if opened.config is not None else largest + 1
    if largest >= vocab_size:
        raise ConfigError(
            f"the first record has id {largest}, but the teacher's vocabulary ends at {vocab_size}",
            next_step="name the tokenizer that belongs to the teacher as teacher.tokenizer",
        )
    verdict, mend = ("ok", None) if rows else ("warning", "look at more of them: logit-shards inspect CONFIG --all")
    yield Finding("data", verdict, f"the first record: {tally.summary()}", mend)
