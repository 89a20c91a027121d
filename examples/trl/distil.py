"""A dataset of log-probabilities in transformers' Trainer, or in one that is made of it, as TRL's SFTTrainer.

`read_rows` reads a dataset, `Collator` puts some of its rows side by side, and `Distils` is the loss: mixed into a
trainer it takes the place of its own.  Nothing else of the trainer changes: its optimizer, its schedule, its logging,
its checkpoints.

Shapes: B rows of a batch, L its longest, N its supervised positions, D hidden.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from shared.batching import PaddedBatch
from shared.dataset import LogitDataset
from shared.models import output_head, split_model
from shared.rows import Row
from student_train.collate import targets_of
from student_train.config import LossSettings
from student_train.data import objective_on
from student_train.data_config import SourceSettings
from student_train.fused_linear import fused_linear_loss
from student_train.objective import Objective
from student_train.sources import open_source

IGNORED = -100


def read_rows(dataset: str, model: Any, tokenizer: Any, objective: Objective) -> list[Row]:
    """All rows of a dataset, verified, with the teacher's tails at the objective's temperature.

    Raises:
        MismatchError: they are not for this model and tokenizer.
    """
    vocab_size = split_model(model)[1].vocab_size  # which refuses a model whose logits are more than a matrix
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    source = open_source(SourceSettings(dataset=dataset), tokenizer, vocab_size=vocab_size, context_tokens=context)
    source = source.at(objective.temperature)
    return [row for index in range(len(source.sample_ids)) for row in source.read_block(index)]


@dataclass(frozen=True)
class Collator:
    """A trainer deals with numbers of rows, {"row": 7}; here they become what the loss wants.

    `labels` are there to be counted: a trainer divides by all of a step's, and so does the loss.
    """

    rows: Sequence[Row]
    objective: Objective
    vocab_size: int
    """The student's."""

    def __call__(self, numbers: Sequence[dict[str, int]]) -> dict[str, Any]:
        rows = [self.rows[number["row"]] for number in numbers]
        batch = PaddedBatch.of(rows, torch.device("cpu"))
        labels_BL = torch.full_like(batch.input_ids_BL, IGNORED)
        labels_BL[batch.row_N, batch.source_N + 1] = batch.label_N
        return {
            "input_ids": batch.input_ids_BL,
            "labels": labels_BL,
            "row_N": batch.row_N,
            "source_N": batch.source_N,
            "targets": targets_of(rows, self.objective, vocab_size=self.vocab_size),
        }


class Distils:
    """A trainer's loss: cross-entropy beside the divergence from the teacher.  One device, or several under DDP.

    Under FSDP or DeepSpeed's third stage the output matrix is not whole where the loss asks for it; there it takes
    `student-train run`, which has the loss inside of the module that is wrapped.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *arguments: Any, objective: Objective, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert not objective.agreement, "weights of positions are not what a trainer counts"
        self.objective = objective
        self.model_accepts_loss_kwargs = True  # so that the labels of a whole step are counted

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        outputs = model(input_ids=inputs["input_ids"], output_hidden_states=True, logits_to_keep=1, use_cache=False)
        hidden_ND: Tensor = outputs.hidden_states[-1][inputs["row_N"], inputs["source_N"]]
        denominator = float(len(hidden_ND)) if num_items_in_batch is None else float(num_items_in_batch)
        if num_items_in_batch is not None and trainer.args.average_tokens_across_devices:
            denominator /= trainer.accelerator.num_processes  # gradients are averaged, not summed
        loss = fused_linear_loss(
            hidden_ND,
            output_head(trainer.accelerator.unwrap_model(model)),
            inputs["targets"].to(hidden_ND.device),
            self.objective,
            denominator=denominator,
        )
        return (loss.total, outputs) if return_outputs else loss.total


class DistilTrainer(Distils, transformers.Trainer):
    """transformers' Trainer with the loss above."""


def make_trainer(
    student: str,
    dataset: str,
    args: transformers.TrainingArguments,
    loss: LossSettings,
    kind: Any = DistilTrainer,
    list_of: Callable[[list[dict[str, int]]], Any] = list,
) -> Any:
    """A trainer of `kind`, any that `Distils` is mixed into, of a student from a dataset.

    `list_of` makes what it takes for its dataset; TRL's want `datasets.Dataset.from_list`.

    Raises:
        MismatchError: tokenizer, vocabulary, context, loss and dataset do not belong together.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    model = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    objective = objective_on(LogitDataset.open(dataset), loss)
    rows = read_rows(dataset, model, tokenizer, objective)
    collator = Collator(rows, objective, output_head(model).vocab_size)
    return kind(
        model=model,
        args=args,
        train_dataset=list_of([{"row": number} for number in range(len(rows))]),
        data_collator=collator,
        processing_class=tokenizer,
        objective=objective,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder or Hub name")
    parser.add_argument("dataset", help="of a teacher with the student's tokenizer")
    parser.add_argument("output")
    parser.add_argument("--kd-weight", type=float, default=0.9)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1)
    options = parser.parse_args()
    args = transformers.TrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        remove_unused_columns=False,
        logging_steps=10,
        report_to=[],
    )
    trainer = make_trainer(options.student, options.dataset, args, LossSettings(kd_weight=options.kd_weight))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
