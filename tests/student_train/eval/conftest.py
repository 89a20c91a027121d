"""A student that knows some answers by heart."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.data import write_jsonl
from tests.tiny import make_model, make_tokenizer

ANSWERS = {f"How many is {n} and {m}?": f"It is so. #### {n + m}" for n in range(3) for m in (4, 5)}


def chat(name: str, question: str, answer: str, *before: str) -> dict[str, Any]:
    """A chat whose last answer is asked for; `before` are the turns that lead up to it."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(before)]
    last = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": [*turns, *last]}


@pytest.fixture(scope="session")
def learnt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has learnt ANSWERS, each in a chat of its own, and to end its turn behind them."""
    folder = make_model(tmp_path_factory.mktemp("learnt"), seed=3, spread=0.2)
    tokenizer = make_tokenizer(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    chats = [chat("", question, answer)["messages"] for question, answer in ANSWERS.items()]
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    questions = [tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True) for turns in chats]
    for row, question in zip(labels, questions, strict=True):
        row[: len(question["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(1.0)
    while loss > 0.02:
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six that it knows, of which two references are wrong and one means the same; one that nobody can check."""
    answers = dict(ANSWERS)
    first, second, third, *_ = answers
    answers[first], answers[second], answers[third] = "#### 17", "It is so. #### 6", "Well. #### $5.00"
    records = [chat(f"sum-{n}", *each) for n, each in enumerate(answers.items())]
    records.append(chat("no-answer", "How many is 1 and 4?", "It is so."))
    return write_jsonl(tmp_path_factory.mktemp("asked") / "asked.jsonl", records)
