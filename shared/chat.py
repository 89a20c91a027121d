"""Chats to text by the tokenizer's own template, and which characters of it the assistant wrote.

A template is a program that only knows how to render whole conversations.  Some mark what the assistant writes with
`{% generation %}`, and then that is the answer.  For all others, what the assistant wrote in turn i is found by
rendering growing prefixes: everything up to the generation prompt before the turn, and everything up to the turn.
Each must be a prefix of the whole conversation, to the letter; a template that rewrites history is refused, because
its mask could only be guessed.  A turn ends with its end-of-turn token; the line feed that many templates put
behind it is not the assistant's.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from shared.control_tokens import ControlTokens
from shared.errors import ConfigError, MismatchError, RecordError
from shared.layout import Chat
from shared.marked_text import MarkedText, Span
from shared.text_config import TextSettings
from shared.turns import is_supervised

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
AROUND_CHARACTERS = 30
CONTENT_END_CHARACTERS = 20
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class _ReadsTheClockError(Exception):
    pass


def _refuse_clock(_format: str) -> str:
    raise _ReadsTheClockError


def use_chat_template(tokenizer: Any, settings: TextSettings) -> None:
    """Give the tokenizer the template that the settings name, so that what is saved with it is what was used.

    Raises:
        ConfigError: the file cannot be read.
    """
    if settings.chat_template is None:
        return
    try:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template {settings.chat_template} cannot be read: {error}") from None


class ChatRenderer:
    """Renders chats with one tokenizer's template.

    Raises:
        MismatchError: the tokenizer has no template, or several.
        ConfigError: the settings give a variable that the template has not.
    """

    def __init__(self, tokenizer: Any, settings: TextSettings, control: ControlTokens) -> None:
        template = tokenizer.chat_template
        if not isinstance(template, str) or not template:
            number = "several chat templates" if template else "no chat template"
            raise MismatchError(
                f"tokenizer {tokenizer.name_or_path!r} has {number}",
                next_step="put one chat_template.jinja beside its tokenizer.json, or name a file as chat_template",
            )
        asked = {"chat_template_kwargs": list(settings.chat_template_kwargs)}
        if settings.thinking_variable != "auto":
            asked["thinking_variable"] = list(settings.thinking_variables)
        for setting, names in asked.items():
            if unknown := [name for name in names if not _is_in(template, name)]:
                raise ConfigError(f"{setting}: the chat template has no variable {unknown[0]!r}")
        free = [name for name in settings.thinking_variables if name not in settings.chat_template_kwargs]
        self._switch = next((name for name in free if _is_in(template, name)), None)
        self._template = template
        self._has_marks = bool(GENERATION_MARK.search(template))
        own = {**tokenizer.special_tokens_map, "strftime_now": _refuse_clock}
        self._variables = {**own, **settings.chat_template_kwargs}
        self._settings = settings
        self._control = control

    def render(self, chat: Chat, where: str) -> MarkedText:
        """The chat as text with its answers.

        Raises:
            RecordError: the template fails, rewrites history, or leaves something out.
            MismatchError: it reads the clock.
        """
        hidden, placeholders = self._control.hide({"messages": chat.messages, "tools": chat.tools}, where)
        shown = Chat(messages=hidden["messages"], tools=hidden["tools"])
        if self._settings.supervise == "everything":
            if any(turn.get("weight") == 0 for turn in chat.messages):
                raise RecordError(f"{where}: a turn has weight 0, but supervise is everything")
            text, _ = self._render(shown, where, self._switched(shown))
            marked = MarkedText(text=text, supervised=((0, len(text)),))
        else:
            turns = self._wanted_turns(chat)
            text, marks = self._render(shown, where, self._switched(shown), marks=self._has_marks)
            if self._has_marks:
                answers = self._marked_answers(text, marks, shown, turns, where)
            else:
                answers = [[self._answer(text, shown, index, where)] for index in turns]
            spans = tuple(chain(*answers))
            marked = MarkedText(
                text=text,
                supervised=spans,
                left_out=() if self._settings.supervise_reasoning else tuple(self._reasoning(text, spans)),
                reworded=self._are_reworded(text, answers, [shown.messages[index] for index in turns], where),
            )
        for tool in shown.tools or []:
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in text:
                raise RecordError(
                    f"{where}: the chat template leaves out the tool {name!r}",
                    next_step="name a template that shows tools as chat_template",
                )
        return placeholders.restore(marked, where)

    def _wanted_turns(self, chat: Chat) -> list[int]:
        turns = _assistant_turns(chat)
        if self._settings.supervise == "last_turn":
            turns = turns[-1:]
        return [index for index in turns if is_supervised(chat.messages[index])]

    def _marked_answers(
        self, text: str, marks: list[Span], chat: Chat, wanted: list[int], where: str
    ) -> list[list[Span]]:
        """The template's marks that belong to each wanted turn, without the line feed behind an end of turn.

        A template may put several marks on a turn, and then the prompts tell where one begins.
        """
        turns = _assistant_turns(chat)
        marks = [(begin, begin + self._control.length_to_end_of_turn(text[begin:end])) for begin, end in marks]
        if len(marks) == len(turns):
            return [[marks[turns.index(index)]] for index in wanted]
        if len(marks) < len(turns):
            raise RecordError(
                f"{where}: the chat template marks {len(marks)} spans as generated, but there are {len(turns)} turns "
                "of the assistant",
                next_step="set supervise: last_turn for a template that marks that alone, or mend its marks",
            )
        if wanted == turns:
            return [marks]
        begins = [self._answer(text, chat, index, where)[0] for index in turns]
        return [
            [mark for mark in marks if begin <= mark[0] < end]
            for index, begin, end in zip(turns, begins, [*begins[1:], len(text)], strict=True)
            if index in wanted
        ]

    def _answer(self, whole: str, chat: Chat, index: int, where: str) -> Span:
        """Where turn `index` lies in the whole conversation."""
        before = self._beginning(whole, chat, index, where, generation_prompt=True)
        upto = whole
        if index + 1 < len(chat.messages):
            upto = self._beginning(whole, chat, index + 1, where)
        for name, prefix in (("the prompt of", before), ("the conversation up to", upto)):
            if not whole.startswith(prefix):
                at = next((i for i, (a, b) in enumerate(zip(whole, prefix, strict=False)) if a != b), len(whole))
                around = slice(max(0, at - AROUND_CHARACTERS), at + AROUND_CHARACTERS)
                raise RecordError(
                    f"{where}: the chat template rewrites history: {name} turn {index} renders as "
                    f"…{prefix[around]!r} but the whole as …{whole[around]!r}",
                    next_step="set supervise: last_turn, or chat_template_kwargs so that the template keeps earlier "
                    "turns, or chat_template to one that has {% generation %} marks",
                )
        return len(before), len(before) + self._control.length_to_end_of_turn(upto[len(before) :])

    def _beginning(self, whole: str, chat: Chat, num_turns: int, where: str, *, generation_prompt: bool = False) -> str:
        """The first turns, as they stand in the whole conversation if they can be made to.

        What a template does with its switch in the last turn it may not do in earlier ones, and what it writes into the
        system turn is settled by the last.
        """
        own = self._switched(_first_turns(chat, num_turns + generation_prompt))
        text = ""
        for variables in dict.fromkeys(tuple(each.items()) for each in (own, self._switched(chat), {})):
            text, _ = self._render(
                _first_turns(chat, num_turns), where, dict(variables), generation_prompt=generation_prompt
            )
            if whole.startswith(text):
                break
        return text

    def _switched(self, chat: Chat) -> dict[str, bool]:
        """The template's switch, as the last answer asks for it."""
        answers = _assistant_turns(chat)
        if self._switch is None or not answers:
            return {}
        return {self._switch: self._thinks(chat.messages[answers[-1]])}

    def _thinks(self, turn: dict[str, Any]) -> bool:
        """Has an answer reasoning, in a field of its own or between the tags?"""
        opening, closing = self._settings.reasoning_tags
        before, _, behind = (turn["content"] or "").partition(opening)
        thought = behind.partition(closing)[0] if behind else before.partition(closing)[0] if closing in before else ""
        return any(said.strip() for said in [thought, *(turn[key] for key in REASONING_KEYS if _is_text(turn, key))])

    def _are_reworded(self, text: str, answers: list[list[Span]], turns: list[dict[str, Any]], where: str) -> bool:
        """Is what the record's turns say not all in their answers, white space apart?  Reasoning is often dropped.

        Raises:
            RecordError: a turn's end is not even there: the template reads contents of another form, or ignores them.
        """
        told = [_squeezed("".join(text[begin:end] for begin, end in spans)) for spans in answers]
        if len(told) != len(turns):
            told = ["".join(told)] * len(turns)
        reworded = False
        for turn, answer in zip(turns, told, strict=True):
            content = _squeezed(turn["content"] or "")
            end = content.split(self._settings.reasoning_tags[1])[-1][-CONTENT_END_CHARACTERS:]
            calls = [call["function"]["name"] for call in turn.get("tool_calls", [])]
            missing = [said for said in [end, *map(_squeezed, calls)] if said not in answer]
            if missing:
                raise RecordError(
                    f"{where}: the chat template leaves out what the assistant says: "
                    f"…{missing[0]!r} is not in …{answer[-2 * CONTENT_END_CHARACTERS :]!r}",
                    next_step="look at the template; chat_template names another",
                )
            thoughts = [turn[key] for key in REASONING_KEYS if _is_text(turn, key)]
            reworded |= any(said not in answer for said in [content, *map(_squeezed, thoughts)])
        return reworded

    def _render(
        self,
        chat: Chat,
        where: str,
        variables: dict[str, Any],
        *,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        if not chat.messages:
            raise RecordError(f"{where}: the conversation opens with an assistant turn, nothing prompts it")
        try:
            rendered: Any = render_jinja_template(  # its annotations say str
                conversations=[chat.messages],
                tools=chat.tools,  # pyright: ignore[reportArgumentType]
                chat_template=self._template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation_prompt,
                **self._variables,
                **variables,
            )
        except _ReadsTheClockError:
            raise MismatchError(
                f"{where}: the chat template reads the clock: the same record would give other tokens tomorrow",
                next_step="set chat_template_kwargs: {date_string: ...} to a date of your choice where the template "
                "has that variable, else write a date into a copy of it and name that as chat_template",
            ) from None
        except Exception as error:  # templates raise whatever they like, also by `raise_exception`
            raise RecordError(f"{where}: the chat template failed: {type(error).__name__}: {error}") from error
        texts, spans = rendered
        return texts[0], list(chain(*spans))

    def _reasoning(self, text: str, answers: Sequence[Span]) -> Iterator[Span]:
        """What lies between the reasoning tags, and the tags; the prompt of an answer may already have opened them."""
        opening, closing = self._settings.reasoning_tags
        for begin, end in answers:
            opened = begin if text[:begin].rstrip().endswith(opening) else text.find(opening, begin, end)
            while opened >= 0:
                closed = text.find(closing, opened, end)
                if closed < 0 and text[begin:opened].strip():
                    break  # the tag is spoken of, not opened
                stop = end if closed < 0 else closed + len(closing)
                yield opened, stop
                opened = text.find(opening, stop, end)


def _assistant_turns(chat: Chat) -> list[int]:
    return [index for index, turn in enumerate(chat.messages) if turn["role"] == "assistant"]


def _is_in(template: str, name: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}\b", template))


def _is_text(turn: dict[str, Any], key: str) -> bool:
    return isinstance(turn.get(key), str)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _first_turns(chat: Chat, number: int) -> Chat:
    return Chat(messages=chat.messages[:number], tools=chat.tools)
