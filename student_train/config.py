"""The config of `student-train`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shared.config import Settings
from shared.models_config import ModelSettings
from shared.text_config import TextSettings
from student_train.objective import DivergenceName, Objective

AttentionName = Literal["auto", "varlen", "flash_attention_2", "sdpa", "eager"]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class StudentSettings(ModelSettings):
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights.  AdamW in bfloat16 loses small updates; use it to fit a device, not by default."""
    attention: AttentionName = "auto"
    """What keeps packed rows apart; auto takes the quickest that does so in this model on this device."""


class SourceSettings(Settings):
    ONE_SOURCE: ClassVar[str] = "name a dataset or text, one of the two"

    dataset: str | None = None
    """A sealed logit dataset: a folder or an fsspec URL."""
    text: TextSettings | None = None
    """Text files, for plain SFT without a teacher."""
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of a dataset's rows that exceed the student's context; text has a setting of its own."""

    @model_validator(mode="after")
    def _one_source(self) -> "SourceSettings":
        if sum(getattr(self, name, None) not in (None, []) for name in ("dataset", "text", "mix")) != 1:
            raise ValueError(self.ONE_SOURCE)
        if self.dataset is None and self.on_too_long != "error":
            raise ValueError("on_too_long is for a dataset's rows; for text say text.on_too_long")
        return self


class MixedSettings(SourceSettings):
    weight: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Its share of the rows of every step, up to a factor; for all of the mix or for none."""


class DataSettings(SourceSettings):
    ONE_SOURCE = "name a dataset, text or mix, and one of them only"

    mix: list[MixedSettings] = []
    """Several datasets, or several texts; without weights each row comes equally often."""
    cache: str | None = None
    """Folder on this machine for what is fetched from URLs; null takes ~/.cache/logitferry/datasets."""

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> "DataSettings":
        if len({each.weight is None for each in self.mix}) > 1:
            raise ValueError("mix: give every source a weight, or none")
        return self

    def sources(self) -> "list[SourceSettings]":
        """What rows come from: one source, or those of the mix."""
        return list(self.mix) or [self]


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
    """(1 − w)·CE + w·T²·D + z·lse² per supervised token; every part is explained in `student_train/LOSSES.md`."""

    kd_weight: float = Field(default=0.9, ge=0.0, le=1.0)
    """w.  0 is plain SFT and needs no dataset."""
    divergence: DivergenceName = "forward_kl"
    """D of teacher p and student q: KL(p ‖ q), KL(q ‖ p), or p and q each against, or p alone against, a mixture."""
    jsd_beta: float | None = Field(default=None, gt=0.0, lt=1.0)
    """The teacher's share of jsd's mixture and weight of its half; 0.5 unless given."""
    skew_alpha: float | None = Field(default=None, gt=0.0, lt=1.0)
    """The teacher's share of skew_kl's mixture; 0.1 unless given."""
    tail: Literal["bucket", "renormalise", "drop"] | None = None
    """What becomes of the ids that are not kept: one more outcome, unless given; sampled ids have none."""
    temperature: float = Field(default=1.0, gt=0.0)
    """T of both sides, one of those that the dataset declares."""
    z_loss: float = Field(default=0.0, ge=0.0)
    """z, which draws the logits' logsumexp to 0; 1e-4 where it is used."""
    chunk_positions: int | None = Field(default=None, ge=1)
    """Positions whose logits live at once; what fits into 320 MiB unless given."""

    @model_validator(mode="after")
    def _consistent(self) -> "LossSettings":
        if self.jsd_beta is not None and self.divergence != "jsd":
            raise ValueError(f"jsd_beta is for divergence: jsd, and would do nothing for {self.divergence}")
        if self.skew_alpha is not None and self.divergence != "skew_kl":
            raise ValueError(f"skew_alpha is for divergence: skew_kl, and would do nothing for {self.divergence}")
        self.objective(is_sampled=False)
        return self

    def objective(self, *, is_sampled: bool) -> Objective:
        """What the loss computes, for a dataset whose kept ids are a sample with weights or not.

        Raises:
            ValueError: the divergence, tail or temperature needs more than the teacher's kept ids say.
        """
        if is_sampled and self.tail is not None:
            raise ValueError(f"sampled ids have no tail to {self.tail}: leave loss.tail away")
        given = {"jsd_beta": self.jsd_beta, "skew_alpha": self.skew_alpha}
        return Objective(
            kd_weight=self.kd_weight,
            temperature=self.temperature,
            divergence=self.divergence,
            tail="none" if is_sampled else self.tail or "bucket",
            z_loss=self.z_loss,
            **{name: value for name, value in given.items() if value is not None},
        )


class OptimizerSettings(Settings):
    """AdamW with linear warm-up and a cosine down to `min_lr_ratio`."""

    learning_rate: float = Field(default=1e-5, gt=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0.0)
    """On matrices alone."""
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)


class CheckpointSettings(Settings):
    every_steps: int | None = Field(default=None, ge=1)
    every_minutes: float | None = Field(default=15.0, gt=0.0)
    """Whichever is first; null for neither.  SIGTERM, Ctrl-C and --stop-after always write one."""
    keep: int = Field(default=2, ge=1)
    """The last so many."""


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
    packing: bool = True
    """Put rows one behind the other, instead of side by side with padding; changes speed, not the gradient."""
    static_shapes: bool | None = None
    """Fill every forward pass up to one shape; null does so on Ascend, where every new shape is compiled."""
    shuffle_blocks: int = Field(default=16, ge=1)
    """Shards that the rows of a batch are drawn from; so many of each dataset are in memory at once."""
    loader_threads: int = Field(default=2, ge=1)
    """That read and decode shards while the student computes."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between looks at the held-out rows; always at the start and the end."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    device: str = "auto"
    deterministic: bool = False
    """Have torch use algorithms that give the same bits every time; slower, and an error where there is none."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.static_shapes and not self.packing:
            raise ValueError("static_shapes fills packed lines up, and needs packing")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps, one of the two")
        if self.loss.kd_weight and any(source.dataset is None for source in self.data.sources()):
            raise ValueError("loss.kd_weight above 0 needs data.dataset; plain SFT on text has kd_weight: 0")
        return self
