"""What an optimizer step is made of."""

from pathlib import Path

import transformers

from student_train.config import OptimizerSettings
from student_train.step import make_optimizer


def test_weight_decay_is_on_matrices_alone(student_folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(student_folder)
    decayed, spared = make_optimizer(model, OptimizerSettings(weight_decay=0.3, betas=(0.8, 0.9))).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == spared["betas"] == (0.8, 0.9)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
