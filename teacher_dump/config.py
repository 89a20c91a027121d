"""The config of `teacher-dump`."""

from typing import Literal

from pydantic import Field, field_validator

from shared.config import Settings
from shared.manifest import is_temperature
from shared.models_config import ModelSettings
from shared.text_config import TextSettings


class TeacherSettings(ModelSettings):
    engine: Literal["transformers"] = "transformers"
    """What runs the forward pass."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto takes the checkpoint's.  Log-probabilities are fp32 in any case."""
    device: str = "auto"
    """auto takes the accelerator that torch finds, else the CPU."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of one forward pass, padding included; a longer row goes alone."""
    chunk_positions: int = Field(default=256, ge=1)
    """Positions whose logits live at once: twice chunk_positions × V floats."""


class KeepSettings(Settings):
    method: Literal["topk"] = "topk"
    """topk: the k largest probabilities."""
    k: int = Field(default=64, ge=1)
    """At most so many ids per position (`always` comes on top)."""
    min_prob: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of the k largest keep only those with p >= min_prob; the largest one is always kept."""
    always: list[str] = []
    """Tokens that are kept at every position, as the tokenizer spells them: end of turn, think tags, tool openers."""


class DumpSettings(Settings):
    teacher: TeacherSettings
    data: TextSettings
    output: str
    """Folder of the dataset."""
    keep: KeepSettings = KeepSettings()
    temperatures: list[float] = [1.0]
    """For each the exact tail is stored; a student can train at no other.  1 is always among them."""
    unit_records: int = Field(default=512, ge=1)
    """Records that are dumped and committed at once; one unit is one shard."""

    @field_validator("temperatures")
    @classmethod
    def _one_first(cls, temperatures: list[float]) -> list[float]:
        if not all(map(is_temperature, temperatures)):
            raise ValueError("temperatures lie between 0.05 and 100 and have at most three decimals")
        return [1.0, *sorted(set(temperatures) - {1.0})]
