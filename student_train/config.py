"""The config of `student-train`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared.config import Settings
from shared.models_config import ModelSettings
from shared.text_config import TextSettings

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class StudentSettings(ModelSettings):
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights.  AdamW in bfloat16 loses small updates; use it to fit a device, not by default."""


class DataSettings(Settings):
    dataset: str | None = None
    """A sealed logit dataset."""
    text: TextSettings | None = None
    """Text files, for plain SFT without a teacher."""
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of a dataset's rows that exceed the student's context; text has a setting of its own."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "DataSettings":
        if (self.dataset is None) == (self.text is None):
            raise ValueError("name a dataset or text, one of the two")
        if self.text is not None and self.on_too_long != "error":
            raise ValueError("on_too_long is for a dataset's rows; for text say text.on_too_long")
        return self


class HeldOutSettings(Settings):
    fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training rows to hold out, chosen by a hash of the sample id."""
    data: DataSettings | None = None
    """Rows of their own, instead of a share."""

    @model_validator(mode="after")
    def _not_both(self) -> "HeldOutSettings":
        if self.fraction and self.data:
            raise ValueError("hold out a fraction or data of its own, not both")
        return self


class LossSettings(Settings):
    kd_weight: float = Field(default=0.9, ge=0.0, le=1.0)
    """w of (1 − w)·CE + w·T²·KL.  0 is plain SFT and needs no dataset."""
    divergence: Literal["forward_kl"] = "forward_kl"
    """KL(teacher ‖ student)."""
    tail: Literal["bucket"] = "bucket"
    """What is not kept is one more outcome, on both sides."""
    temperature: float = Field(default=1.0, gt=0.0)
    """One of those that the dataset declares."""
    chunk_positions: int = Field(default=256, ge=1)
    """Positions whose logits live at once."""


class OptimizerSettings(Settings):
    """AdamW with linear warm-up and a cosine down to `min_lr_ratio`."""

    learning_rate: float = Field(default=1e-5, gt=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0.0)
    """On matrices alone."""
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)


class TrainSettings(Settings):
    student: StudentSettings
    data: DataSettings
    output: str
    """Folder for the log and the trained model."""
    held_out: HeldOutSettings = HeldOutSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    epochs: float | None = Field(default=None, gt=0.0)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this or epochs."""
    rows_per_step: int = Field(default=64, ge=1)
    """Rows of one optimizer step, over all its forward passes."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward pass, padding included.  Changes memory and speed, not the gradient."""
    shuffle_blocks: int = Field(default=8, ge=1)
    """Shards whose rows are shuffled among each other; so many are in memory at once."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between looks at the held-out rows; always at the start and the end."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    device: str = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps, one of the two")
        if self.loss.kd_weight and self.data.dataset is None:
            raise ValueError("loss.kd_weight above 0 needs data.dataset; plain SFT on text has kd_weight: 0")
        return self
