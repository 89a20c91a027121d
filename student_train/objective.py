"""What the loss computes, as plain numbers: no torch here, so that a config can be checked without it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"]
Tail = Literal["bucket", "renormalise", "drop", "none"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """(1 − w)·CE + w·T²·D + z·lse² per position; `student_train.loss` computes it, `LOSSES.md` explains it.

    Raises:
        ValueError: a tail or temperature that this divergence, or a sampled teacher, cannot have.
    """

    kd_weight: float
    """w."""
    temperature: float = 1.0
    divergence: DivergenceName = "forward_kl"
    tail: Tail = "bucket"
    """What becomes of the ids that are not kept; `none`: the kept ids are a sample with weights, there is no tail."""
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    z_loss: float = 0.0
    agreement: float = 0.0
    """c of a position is the teacher's probability of the label to this power."""

    def __post_init__(self) -> None:
        for name, value, known in (("divergence", self.divergence, DivergenceName), ("tail", self.tail, Tail)):
            if value not in get_args(known):
                raise ValueError(f"{name} is one of {', '.join(get_args(known))}, got {value!r}")
        if self.tail == "none" and (self.divergence != "forward_kl" or self.temperature != 1.0):
            raise ValueError(
                "sampled ids estimate forward_kl at temperature 1 and nothing else, "
                f"got {self.divergence} at temperature {self.temperature:g}"
            )
        if self.tail in ("renormalise", "drop") and self.divergence != "forward_kl":
            raise ValueError(
                f"tail: {self.tail} is for forward_kl alone; {self.divergence} asks what the student does off the kept "
                "ids, and tail: bucket answers it"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is above 0, got {self.temperature}")
        for name, share in (("jsd_beta", self.jsd_beta), ("skew_alpha", self.skew_alpha)):
            if not 0 < share < 1:
                raise ValueError(f"{name} lies between 0 and 1, got {share}")
        if not 0 <= self.agreement < math.inf:
            raise ValueError(f"agreement is not negative, got {self.agreement}")
        if not (0 <= self.kd_weight <= 1 and 0 <= self.z_loss < math.inf):
            raise ValueError(f"kd_weight is 0 to 1 and z_loss not negative, got {self.kd_weight} and {self.z_loss}")
