"""Chat templates in the manner of the families that people train, and beside each what it renders, written in Python.

`pieces` is the independent account: the same chat as a list of (supervised?, text), without Jinja and without prefixes.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

Turn = tuple[str, str]
Pieces = list[tuple[bool, str]]

CONTROL_TOKENS = [
    *("<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
THINK_TAGS = ["<think>", "</think>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The system turn comes with the last user turn, wherever that is: history is rewritten.  There is no generation prompt.
MISTRAL = (
    "{{ '<s>' }}{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{{ system + '\n\n' if m is sameas last and system else '' }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# Reasoning of earlier rounds is taken out; the last answer gets an empty one where it has none.
QWEN_THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ said.lstrip('\n') }}"
    "{% else %}{{ said }}{% endif %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN_THINKING_MARKED = (
    QWEN_THINKING.replace("{% if loop.index0 > ns.last %}", "{% generation %}{% if loop.index0 > ns.last %}")
    .replace("{% endif %}{% endif %}<|im_end|>\n", "{% endif %}<|im_end|>{% endgeneration %}{% endif %}{{ '\n' }}")
    .replace("{{ m.content }}{% else %}", "{{ m.content }}<|im_end|>{% else %}")
)


def chatml(turns: list[Turn]) -> Pieces:
    pieces: Pieces = []
    for role, content in turns:
        pieces += [(False, f"<|im_start|>{role}\n"), (role == "assistant", f"{content}<|im_end|>"), (False, "\n")]
    return pieces


def llama3(turns: list[Turn]) -> Pieces:
    pieces: Pieces = [(False, "<s>")]
    for role, content in turns:
        header = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        pieces += [(False, header), (role == "assistant", f"{content.strip()}<|eot_id|>")]
    return pieces


def gemma(turns: list[Turn]) -> Pieces:
    pieces: Pieces = [(False, "<s>")]
    for role, content in turns:
        name = "model" if role == "assistant" else role
        pieces += [
            (False, f"<start_of_turn>{name}\n"),
            (role == "assistant", f"{content.strip()}<end_of_turn>"),
            (False, "\n"),
        ]
    return pieces


def mistral(turns: list[Turn]) -> Pieces:
    pieces: Pieces = [(False, "<s>")]
    for role, content in turns:
        answers = role == "assistant"
        pieces.append((answers, f" {content}</s>" if answers else f"[INST] {content}[/INST]"))
    return pieces


def qwen(turns: list[Turn], *, thinking: bool, marked: bool) -> Pieces:
    """Only the last answer keeps its reasoning; with thinking off the empty one belongs to the prompt."""
    last_user = max(index for index, (role, _) in enumerate(turns) if role == "user")
    pieces: Pieces = []
    for index, (role, content) in enumerate(turns):
        pieces.append((False, f"<|im_start|>{role}\n"))
        if role != "assistant":
            pieces.append((False, f"{content}<|im_end|>\n"))
            continue
        thought, closed, said = content.rpartition("</think>")
        said = said.lstrip("\n") if closed else said
        last = index > last_user
        if last:
            reasoning = thought.split("</think>")[0].split("<think>")[-1].strip("\n")
            pieces.append((thinking or marked, f"<think>\n{reasoning}\n</think>\n\n"))
            said = said.lstrip("\n")
        pieces += [(last or marked, f"{said}<|im_end|>"), (False, "\n")]
    return pieces


def thinks(turns: list[Turn]) -> bool:
    """Does the last answer have reasoning?"""
    thought, closed, _ = turns[-1][1].partition("</think>")
    return bool(closed and thought.replace("<think>", "").strip("\n"))


class Family(NamedTuple):
    """A template, the settings that it is read with, and what it should give."""

    template: str
    settings: dict
    pieces: Callable[[list[Turn]], Pieces]
    takes_system: bool = True
    takes_reasoning: bool = True


FAMILIES = {
    "chatml": Family(CHATML, {}, chatml),
    "chatml_marked": Family(CHATML_MARKED, {}, chatml),
    "llama3": Family(LLAMA3, {}, llama3),
    "gemma": Family(GEMMA, {}, gemma, takes_system=False),
    "mistral": Family(MISTRAL, {}, mistral, takes_system=False),
    "qwen": Family(
        QWEN_THINKING, {"supervise": "last_turn"}, lambda turns: qwen(turns, thinking=thinks(turns), marked=False)
    ),
    "qwen_thinking": Family(
        QWEN_THINKING,
        {"supervise": "last_turn", "thinking_variable": None},
        lambda turns: qwen(turns, thinking=True, marked=False),
    ),
    "qwen_not_thinking": Family(
        QWEN_THINKING,
        {"supervise": "last_turn", "chat_template_kwargs": {"enable_thinking": False}},
        lambda turns: qwen(turns, thinking=False, marked=False),
        takes_reasoning=False,
    ),
    "qwen_marked": Family(QWEN_THINKING_MARKED, {}, lambda turns: qwen(turns, thinking=True, marked=True)),
}


def merged(pieces: Iterable[tuple[bool, str]]) -> Pieces:
    """Neighbours of one kind joined, empty ones left out: how a label mask can be written down."""
    runs: Pieces = []
    for mark, text in pieces:
        if text and runs and runs[-1][0] == mark:
            runs[-1] = (mark, runs[-1][1] + text)
        elif text:
            runs.append((mark, text))
    return runs
