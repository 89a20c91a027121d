"""Whether a reply is right: by the answer in it, or by a function of the user's own."""

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shared.errors import ConfigError, LogitferryError
from shared.files import sha256_of_file
from student_train.eval.answers import find_answer, is_same
from student_train.rollout.config import VerifySettings

MODULE = "logitferry_verifier"


class Verifier(Protocol):
    """Marks replies."""

    def has_answer(self, reference: str) -> bool:
        """Whether anything can be compared with it."""
        ...

    def is_right(self, prompt_id: str, *, reply: str, reference: str, prompt: str) -> bool: ...

    def identity(self) -> dict[str, Any]:
        """Equal where the marks are."""
        ...


def verifier_of(settings: VerifySettings) -> Verifier:
    """Raises ConfigError where the function cannot be had."""
    if settings.answer is not None:
        return AnswerVerifier(pattern=re.compile(settings.answer))
    assert settings.function is not None
    path, _, name = settings.function.rpartition(":")
    return FunctionVerifier(place=settings.function, path=Path(path), function=_function(Path(path), name))


@dataclass(frozen=True, kw_only=True)
class AnswerVerifier:
    """Right is what has the reference's answer; see `student_train.eval.answers`."""

    pattern: re.Pattern[str]

    def has_answer(self, reference: str) -> bool:
        return find_answer(reference, self.pattern) is not None

    def is_right(self, prompt_id: str, *, reply: str, reference: str, prompt: str) -> bool:
        expected = find_answer(reference, self.pattern)
        assert expected is not None, prompt_id
        return is_same(expected, find_answer(reply, self.pattern), by_value=True)

    def identity(self) -> dict[str, Any]:
        return {"answer": self.pattern.pattern}


@dataclass(frozen=True, kw_only=True)
class FunctionVerifier:
    """Right is what a function of the user's says."""

    place: str
    path: Path
    function: Callable[..., Any]

    def has_answer(self, reference: str) -> bool:
        return True

    def is_right(self, prompt_id: str, *, reply: str, reference: str, prompt: str) -> bool:
        try:
            mark = self.function(reply, reference, prompt)
        except (Exception, SystemExit) as error:
            raise LogitferryError(
                f"verify.function {self.place} raised {type(error).__name__}: {error}, for prompt {prompt_id!r}",
                next_step="mend the function, which is asked about whatever a student writes, and give another output",
            ) from error
        if not isinstance(mark, bool):
            raise LogitferryError(
                f"verify.function {self.place} gave {mark!r:.80}, for prompt {prompt_id!r}: expected True or False",
                next_step="return a bool",
            )
        return mark

    def identity(self) -> dict[str, Any]:
        return {"function": self.place.rpartition(":")[2], "file_sha256": sha256_of_file(self.path)}


def _function(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise ConfigError(
            f"verify.function: there is no file {path}", next_step="paths are relative to where the command is run"
        )
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None, "the config asks for .py"
    assert spec.loader is not None
    sys.modules[MODULE] = module = importlib.util.module_from_spec(spec)  # where dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"verify.function: {path} cannot be imported: {type(error).__name__}: {error}", next_step="mend the file"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(sorted(each for each, value in vars(module).items() if callable(value) and each[0] != "_"))
        raise ConfigError(
            f"verify.function: {path} has no function {name!r}; there are: {there or 'none'}",
            next_step=f"verify.function: {path}:NAME",
        )
    return function
