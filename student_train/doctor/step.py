"""A step in small on the device that would be used, and the same on the CPU in float32: do both say the same?

Drivers, builds and kernels that do not fit show here, not in a loss curve.  Of the real student and some rows of its
data where both are here; of a small made-up module otherwise.  No weight is changed.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.amounts import size
from shared.doctor.devices import host_memory
from shared.doctor.finding import Finding
from student_train.config import StudentSettings, TrainSettings
from student_train.doctor.data import Looked
from student_train.doctor.room import weight_bytes

if TYPE_CHECKING:
    import torch

VOCAB_SIZE, WIDTH, NUM_TOKENS = 64, 32, 48
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.05}
"""Relative, of the loss; ten times as much of the gradient's norm."""
FAULT = "the device, its driver or its build of torch is at fault; try another student.compute_dtype"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What came of forward and backward."""

    loss: float
    norm: float
    """Of the gradient of all weights together."""
    note: str = ""

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, gradient {self.norm:.4g}"


def real_step(settings: TrainSettings, looked: Looked) -> Iterator[Finding]:
    """Of the student itself, through its own loss."""
    import torch

    from shared.device import pick_device

    device, needed = pick_device(settings.device), weight_bytes(settings.student)
    available = (host_memory() or (math.inf,))[0]
    on_host = 0 if needed is None else 2 * needed  # with gradients; weights come to a device by way of the host
    if needed is None or on_host > available:
        why = "its weights are not here" if needed is None else f"it needs {size(on_host)} of the host"
        yield Finding("step", "ok", f"the student itself is not tried: {why}")
        yield from made_up_step(settings)
        return
    got = _tried(settings, looked, device, settings.student)
    what = f"{settings.student.model} and {len(looked.rows)} row{'s' * (len(looked.rows) > 1)} cut short"
    dtype = settings.student.product_dtype
    plain = settings.student.model_copy(update={"dtype": "float32", "compute_dtype": None, "attention": "auto"})
    is_the_same = device.type == "cpu" and dtype == "float32"
    in_float32 = on_host * (2 if settings.student.dtype == "bfloat16" else 1)
    fits = in_float32 <= (host_memory() or (math.inf,))[0]
    expected = _tried(settings, looked, torch.device("cpu"), plain) if fits and not is_the_same else None
    yield _compared(f"{what} in {dtype} on {device}", dtype, got, expected)


def _tried(settings: TrainSettings, looked: Looked, device: "torch.device", student: StudentSettings) -> Step:
    import torch

    from student_train.ranks import Ranks
    from student_train.student import Student

    assert looked.objective is not None
    # A compiler takes minutes, and dropout would make two steps of one student differ.
    changes: dict[str, Any] = {"compile": False}
    if student.lora is not None:
        changes["lora"] = student.lora.model_copy(update={"dropout": 0.0})
    num_tokens = sum(row.num_tokens for row in looked.rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # adapters begin with random numbers
        tried = Student(
            student.model_copy(update=changes),
            device,
            batch_tokens=num_tokens,
            chunk_positions=settings.loss.chunk_positions,
            packing=settings.packing,
            static_shapes=settings.static_shapes,
        )
    longest = max(row.num_tokens for row in looked.rows)
    maker = tried.pass_maker(looked.objective, longest_row=longest, ranks=Ranks(device=device))
    passes, _ = maker.make(looked.rows)
    num_positions = sum(row.num_positions for row in looked.rows)
    loss, _ = tried.gradients(passes, looked.objective, denominator=num_positions)
    name = tried.attention.name
    note = "rows are padded" if name is None else f"rows are packed, with attention {name}"
    return Step(loss=float(loss), norm=_norm(tried.model), note=note)


def made_up_step(settings: TrainSettings | None) -> Iterator[Finding]:
    """Of a module that is here wherever torch is, in the dtypes that would be used."""
    import torch

    from shared.device import pick_device

    device = pick_device(settings.device if settings else "auto")
    asked = [("float32", "float32"), ("float32", "bfloat16")]
    if settings is not None:
        asked = [(settings.student.dtype, settings.student.product_dtype)]
    expected = _made_up("float32", "float32", torch.device("cpu"))
    for weights, products in asked:
        got = _made_up(weights, products, device)
        yield _compared(f"a small made-up module in {products} on {device}", products, got, expected)


def _made_up(weights: str, products: str, device: "torch.device") -> Step:
    import torch
    from torch import nn

    from shared.device import pick_dtype

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Embedding(VOCAB_SIZE, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU()]
        module = nn.Sequential(*layers, nn.Linear(WIDTH, VOCAB_SIZE)).to(device, pick_dtype(weights))
    ids_N = (torch.arange(NUM_TOKENS) * 5 % VOCAB_SIZE).to(device)
    with nullcontext() if products == weights else torch.autocast(device.type, pick_dtype(products)):
        logits_NV = module(ids_N)
    loss = nn.functional.cross_entropy(logits_NV.float(), ids_N.roll(-1))
    loss.backward()
    return Step(loss=float(loss.detach()), norm=_norm(module))


def _norm(module: Any) -> float:
    """Summed on the CPU, part by part: no device needs double precision for it."""
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    return math.sqrt(sum(float(gradient.float().norm()) ** 2 for gradient in gradients))


def _compared(what: str, dtype: str, got: Step, expected: Step | None) -> Finding:
    note = f"; {got.note}" if got.note else ""
    found = f"{what}: {got}{note}"
    if not math.isfinite(got.loss) or not math.isfinite(got.norm):
        return Finding("step", "mend", found, "look at the weights; where others train with them, at the device")
    if expected is None:
        return Finding("step", "ok", found)
    tolerance = TOLERANCE[dtype]
    if not math.isclose(got.loss, expected.loss, rel_tol=tolerance, abs_tol=tolerance):
        return Finding("step", "mend", f"{found}; on the CPU in float32: {expected}", FAULT)
    if not math.isclose(got.norm, expected.norm, rel_tol=10 * tolerance):
        return Finding("step", "warning", f"{found}; on the CPU in float32: {expected}", FAULT)
    return Finding("step", "ok", f"{found}, as on the CPU in float32")
