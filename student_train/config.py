"""The config of `student-train`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared.config import LocalPath, Settings
from shared.models_config import ModelSettings
from student_train.data_config import DataSettings, HeldOutSettings
from student_train.objective import DivergenceName, Objective

AttentionName = Literal["auto", "varlen", "flash_attention_2", "sdpa", "eager"]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class LoraSettings(Settings):
    """Adapters of low rank beside frozen weights (Hu et al., arXiv 2106.09685), by `peft`."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0.0)
    """What adapters add is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    modules: list[str] | None = Field(default=None, min_length=1)
    """Ends of the names of linear layers, as q_proj; null takes all but the output matrix."""


class StudentSettings(ModelSettings):
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights.  AdamW in bfloat16 loses small updates; use it to fit a device, not by default."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Of matrix products; null is that of the weights.  bfloat16 beside float32 weights is mixed precision."""
    attention: AttentionName = "auto"
    """What keeps packed rows apart; auto takes the quickest that does so in this model on this device."""
    gradient_checkpointing: bool = False
    """Keep of each layer its input alone, and compute it again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Have torch.compile make kernels for the layers; shapes are static then."""
    lora: LoraSettings | None = None
    """Train adapters instead of the weights."""

    @model_validator(mode="after")
    def _consistent(self) -> "StudentSettings":
        if self.dtype == "bfloat16" and self.compute_dtype == "float32":
            raise ValueError("compute_dtype: float32 with dtype: bfloat16 would compute in more digits than there are")
        return self

    @property
    def product_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of matrix products."""
        return self.compute_dtype or self.dtype

    @property
    def is_mixed(self) -> bool:
        """Whether that is not the dtype of the weights."""
        return self.product_dtype != self.dtype


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
    agreement: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """c of a position is the teacher's probability of the label to this power; 0 weighs all alike."""
    chunk_positions: int | None = Field(default=None, ge=1)
    """Positions whose logits live at once; what fits into 320 MiB unless given."""

    @model_validator(mode="after")
    def _consistent(self) -> "LossSettings":
        if self.jsd_beta is not None and self.divergence != "jsd":
            raise ValueError(f"jsd_beta is for divergence: jsd, and would do nothing for {self.divergence}")
        if self.skew_alpha is not None and self.divergence != "skew_kl":
            raise ValueError(f"skew_alpha is for divergence: skew_kl, and would do nothing for {self.divergence}")
        if self.agreement and not self.kd_weight:
            raise ValueError("agreement asks the teacher, and kd_weight: 0 leaves it out")
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
            agreement=self.agreement,
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


class AnomalySettings(Settings):
    """What becomes of a step whose loss or gradient is no number, or whose gradient is a spike."""

    action: Literal["stop", "skip"] = "stop"
    """Stop the run, or leave the weights as they are and go on; either names the rows."""
    spike_factor: float | None = Field(default=None, gt=1.0, allow_inf_nan=False)
    """A spike is a gradient norm above so many times the median of the steps before; null: nothing is one."""
    window: int = Field(default=64, ge=8)
    """Of how many steps that median is; before there are as many, nothing is a spike."""
    max_skipped: int = Field(default=8, ge=1)
    """Steps in a row that may be skipped."""


class WandbSettings(Settings):
    """Weights & Biases; its key and mode come from its own environment variables."""

    project: str
    name: str | None = None
    """Of the run; null takes the folder's."""
    entity: str | None = None


class LogSettings(Settings):
    """Where numbers go besides `log.jsonl`."""

    tensorboard: bool = False
    """Into the run's folder `tensorboard`."""
    wandb: WandbSettings | None = None
    peak_tflops: float | None = Field(default=None, gt=0.0)
    """What one device does at most in 1e12 operations per second, for the model FLOPs utilisation; null looks it up."""


class TrainSettings(Settings):
    student: StudentSettings
    data: DataSettings
    output: LocalPath
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
    """Fill every forward pass up to one shape; null does so on Ascend and under student.compile, where each new shape
    is compiled."""
    shuffle_blocks: int = Field(default=16, ge=1)
    """Shards that the rows of a batch are drawn from; so many of each dataset are in memory at once."""
    loader_threads: int = Field(default=2, ge=1)
    """That read and decode shards while the student computes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes do: ddp, each holds all of the student; fsdp, weights, gradients and optimizer are spread
    over them (FSDP2)."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    anomaly: AnomalySettings = AnomalySettings()
    log: LogSettings = LogSettings()
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between looks at the held-out rows; always at the start and the end."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    device: str = "auto"
    deterministic: bool = False
    """Have torch use algorithms that give the same bits every time; slower, and an error where there is none."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.student.compile and self.static_shapes is False:
            raise ValueError("student.compile needs static_shapes: every new shape would be compiled")
        if (self.static_shapes or self.student.compile) and not self.packing:
            raise ValueError("static_shapes fills packed lines up, and needs packing")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps, one of the two")
        if self.loss.kd_weight and any(source.dataset is None for source in self.data.sources()):
            raise ValueError("loss.kd_weight above 0 needs data.dataset; plain SFT on text has kd_weight: 0")
        return self
