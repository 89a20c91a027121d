"""The config of `student-train rollout`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Settings
from shared.models_config import ModelSettings
from shared.vllm_config import VllmSettings
from student_train.data_config import DataSettings
from student_train.eval.config import one_group, require_whole_references

LEAST_TEMPERATURE = 0.01


class WriterSettings(ModelSettings):
    """The student that writes."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto takes the checkpoint's."""


class VerifySettings(Settings):
    """What says whether a reply is right: one of the two."""

    answer: str | None = None
    """A regular expression with one group.  Its last match is the answer, in reference and reply alike, and numbers are
    compared as such."""
    function: str | None = None
    """path/to/file.py:name, called as name(reply, reference, prompt), three texts, for True or False.  The file is run:
    name only one that you trust."""

    @field_validator("answer")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        return one_group(pattern)

    @field_validator("function")
    @classmethod
    def _file_and_name(cls, function: str | None) -> str | None:
        if function is not None:
            path, _, name = function.rpartition(":")
            if not path.endswith(".py") or not name.isidentifier():
                raise ValueError("expected path/to/file.py:name")
        return function

    @model_validator(mode="after")
    def _one_of_two(self) -> "VerifySettings":
        if (self.answer is None) == (self.function is None):
            raise ValueError("give answer or function, one of the two")
        return self


class KeepSettings(Settings):
    """Which replies are trained on; all others are counted by reason, and written apart."""

    truncated: bool = False
    """Also replies that nothing ended but max_new_tokens or the context."""
    nll: tuple[float | None, float | None] | None = None
    """Only replies whose mean −log p per token lies between these bounds, in nats, by the student at T = 1; null is no
    bound."""
    repetition: float | None = Field(default=None, ge=0.0, le=1.0)
    """Only replies of whose runs of four tokens no larger share repeats an earlier one."""
    wrong: bool = True
    """Also replies that the verifier calls wrong."""

    @field_validator("nll")
    @classmethod
    def _upwards(cls, bounds: tuple[float | None, float | None] | None) -> Any:
        if bounds is not None and None not in bounds and not bounds[0] < bounds[1]:  # pyright: ignore[reportOperatorIssue]
            raise ValueError("expected a lower and a higher bound")
        return bounds


class RolloutSettings(Settings):
    student: WriterSettings
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the student.  vllm is several times faster on an accelerator; transformers runs everywhere."""
    vllm: VllmSettings = VllmSettings()
    data: DataSettings
    """Rows whose prompts are asked: all that stands before a row's last supervised tokens, which are the reference."""
    output: str = Field(min_length=1)
    """Folder, or an fsspec URL."""
    rows: int | None = Field(default=None, ge=1)
    """So many, drawn by `seed` and the sample ids; null takes all."""
    samples: int = Field(default=1, ge=1)
    """Replies to each prompt."""
    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """0 takes the most probable token, always."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the most probable tokens alone that together have so much; of `top_k`, where it is given."""
    top_k: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=2048, ge=1)
    """Of a reply; near the end of the context there is room for fewer."""
    batch_rows: int = Field(default=32, ge=1)
    """transformers: replies that are written at once; halved where memory does not suffice."""
    unit_prompts: int = Field(default=64, ge=1)
    """Prompts whose replies are committed at once; a stop loses no more than what is being written."""
    verify: VerifySettings | None = None
    keep: KeepSettings = KeepSettings()
    device: str = "auto"
    """transformers: auto takes the accelerator that torch finds, else the CPU."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _consistent(self) -> "RolloutSettings":
        others = {"transformers": ["vllm"], "vllm": ["device", "batch_rows"]}[self.engine]
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not for engine: {self.engine}")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature is 0, or {LEAST_TEMPERATURE} at least")
        if self.temperature == 0:
            for name in ("samples", "top_p", "top_k"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"temperature: 0 writes one reply to a prompt, and {name} would do nothing")
        if not self.keep.wrong and self.verify is None:
            raise ValueError("keep.wrong: false needs verify, which tells what is wrong")
        if self.data.has_curriculum:
            raise ValueError("a curriculum is for rows that are trained on")
        require_whole_references(self.data, "rollout")
        return self
