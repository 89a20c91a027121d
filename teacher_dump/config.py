"""The config of `teacher-dump`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Settings
from shared.manifest import MAX_TEMPERATURES, is_temperature
from shared.models_config import ModelSettings
from shared.shard_writer import ZSTD_LEVEL
from shared.text_config import TextSettings
from shared.vllm_config import VllmSettings


class TeacherSettings(ModelSettings):
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the forward pass.  vllm is for speed and for teachers larger than a device; transformers runs
    everywhere."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto takes the checkpoint's.  Log-probabilities are fp32 in any case."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of one forward pass, padding included; a longer row goes alone (transformers) or in parts (vllm)."""
    chunk_positions: int = Field(default=256, ge=1)
    """Positions whose logits live at once, V numbers each in the model's dtype and in fp32."""
    device: str = "auto"
    """transformers: auto takes the accelerator that torch finds, else the CPU."""
    device_map: Literal["auto"] | dict[str, int | str] | None = None
    """transformers: spreads a teacher that is larger than a device over all there are; needs `accelerate`."""
    static_shapes: bool | None = None
    """transformers: fill lengths, batches and chunks up, so that few shapes occur; null does so on Ascend, where
    every new shape is compiled."""
    vllm: VllmSettings = VllmSettings()

    @model_validator(mode="after")
    def _settings_of_the_engine(self) -> "TeacherSettings":
        others = {"transformers": ["vllm"], "vllm": ["device", "device_map", "static_shapes"]}[self.engine]
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not for engine: {self.engine}")
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device and device_map exclude each other")
        return self


OF_METHOD = {"k": "topk", "min_prob": "topk", "tau": "threshold", "seed": "threshold"}
"""The settings of `keep` that only one method has."""


class KeepSettings(Settings):
    method: Literal["topk", "threshold"] = "topk"
    """topk: the k largest probabilities and the exact tail.  threshold: every p >= tau, and of the others a sample
    with weight tau: fewer bytes, an unbiased forward KL at T = 1 and nothing else."""
    k: int = Field(default=64, ge=1)
    """topk: at most so many ids per position (`always` comes on top)."""
    min_prob: float = Field(default=0.0, ge=0.0, lt=1.0)
    """topk: of the k largest keep only those with p >= min_prob; the largest one is always kept."""
    tau: float = Field(default=0.02, gt=0.0, le=0.5)
    """threshold: what is at least as probable is kept as it is, anything else with probability p/tau and weight tau."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """threshold: of the draws, which depend on nothing else but sample id and position."""
    always: list[str] = []
    """Tokens that are kept at every position, as the tokenizer spells them: end of turn, think tags, tool openers."""
    max_kl: float = Field(default=1e-4, ge=0.0, le=0.01)
    """What rounding may lose, in nats of KL at T = 1, on average over a shard; 0 stores every bit."""

    @field_validator("max_kl")
    @classmethod
    def _reachable(cls, max_kl: float) -> float:
        if 0 < max_kl < 1e-9:
            raise ValueError("below 1e-9 nothing is gained by rounding; 0 stores every bit")
        return max_kl

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> "KeepSettings":
        for name, method in OF_METHOD.items():
            if method != self.method and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for method: {method}, and this is method: {self.method}")
        return self

    def in_force(self) -> dict[str, Any]:
        """The settings that the method has, for the manifest."""
        others = {name for name, method in OF_METHOD.items() if method != self.method}
        return self.model_dump(mode="json", exclude=others)


class RaySettings(Settings):
    """What one replica of the teacher takes with `--launcher ray`."""

    replicas: int | None = Field(default=None, ge=1)
    """How many there are; null makes as many as the cluster has room for at the start."""
    cpus: float = Field(default=1.0, ge=0.0)
    """Cores of one replica, which encodes as well."""
    gpus: float | None = Field(default=None, ge=0.0)
    """null takes what the engine's parallelism asks for, where the cluster has any."""
    resources: dict[str, float] = {}
    """Others by Ray's names, as for accelerators that it does not count as GPUs; see examples/ascend."""


class DumpSettings(Settings):
    teacher: TeacherSettings
    data: TextSettings
    output: str = Field(min_length=1)
    """Folder of the dataset, or an fsspec URL such as s3://bucket/my-dump."""
    keep: KeepSettings = KeepSettings()
    temperatures: list[float] = Field(default=[1.0], max_length=MAX_TEMPERATURES)
    """For each the exact tail is stored; a student can train at no other.  1 is always among them."""
    unit_records: int = Field(default=512, ge=1)
    """Records that are dumped and committed at once; one unit is one shard."""
    zstd_level: int = Field(default=ZSTD_LEVEL, ge=1, le=19)
    """Higher is smaller and slower; changes no value."""
    on_unscorable: Literal["error", "skip"] = "error"
    """What becomes of rows whose logits are no numbers; skipped ones are listed in the dataset's unscorable.jsonl."""
    ray: RaySettings = RaySettings()

    @field_validator("temperatures")
    @classmethod
    def _one_first(cls, temperatures: list[float]) -> list[float]:
        if not all(map(is_temperature, temperatures)):
            raise ValueError("temperatures lie between 0.05 and 100 and have at most three decimals")
        return [1.0, *sorted(set(temperatures) - {1.0})]

    @model_validator(mode="after")
    def _sampled_at_one(self) -> "DumpSettings":
        if self.keep.method == "threshold" and self.temperatures != [1.0]:
            raise ValueError("temperatures: with keep.method threshold there is 1 alone; topk stores tails for others")
        return self
