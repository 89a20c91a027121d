"""The hand-over to lm-eval: what is asked of it, what comes back, and what it leaves behind."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from shared.errors import ConfigError
from student_train.config import StudentSettings
from student_train.eval.config import EvalSettings, LmEvalSettings
from student_train.eval.harness import Harness, found
from student_train.eval.run import run_evaluation
from student_train.eval.table import describe, numbers
from student_train.student import Student

EXAMPLE = Path(__file__).parents[3] / "examples" / "lm_eval"


def test_found_keeps_every_metric_with_its_error():
    entries: dict[str, Any] = {"alias": "a task", "sample_len": 8}
    entries |= {"acc,none": np.float64(0.25), "acc_stderr,none": 0.125, "f1,none": float("nan")}
    entries |= {"exact_match,strict-match": 1, "exact_match_stderr,strict-match": "N/A"}
    results = {"results": {"sums": entries, "group": {"alias": "g", "acc,none": 0.5}}, "versions": {"sums": 2.0}}
    results |= {"n-shot": {"sums": 5}, "n-samples": {"sums": {"original": 80, "effective": 8}}}
    assert found(results) == {
        "sums": {
            "metrics": {
                "acc": {"value": 0.25, "stderr": 0.125},
                "f1": {"value": None, "stderr": None},
                "exact_match,strict-match": {"value": 1.0, "stderr": None},
            },
            "num_fewshot": 5,
            "documents": 8,
            "version": 2.0,
        },
        "group": {
            "metrics": {"acc": {"value": 0.5, "stderr": None}},
            "num_fewshot": None,
            "documents": None,
            "version": None,
        },
    }


def test_numbers_and_table_have_every_task_whatever_its_name():
    task = {"metrics": {"acc": {"value": 0.25, "stderr": 0.125}, "ppl": {"value": 3.0, "stderr": None}}}
    result: dict[str, Any] = {"evaluation": None, "exact_match": None, "lm_eval": {"examples": task}, "versions": {}}
    assert numbers(result)["lm_eval"] == {"examples": task}
    assert describe(result) == [
        "lm-eval: examples",
        f"  {'acc':<28}0.2500 ± 0.1250",
        f"  {'ppl':<28}3.0000",
    ]


def test_harness_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(ConfigError, match=r"pip install 'logitferry\[lm-eval\]'"):
        Harness(LmEvalSettings(tasks=["sums"]), seed=0)


def test_example_is_a_config(monkeypatch):
    tree = yaml.safe_load((EXAMPLE / "eval.yaml").read_text())
    settings = EvalSettings.model_validate(tree)
    assert settings.lm_eval is not None
    assert (EXAMPLE / str(settings.lm_eval.include_path) / f"{settings.lm_eval.tasks[0]}.yaml").is_file()


# What follows imports the real lm-eval, which takes ten seconds.


@pytest.fixture
def in_example(monkeypatch) -> Path:
    """Where paths in a task are relative to."""
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(EXAMPLE)
    return EXAMPLE


@torch.no_grad()
def most_likely(model: Any, tokenizer: Any, question: dict[str, Any]) -> int:
    """The choice with the highest log-likelihood, as the example's task asks for it."""
    context, scores = f"Question: {question['question']}\nAnswer:", []
    begin = len(tokenizer(context)["input_ids"])
    for choice in question["choices"]:
        ids = torch.tensor(tokenizer(f"{context} {choice}")["input_ids"])
        log_q = model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
        scores.append(float(log_q[torch.arange(len(ids) - 1), ids[1:]][begin - 1 :].sum()))
    return scores.index(max(scores))


@pytest.mark.full
def test_harness_finds_what_the_log_likelihoods_say(in_example, teacher_folder, tmp_path, capsys):
    tree = yaml.safe_load((in_example / "eval.yaml").read_text())
    tree |= {"student": {"model": str(teacher_folder)}, "output": str(tmp_path / "out"), "device": "cpu"}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    result = run_evaluation(EvalSettings.model_validate(tree))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert capsys.readouterr().out == ""
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher_folder)
    questions = [json.loads(line) for line in (in_example / "questions.jsonl").read_text().splitlines()]
    right = [most_likely(model, tokenizer, question) == question["answer"] for question in questions]
    assert 0 < sum(right) < len(right)
    (sums,) = result["lm_eval"].values()
    assert sums["metrics"]["acc"]["value"] == pytest.approx(np.mean(right))
    assert sums["metrics"]["acc"]["stderr"] > 0
    assert (sums["documents"], sums["version"]) == (8, 1)
    assert result["versions"]["lm_eval"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["lm_eval"] == result["lm_eval"]


@pytest.mark.full
def test_harness_says_what_is_wrong_before_a_model_is_loaded(in_example, tmp_path, student_folder):
    task = yaml.safe_load((in_example / "tasks" / "sums.yaml").read_text())
    broken = task | {"task": "broken", "dataset_kwargs": {"data_files": {"test": "not-here.jsonl"}}}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))

    def harness(*tasks: str, **changes: Any) -> Harness:
        return Harness(LmEvalSettings(tasks=list(tasks), include_path=str(tmp_path), **changes), seed=0)

    with pytest.raises(ConfigError, match=r"broken cannot be loaded: FileNotFoundError: .*not-here.jsonl"):
        harness("broken")
    with pytest.raises(ConfigError, match=r"is no folder"):
        Harness(LmEvalSettings(tasks=["sums"], include_path="not-here"), seed=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(student_folder)
    harness("sums", apply_chat_template=True).require_template(tokenizer)
    tokenizer.chat_template = None
    harness("sums").require_template(tokenizer)
    with pytest.raises(ConfigError, match="has no chat template"):
        harness("sums", apply_chat_template=True).require_template(tokenizer)
    with pytest.raises(ConfigError, match="no task 'smus' in lm-eval or in") as caught:  # looks through all of them
        harness("smus", "sums")
    assert "did you mean sums?" in str(caught.value)


@pytest.mark.full
def test_harness_takes_groups(in_example, tmp_path, student_folder):
    task = yaml.safe_load((in_example / "tasks" / "sums.yaml").read_text())
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(task | {"task": "more"}))
    group = {"group": "both", "task": ["sums", "more"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    harness = Harness(LmEvalSettings(tasks=["both"], include_path=str(tmp_path), limit=3), seed=0)
    student = Student(StudentSettings(model=str(student_folder)), torch.device("cpu"), batch_tokens=600, packing=False)
    tasks = harness.run(student.model, student.tokenizer, context_tokens=512, compute_dtype=torch.bfloat16)
    assert set(tasks) == {"both", "sums", "more"}
    assert tasks["both"]["metrics"]["acc"]["value"] == tasks["sums"]["metrics"]["acc"]["value"]
    assert tasks["sums"]["documents"] == 3
