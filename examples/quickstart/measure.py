"""Measures of the quickstart: cross-entropy and KL on the test split, exact match by greedy generation, curves."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import task
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.device import pick_device
from student_train.config import StudentSettings
from student_train.data import measured
from student_train.data_config import DataSettings
from student_train.evaluate import evaluate
from student_train.student import Student

GENERATE_ROWS = 250
MAX_NEW_TOKENS = 48
NAMES = {"teacher": "teacher", "sft": "student, SFT", "kd": "student, SFT + KD"}


def measure(folder: Path, model: str) -> dict[str, float]:
    """One row of the table: all metrics of a model on the test split."""
    settings = StudentSettings(model=str(folder / model))
    student = Student(settings, pick_device("cpu"), batch_tokens=16384, chunk_positions=1024)
    test = student.open_sources(DataSettings(dataset=str(folder / "dumps/test")))
    found = evaluate(student, measured(test, lambda _: True))
    assert found is not None
    assert found.means.kl is not None, "a dataset has a teacher"
    return {"ce": found.means.ce, "kl": found.means.kl} | exact_match(folder / model, folder / "corpus/test.jsonl")


@torch.inference_mode()
def exact_match(model_folder: Path, records_path: Path) -> dict[str, float]:
    """Share of records whose greedy answer is right, for each manner and for both together."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    records = [json.loads(line) for line in records_path.read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda record: (record["manner"], len(record["messages"][0]["content"])))
    correct: dict[str, list[bool]] = {manner: [] for manner in task.MANNERS}
    for begin in range(0, len(records), GENERATE_ROWS):
        batch = records[begin : begin + GENERATE_ROWS]
        prompts = [
            tokenizer.apply_chat_template(record["messages"][:1], tokenize=False, add_generation_prompt=True)
            for record in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for record, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :], strict=True):
            reply = tokenizer.decode(ids, skip_special_tokens=False).split(tokenizer.eos_token)[0]
            correct[record["manner"]].append(task.is_correct(reply, record["answer"]))
    everything = [mark for marks in correct.values() for mark in marks]
    return {f"exact_{name}": sum(marks) / len(marks) for name, marks in {**correct, "both": everything}.items()}


def as_text(result: dict[str, Any]) -> str:
    """The table for a terminal and for a README alike."""
    lines = [
        f"| test split, seed {result['seed']} | cross-entropy | KL to teacher "
        "| exact match: fast | reasoning | both | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["table"].items():
        exact = " | ".join(f"{row[f'exact_{manner}']:.1%}" for manner in (*task.MANNERS, "both"))
        seconds = result["seconds"][name]
        lines.append(f"| {NAMES[name]} | {row['ce']:.4f} | {abs(row['kl']):.4f} | {exact} | {seconds:.0f} s |")
    lines += [
        "",
        f"dataset: {result['positions']:,} positions, {result['bytes_per_position']:.1f} bytes per position, "
        f"{result['kept_mass']:.2%} of the teacher's mass kept",
        "time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items()),
    ]
    return "\n".join(lines)


def draw_curves(path: Path, runs: dict[str, Path]) -> None:
    """Cross-entropy and KL on the development split over the steps of both arms."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for arm, folder in runs.items():
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        held_out = [(entry["step"], entry["held_out"]) for entry in log if "held_out" in entry]
        for axis, key in zip(axes, ("ce", "kl"), strict=True):
            axis.plot(
                *zip(*((step, means[key]) for step, means in held_out), strict=True), label=NAMES[arm], marker="."
            )
    for axis, title in zip(axes, ("cross-entropy on the labels", "KL(teacher ‖ student)"), strict=True):
        axis.set(title=f"{title}, dev split", xlabel="step", ylabel="nats per supervised token", yscale="log")
        axis.grid(visible=True, which="both", alpha=0.25)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
