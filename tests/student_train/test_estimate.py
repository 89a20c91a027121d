"""What an estimate says is what a real step takes, and the run of the same config does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from torch import nn

from shared.errors import MismatchError
from shared.models import output_head
from student_train.attention import VARLEN, Attention
from student_train.cli import cli
from student_train.config import TrainSettings
from student_train.estimate.estimation import estimate
from student_train.estimate.fake_student import FakeStudent, PassShape, Sizes
from student_train.estimate.memory import Memory, pass_memory, sharded, whole
from student_train.estimate.needs import largest_within
from student_train.estimate.place import Place, bytes_of
from student_train.estimate.rows import RunRows, SampleRow, typical_passes
from student_train.fused_linear import fused_linear_loss
from student_train.lora import add_adapters
from student_train.objective import Objective
from student_train.packing import Shape
from student_train.ranks import Ranks
from student_train.step import make_optimizer
from student_train.student import Student
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.student_train.references import lesson
from tests.tiny import make_model, make_tokenizer

GIB = 1 << 30
OBJECTIVE = Objective(kd_weight=0.9)
SHAPE = PassShape(num_lines=1, line_tokens=512, document_lengths=(300, 212), num_positions=256, num_kept=8)
WIDE = {"vocab_size": 4001, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 96}


def settings(student: Path, **changes: Any) -> TrainSettings:
    tree: dict[str, Any] = {
        "student": {"model": str(student)},
        "data": {"text": {"files": ["unread.jsonl"]}},
        "loss": {"kd_weight": 0},
        "output": "unwritten",
        "epochs": 2,
        "rows_per_step": 8,
        "batch_tokens": 600,
    }
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return TrainSettings.model_validate(tree)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(24))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, chats: Path) -> Path:
    return sealed_dump(dump_settings(teacher_folder, chats, tmp_path_factory.mktemp("kept8") / "out")).folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer: all that there is before weights are downloaded."""
    folder = tmp_path_factory.mktemp("bare")
    make_tokenizer(make_model(folder, **WIDE))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nearly all of it lies in layers."""
    folder = tmp_path_factory.mktemp("layered")
    make_tokenizer(make_model(folder, intermediate_size=4096))
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied"), family="llama_tied", **WIDE)


def allocated(of: TrainSettings, *, passes: int) -> int:
    """The most bytes that torch's allocator held in the second step of a real loop, weights and moments included."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(of.student.model), dtype=getattr(torch, of.student.dtype)
    )
    if of.student.lora:
        add_adapters(model, of.student.lora)
    model.set_attn_implementation(VARLEN)
    if of.student.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer, attention = make_optimizer(model, of.optimizer), Attention("varlen")
    said = lesson(torch.randn(SHAPE.num_positions, model.config.vocab_size), [8] * SHAPE.num_positions).targets
    asked = of.student.compute_dtype

    def step() -> None:
        for _ in range(passes):
            ids = torch.randint(0, 300, (1, SHAPE.line_tokens))
            with torch.autocast("cpu", torch.bfloat16, enabled=asked is not None):
                arguments = attention.arguments(torch.arange(SHAPE.line_tokens)[None], SHAPE.document_lengths)
                hidden = model.base_model(input_ids=ids, use_cache=False, **arguments).last_hidden_state
                hidden = hidden[0][torch.arange(SHAPE.num_positions)]
                loss = fused_linear_loss(hidden, output_head(model), said, OBJECTIVE, denominator=1.0)
            del hidden
            loss.total.backward()
            del loss
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    kept = [*model.parameters(), *model.buffers(), *(x for state in optimizer.state.values() for x in state.values())]
    now = most = sum({tensor.data_ptr(): tensor.nbytes for tensor in kept}.values())
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("family", "passes", "changes", "tolerance"),
    [
        ("bare", 1, {}, 0.02),
        ("tied", 2, {"student__gradient_checkpointing": True}, 0.02),
        ("bare", 2, {"student__compute_dtype": "bfloat16"}, 0.05),
        ("tied", 1, {"student__lora": {"rank": 8}}, 0.02),
    ],
)
def test_memory_is_what_a_real_step_allocates(
    family: str, passes: int, changes: dict[str, Any], tolerance: float, request: pytest.FixtureRequest
):
    of = settings(request.getfixturevalue(family), **changes)
    student = FakeStudent(of.student, Attention("varlen"), on_accelerator=False)
    passing = pass_memory(student, SHAPE, OBJECTIVE, of, accumulates=passes > 1)
    assert whole(student.sizes, passing, on_accelerator=False).total == pytest.approx(
        allocated(of, passes=passes), rel=tolerance
    )


def needed(of: TrainSettings, attention: str = "varlen", *, on_accelerator: bool = False, **changes: Any) -> Memory:
    student = FakeStudent(of.student, Attention(attention), on_accelerator=on_accelerator)
    return pass_memory(student, replace(SHAPE, **changes), OBJECTIVE, of, accumulates=False)


def test_memory_of_kernels_grows_with_tokens_and_of_probabilities_with_their_square(student_folder: Path):
    def growth(attention: str, *, on_accelerator: bool) -> float:
        of = settings(student_folder)
        short, long = (
            needed(of, attention, on_accelerator=on_accelerator, line_tokens=n, document_lengths=(n,)).activations
            for n in (512, 2048)
        )
        return long / short

    assert growth("varlen", on_accelerator=False) == pytest.approx(4, rel=0.05)
    assert growth("eager", on_accelerator=False) > 6
    # Two heads share their keys, which no kernel of accelerators takes in fp32.
    assert growth("varlen", on_accelerator=True) > 6


def test_memory_of_mixed_precision_is_a_copy_of_the_weights_and_half_of_the_activations(layered: Path):
    plain, mixed = settings(layered), settings(layered, student__compute_dtype="bfloat16")
    short, long = ({"line_tokens": n, "document_lengths": (n,), "num_positions": 8} for n in (2, 2048))
    layers = needed(plain).weights
    assert needed(mixed, **short).activations - needed(plain, **short).activations > 0.35 * layers
    assert needed(mixed, **long).activations < 0.7 * needed(plain, **long).activations


def test_memory_under_fsdp_is_a_share_and_what_is_gathered():
    own = Sizes(weights=1000, trained=1000, largest_trained=50, layer=100, rest=200)
    passing = Memory(weights=1000, gradients=1000, optimizer=2000, activations=300, work=70)
    two, many = (sharded(own, own, passing, num_ranks=n, sums_in_fp32=False, on_accelerator=True) for n in (2, 1000))
    assert (two.weights, two.gradients, two.optimizer) == (500, 500, 1000)
    # Two layers, what is in none with its gradient, and that once more to be summed.
    assert two.work == many.work == 70 + 2 * 100 + 200 + 200 + 200
    assert many.total == 1 + 1 + 2 + 300 + many.work
    mixed = sharded(own, own, passing, num_ranks=2, sums_in_fp32=True, on_accelerator=True)
    assert mixed.work - two.work == 200


def test_memory_that_cannot_be_told_says_so(bare: Path, monkeypatch: pytest.MonkeyPatch):
    student = FakeStudent(settings(bare).student, Attention("varlen"), on_accelerator=False)
    looks = lambda *_, **__: bool(torch.zeros(1).sum() + torch.empty(1))  # noqa: E731  as a model's own code might
    monkeypatch.setattr(student.model.base_model, "forward", looks)
    with pytest.raises(MismatchError, match="cannot be told beforehand") as raised:
        pass_memory(student, SHAPE, OBJECTIVE, settings(bare), accumulates=False)
    assert "--set steps=2" in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing": False},
        {"student__attention": "sdpa"},
        {"static_shapes": True},
        {"batch_tokens": 32, "static_shapes": True, "student__attention": "varlen"},
    ],
    ids=str,
)
def test_passes_are_cut_as_the_run_cuts_them(changes: dict[str, Any], student_folder: Path):
    of = settings(student_folder, device="cpu", **changes)
    student = Student(
        of.student,
        torch.device("cpu"),
        batch_tokens=of.batch_tokens,
        packing=of.packing,
        static_shapes=of.static_shapes,
    )
    place = Place.of(of, None, 1)
    attention = place.attention(of)
    assert attention == student.attention
    made = student.pass_maker(OBJECTIVE, longest_row=77, ranks=Ranks())
    assert place.shape(of, attention, 77) == made.shape


def test_the_fullest_pass_has_room_for_the_longest_row():
    row = SampleRow(num_tokens=40, num_positions=10)
    rows = RunRows(
        num_rows=100,
        tokens_per_row=40,
        positions_per_row=10,
        longest_row=500,
        num_kept=3,
        sampled=5,
        steps=[[row] * 5],
    )
    alone = typical_passes(rows, Shape(batch_tokens=100, line_tokens=100), 1)
    assert (alone.fullest.num_tokens, alone.fullest.num_positions) == (500, 125)
    assert alone.per_step == 3
    short = typical_passes(replace(rows, longest_row=40), Shape(batch_tokens=100, line_tokens=100), 1)
    assert (short.fullest.num_tokens, short.fullest.num_positions) == (80, 20)
    static = typical_passes(replace(rows, longest_row=40), Shape(batch_tokens=100, line_tokens=100, is_static=True), 1)
    assert (static.fullest.num_tokens, static.fullest.document_lengths) == (100, (40, 40, 20))
    assert static.padding == pytest.approx(1 - 200 / 300)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 << 30), ("80GB", 80 * 10**9), ("40g", 40 << 30), ("1.5 TiB", 3 << 39), (" 512 MiB ", 1 << 29)],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int):
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "80 apples", "-1GiB", "0", "GiB", "1e9"])
def test_sizes_that_are_none_are_refused(text: str):
    with pytest.raises(ValueError, match="write it like 80GiB"):
        bytes_of(text)


def run_verb(folder: Path, of: TrainSettings, *arguments: str) -> Result:
    config = folder / "train.yaml"
    config.write_text(json.dumps(of.model_dump(mode="json")), encoding="utf-8")
    return CliRunner().invoke(cli, ["estimate", str(config), *arguments], catch_exceptions=False)


def test_estimate_of_a_dataset_is_what_its_manifest_and_its_run_say(
    dataset: Path, student_folder: Path, tmp_path: Path
):
    of = settings(student_folder, data={"dataset": str(dataset)}, loss__kd_weight=0.9, device="cpu", log__peak_tflops=1)
    ran = run_verb(tmp_path, of, "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    manifest = json.loads((dataset / "manifest.json").read_text())["shards"]
    for name in ("rows", "tokens", "positions"):
        assert found[name] == sum(shard[name] for shard in manifest)
    assert found["longest_row"] == max(shard["longest_row"] for shard in manifest)
    assert (found["steps"], found["epochs"]) == (6, 2)
    assert found["sampled"] < found["rows"]
    assert found["seconds"] == pytest.approx(found["operations"] / 0.4e12)
    assert found["checkpoint_bytes"] == 3 * 4 * found["parameters"]
    assert found["checkpoints_bytes"] == 3 * found["checkpoint_bytes"]
    assert sum(found["memory"].values()) == found["total_bytes"]
    assert found["next"] == f"student-train run {tmp_path / 'train.yaml'}"
    assert not Path("unwritten").exists()


def test_estimate_needs_no_weights_and_reads_text_as_the_run_does(bare: Path, chats: Path, tmp_path: Path):
    of = settings(bare, data={"text": {"files": [str(chats)]}})
    ran = run_verb(tmp_path, of, "--memory", "80GiB")
    assert ran.exit_code == 0, ran.output
    assert "rows         24, " in ran.stdout
    assert "24 were looked at" in ran.stdout
    assert "on an accelerator" in ran.stdout
    assert "fits into 80.0 GiB" in ran.stdout
    assert "set log.peak_tflops" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("  next: student-train run ")
    two = run_verb(
        tmp_path, settings(bare, data={"text": {"files": [str(chats)]}}), "--memory", "80GiB", "--ranks", "2"
    )
    assert "on each of 2 × an accelerator" in two.stdout
    assert "  next: torchrun --nproc-per-node 2 -m student_train run " in two.stdout


def test_estimate_says_what_to_change_first_where_it_does_not_fit(layered: Path, chats: Path, tmp_path: Path):
    of = settings(layered, data={"text": {"files": [str(chats)]}}, batch_tokens=8192, rows_per_step=24)
    before = estimate(of, memory_bytes=80 * GIB)
    memory_bytes = GIB + before.total_bytes * 2 // 3
    ran = run_verb(tmp_path, of, "--memory", str(memory_bytes), "--set", "epochs=3", "--json")
    assert ran.exit_code == 1, ran.output
    found = json.loads(ran.stdout)
    assert found["fits"] is False
    batch, checkpointing, *_, spread = found["changes"]
    assert batch["settings"][0].startswith("batch_tokens=")
    assert found["next"].endswith(f"--set epochs=3 --set {batch['settings'][0]} --memory {memory_bytes}")
    assert checkpointing["settings"] == ["student.gradient_checkpointing=true"]
    assert spread["settings"][0] == "parallel=fsdp"
    assert spread["ranks"] > 1
    # What it proposes is so.
    fitting = of.model_copy(update={"batch_tokens": int(batch["settings"][0].split("=")[1])})
    assert estimate(fitting, memory_bytes=memory_bytes).fits is True
    assert batch["total_bytes"] > 0.5 * before.total_bytes


@pytest.mark.parametrize("room", [0, 999, 1000, 5000, 5001, 70_000, 99_999])
@pytest.mark.parametrize("least", [256, 300])
def test_the_largest_batch_is_found_where_lines_bend(room: int, least: int):
    def need(tokens: int) -> int:
        return 2 * tokens + max(0, tokens - 3000) * 5

    high = 16_384
    found = largest_within(room, need, least, high, need(high))
    fitting = [least, *range(-(-least // 256) * 256, high, 256)]
    expected = max((tokens for tokens in fitting if need(tokens) <= room), default=None)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert need(found) <= room
        assert found >= 0.8 * expected - 256


@pytest.mark.parametrize(
    ("changes", "arguments", "code", "words"),
    [
        ({}, ["--memory", "much"], 2, "is no size"),
        ({"student__model": "./nowhere"}, [], 2, "model folder ./nowhere does not exist"),
        ({"data": {"text": {"files": ["nowhere.jsonl"]}}}, [], 2, "nowhere.jsonl"),
        ({"rows_per_step": 999}, [], 2, "but there are 24 rows"),
        ({"held_out__fraction": 0.9999999}, [], 2, "no row is left to train on"),
    ],
)
def test_estimate_refuses_what_the_run_would(
    changes: dict[str, Any], arguments: list[str], code: int, words: str, bare: Path, chats: Path, tmp_path: Path
):
    of = settings(bare, **({"data": {"text": {"files": [str(chats)]}}} | changes))
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps(of.model_dump(mode="json")), encoding="utf-8")
    ran = CliRunner().invoke(cli, ["estimate", str(config), *arguments])
    error = ran.exception
    got = getattr(error, "exit_code", ran.exit_code) if error else ran.exit_code
    assert got == code
    assert words in f"{error} {ran.output}"


def test_estimate_for_a_device_that_is_not_here_does_not_know(student_folder: Path, chats: Path, tmp_path: Path):
    of = settings(student_folder, data={"text": {"files": [str(chats)]}}, device="cuda:7")
    ran = run_verb(tmp_path, of)
    assert ran.exit_code == 0
    assert "verdict      unknown" in ran.stdout
    assert "--memory 80GiB" in ran.stdout.splitlines()[-1]
