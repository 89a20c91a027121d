"""A first config for a student, made of what the model and the data say of themselves.

Dataset and student are held against each other before anything is written: the tokenizer, the vocabulary and the
longest row.
"""

from pathlib import Path
from typing import Any

from shared.commented_yaml import require_new, write_config_file
from shared.config import check_settings
from shared.errors import ConfigError
from shared.first_record import first_record
from student_train.config import StudentSettings, TrainSettings
from student_train.data_config import SourceSettings

MOST_ROWS_PER_STEP = 64
STEPS_OF_AN_EPOCH = 20
"""At least so many, unless there are too few rows."""
HELD_OUT_SHARE, ROWS_TO_HOLD_OUT_OF = 0.02, 500
"""Fewer rows are all trained on."""


def write_config(
    path: Path, *, model: str, dataset: str | None, files: list[str], output: str, tokenizer: str | None
) -> list[str]:
    """Write a commented config to `path`, and say in lines for people what was found.

    The data are a `dataset`, or text `files` for plain SFT.

    Raises:
        ConfigError: there is a file already, no such model, dataset or text, or not one of the two.
        MismatchError: dataset and student do not belong together.
        RecordError, DamagedDataError: the data cannot be read.
        OutputError: the file cannot be written.
    """
    from shared.pretrained import load_tokenizer

    require_new(path)
    if bool(dataset) == bool(files):
        raise ConfigError(
            "a student learns from a dataset or from text, one of the two",
            next_step="give --dataset FOLDER, or --data FILE for SFT without a teacher",
        )
    student = StudentSettings(model=model, tokenizer=tokenizer)
    loaded = load_tokenizer(student)
    tree: dict[str, Any] = {
        "student": {"model": model, **({"tokenizer": tokenizer} if tokenizer else {}), **_products()},
        "data": {**({"dataset": dataset} if dataset else {}), **({"text": {"files": files}} if files else {})},
        "output": output,
        "loss": {"kd_weight": 0.9 if dataset else 0.0},
        "optimizer": {"learning_rate": 1e-5, "warmup_steps": 0},
        "epochs": 2.0,
    }
    data = check_settings(TrainSettings, tree, (), name="the config to write").data
    found = _of_text(data) if data.text else _fit_to_dataset(tree, data, student, loaded)
    check_settings(TrainSettings, tree, (), name="the config to write")
    write_config_file(path, TrainSettings, tree, command="student-train run")
    return [
        f"{path}: written",
        f"  tokenizer: {tokenizer or model}, {len(loaded):,} tokens",
        *found,
        f"  next: student-train doctor {path}",
    ]


def _products() -> dict[str, str]:
    """Mixed precision where there is an accelerator."""
    from shared.device import pick_device

    return {} if pick_device("auto").type == "cpu" else {"compute_dtype": "bfloat16"}


def _of_text(data: SourceSettings) -> list[str]:
    assert data.text is not None
    return [f"  data: {first_record(data.text).describe()}", "  loss: cross-entropy alone, since text has no teacher"]


def _fit_to_dataset(tree: dict[str, Any], data: SourceSettings, student: StudentSettings, tokenizer: Any) -> list[str]:
    """Held-out rows and rows of a step, as they go with the dataset."""
    from shared.pretrained import context_tokens, load_config
    from student_train.sources import open_source

    vocab_size = load_config(student).get_text_config().vocab_size
    source: Any = open_source(data, tokenizer, vocab_size=vocab_size, context_tokens=context_tokens(student))
    manifest = source.dataset.manifest
    rows = manifest.total("rows")
    tree["loss"]["temperature"] = 1.0
    if rows >= ROWS_TO_HOLD_OUT_OF:
        tree["held_out"] = {"fraction": HELD_OUT_SHARE}
    tree["rows_per_step"] = max(1, min(MOST_ROWS_PER_STEP, rows // STEPS_OF_AN_EPOCH))
    known = ", ".join(f"{each:g}" for each in manifest.temperatures)
    return [
        f"  data: {source.name}, {rows:,} rows, {manifest.total('positions'):,} supervised tokens; of this tokenizer",
        f"  loss: kd_weight 0.9 at T 1; the dataset is for T {known}",
        f"  rows_per_step: {tree['rows_per_step']}, of {rows:,} rows"
        + (f"; {HELD_OUT_SHARE:.0%} are held out" if "held_out" in tree else "; none is held out"),
    ]
