"""Which engine runs the teacher.  A back end is one module and one line here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shared.errors import MismatchError
from shared.manifest import Teacher
from shared.pretrained import model_identity
from teacher_dump.config import TeacherSettings
from teacher_dump.keep import Threshold, TopK
from teacher_dump.scoring import Engine


def teacher_identity(settings: TeacherSettings) -> Teacher:
    """The teacher and what runs it, without loading it.

    Raises:
        ConfigError: there is no such model, or the engine is not installed.
    """
    if settings.engine == "vllm":
        from teacher_dump.vllm_engine import require_tested

        version = require_tested()
    else:
        import transformers

        version = transformers.__version__
    identity = model_identity(settings, dtype=settings.dtype, engine=f"{settings.engine} {version}")
    return identity.model_copy(update={"engine_settings": settings.vllm.of_values()})


def require_in_vocabulary(largest_id: int, teacher: Teacher) -> None:
    """Raises MismatchError for an id that the teacher does not have."""
    if largest_id >= teacher.vocab_size:
        raise MismatchError(
            f"the tokenizer gives id {largest_id}, but the teacher's vocabulary ends at {teacher.vocab_size}",
            next_step="name the tokenizer that belongs to the teacher as teacher.tokenizer",
        )


@contextmanager
def open_engine(
    settings: TeacherSettings,
    identity: Teacher,
    rule: TopK | Threshold,
    temperatures: Sequence[float],
    *,
    longest_row: int,
) -> Iterator[Engine]:
    """The loaded teacher, for rows of up to `longest_row` tokens.

    Raises:
        ConfigError, MismatchError, LogitferryError: it cannot be loaded.
    """
    if settings.engine == "vllm":
        from teacher_dump.vllm_engine import VllmEngine

        engine: Engine = VllmEngine(settings, identity, rule, temperatures, longest_row)
    else:
        from teacher_dump.transformers_engine import TransformersEngine

        engine = TransformersEngine(settings, identity, rule, temperatures)
    try:
        yield engine
    finally:
        engine.close()
