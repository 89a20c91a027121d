"""The cells of both tables: what each trains, and what is measured of the student that comes out.

Every cell spends the same number of student tokens, BUDGET; a cell of several stages shares it out.  A stage's steps
follow from its share and the mean length of its rows, so that a stage of long reasoning has fewer of them.
"""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from live import dump_draws, train_live
from world import World, set_options

ROWS_PER_STEP = 16
BUDGET, TINY_BUDGET = 1_800_000, 12_000
REASONED_ANSWER = r"</think>(\d+)$"
"""An answer without a thought before it is none in the reasoning manner."""
RATES = (2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class Source:
    """A dataset, or its rows of one manner."""

    dataset: str
    manner: str | None = None

    def tree(self) -> dict[str, Any]:
        """As `student-train run` takes it."""
        return {"dataset": f"dumps/{self.dataset}"} | ({"manner": self.manner} if self.manner else {})


FAST, REASONING = Source("fast", "fast"), Source("reasoning", "reasoning")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a cell."""

    name: str
    share: float
    """Of the cell's tokens."""
    sources: tuple[Source, ...]
    """Several are mixed, a row of each in turn."""
    loss: dict[str, Any] | None = None
    """None is SFT."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of a table, for one seed and one learning rate."""

    world: World
    name: str
    rate: float

    @property
    def slug(self) -> str:
        """A name for files."""
        return f"{re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')}-{self.rate:g}"

    @property
    def folder(self) -> str:
        return f"cells/{self.slug}"

    @property
    def budget(self) -> int:
        return TINY_BUDGET if self.world.is_tiny else BUDGET

    def train(self, stages: list[Stage], start: str = "models/student", part: str = "run") -> str:
        """Run stages in order; the folder of the model that they leave."""
        tree = self.common() | {"student": {"model": start}, "output": f"{self.folder}/{part}"}
        tree["stages"] = {stage.name: self.tree(stage) for stage in stages}
        config = self.world.write(f"{self.folder}/{part}.yaml", tree)
        self.world.run("student-train run", config)
        return f"{tree['output']}/{stages[-1].name}/model"

    def common(self) -> dict[str, Any]:
        return {
            "optimizer": {
                "learning_rate": self.rate,
                "weight_decay": 0.1,
                "warmup_steps": 2 if self.world.is_tiny else 20,
                "betas": [0.9, 0.98],
            },
            "rows_per_step": ROWS_PER_STEP,
            "batch_tokens": 2048,
            "loader_threads": 1,
            "checkpoint": {"every_minutes": 5, "keep": 1},
            "seed": self.world.seed,
            "device": "cpu",
        }

    def tree(self, stage: Stage) -> dict[str, Any]:
        """A stage as `student-train run` takes it."""
        trees = [source.tree() for source in stage.sources]
        data = trees[0] if len(trees) == 1 else {"mix": [each | {"weight": 1.0} for each in trees]}
        kind = {"kind": "sft"} if stage.loss is None else {"kind": "kd", "loss": stage.loss}
        return {**kind, "data": data, "steps": self.steps(stage)}

    def steps(self, stage: Stage) -> int:
        """Those that spend the stage's share of the tokens."""
        mean_tokens = mean(self.world.mean_tokens(each.dataset, each.manner) for each in stage.sources)
        return max(4, round(stage.share * self.budget / (ROWS_PER_STEP * mean_tokens)))

    def round(self, number: int, model: str, manner: str) -> str:
        """The student answers its own prompts and the manner's teacher scores that; the name of the dataset."""
        rollouts, name = f"{self.folder}/rollouts-{number}", f"{self.slug}-rollouts-{number}"
        changes = [f"student.model={model}", f"output={rollouts}", f"seed={self.world.seed}", f"data.manner={manner}"]
        self.world.run("student-train rollout", self.world.config("rollout"), *set_options(changes))
        self.world.dump(name, manner, [f"data.files=[{rollouts}/data]", "data.source_field=source"])
        return name

    def measure(self, model: str, split: str) -> dict[str, Any]:
        """Exact match in both manners, cross-entropy, KL to the manner's teacher, answer length."""
        found: dict[str, Any] = {}
        for manner in ("reasoning", "fast"):
            output = f"{self.folder}/eval-{split}-{manner}"
            data = f"{{dataset: dumps/{split}-{manner}, manner: {manner}}}"
            changes = [f"student.model={model}", f"data={data}", f"output={output}"]
            if manner == "reasoning":
                changes.append(f"generate.answer={REASONED_ANSWER}")
            self.world.run("student-train eval", self.world.config("eval"), *set_options(changes))
            result = json.loads((self.world.folder / output / "eval.json").read_text())
            means, match = result["evaluation"]["means"], result["exact_match"]
            found[manner] = {
                "exact": match["share"], "cut": match["cut"], "reply_tokens": match["mean_reply_tokens"],
                "ce": means["ce"], "kl": means["kl"],
            }  # fmt: skip
        return found


Run = Callable[[Cell], str]
"""Trains a cell; the folder of its model."""
KD: dict[str, Any] = {"kd_weight": 0.9}


def sft(share: float, *sources: Source, name: str = "sft") -> Stage:
    return Stage(name=name, share=share, sources=sources)


def kd(share: float, *sources: Source, name: str = "kd", **loss: Any) -> Stage:
    return Stage(name=name, share=share, sources=sources, loss=KD | loss)


def sft_both(share: float) -> list[Stage]:
    """SFT(R), then SFT(F)."""
    return [sft(share / 2, REASONING, name="sft-reasoning"), sft(share / 2, FAST, name="sft-fast")]


def rounds(number: int, source: Source, *first: Stage) -> Run:
    """After the `first` stages KD, its tokens shared out: labels alone, then rounds of the student's own rollouts
    beside them."""

    def run(cell: Cell) -> str:
        share = (1 - sum(stage.share for stage in first)) / (number + 1)
        model = cell.train([*first, kd(share, source)])
        for count in range(1, number + 1):
            written = cell.round(count, model, str(source.manner))
            stage = kd(share, source, Source(written), kd_weight=1.0)  # what a student wrote is no label
            model = cell.train([stage], start=model, part=f"round-{count}")
        return model

    return run


def of_stages(*stages: Stage) -> Run:
    return lambda cell: cell.train(list(stages))


TABLE_1: dict[str, Run] = {
    "SFT(F)": of_stages(sft(1, FAST)),
    "SFT(R) + SFT(F)": of_stages(*sft_both(1)),
    "SFT(R) + KD(F)": of_stages(sft(1 / 2, REASONING), kd(1 / 2, FAST)),
    "SFT(R) + SFT(F) + KD(F)": of_stages(*sft_both(2 / 3), kd(1 / 3, FAST)),
    "… + one round of rollouts": rounds(1, FAST, *sft_both(2 / 3)),
    "… + two rounds": rounds(2, FAST, *sft_both(2 / 3)),
    "SFT(R)": of_stages(sft(1, REASONING)),
    "SFT(R) + KD(R)": of_stages(sft(1 / 2, REASONING), kd(1 / 2, REASONING)),
    "SFT(R) + KD(R) + one round": rounds(1, REASONING, sft(1 / 2, REASONING)),
    "SFT(R) + KD(R) + two rounds": rounds(2, REASONING, sft(1 / 2, REASONING)),
    "SFT + KD, both manners": of_stages(sft(1 / 2, REASONING, FAST), kd(1 / 2, REASONING, FAST)),
    "alternation": of_stages(
        sft(1 / 4, REASONING, FAST, name="sft-1"),
        kd(1 / 4, REASONING, FAST, name="kd-1"),
        sft(1 / 4, REASONING, FAST, name="sft-2"),
        kd(1 / 4, REASONING, FAST, name="kd-2"),
    ),
}


def after_sft(stage: Stage) -> Run:
    """From the student after half of the tokens, SFT(R), the same for all cells of a seed."""

    def run(cell: Cell) -> str:
        return cell.train([stage], start=shared_start(cell.world))

    return run


def shared_start(world: World) -> str:
    return Cell(world=world, name="start", rate=RATES[1]).train([sft(1 / 2, REASONING)])


def live(cell: Cell) -> str:
    """The teacher in memory, KL over the whole vocabulary.  Its config alone would be SFT."""
    tree = cell.common() | {"student": {"model": shared_start(cell.world)}, "output": f"{cell.folder}/run"}
    steps = cell.steps(sft(1 / 2, Source("k64")))
    tree |= {"data": {"text": {"files": [FAST_CORPUS]}}, "loss": {"kd_weight": 0}, "steps": steps}
    config = cell.world.write(f"{cell.folder}/run.yaml", tree)
    with contextlib.chdir(cell.world.folder):
        train_live(config, "teachers/fast/model", KD["kd_weight"])
    return f"{tree['output']}/model"


def from_kept(dataset: str, **loss: Any) -> tuple[str, Run]:
    return dataset, after_sft(kd(1 / 2, Source(dataset), **loss))


TABLE_2: dict[str, tuple[str | None, Run]] = {
    # What is in the table: the dataset whose bytes count, and how it is trained on.
    "SFT (no teacher)": (None, after_sft(sft(1 / 2, Source("k64")))),
    "live, full vocabulary": (None, live),
    "k = 1": from_kept("k1"),
    "k = 2": from_kept("k2"),
    "k = 4": from_kept("k4"),
    "k = 10": from_kept("k10"),
    "k = 64": from_kept("k64"),
    "k = 2, renormalise": from_kept("k2", tail="renormalise"),
    "k = 2, drop": from_kept("k2", tail="drop"),
    "threshold sampling": from_kept("threshold"),
    "RS-KD, as many bytes": from_kept("rs-kd"),
    "k = 64, T = 2": from_kept("k64-t2", temperature=2.0),
    "k = 64, weight 0.5": from_kept("k64", kd_weight=0.5),
    "k = 64, weight 1": from_kept("k64", kd_weight=1.0),
    "k = 64, c = p(label)": from_kept("k64", agreement=1.0),
}
FAST_CORPUS = "corpus/student-fast.jsonl"
"""What table 2 trains on, so that bytes are those of rows that count."""
ONE_TEMPERATURE = ("temperatures=[1.0]", f"data.files=[{FAST_CORPUS}]")
KEPT: dict[str, list[str]] = {
    "k1": ["keep={k: 1}", *ONE_TEMPERATURE],
    "k2": ["keep={k: 2, min_prob: 1.0e-4}", *ONE_TEMPERATURE],
    "k4": ["keep={k: 4, min_prob: 1.0e-4}", *ONE_TEMPERATURE],
    "k10": ["keep={k: 10, min_prob: 1.0e-4}", *ONE_TEMPERATURE],
    "k64": ["keep={k: 64, min_prob: 1.0e-4}", *ONE_TEMPERATURE],
    "k64-t2": ["keep={k: 64, min_prob: 1.0e-4}", "temperatures=[1.0, 2.0]", f"data.files=[{FAST_CORPUS}]"],
    "threshold": ["keep={method: threshold, tau: 0.02}", *ONE_TEMPERATURE],
}


def make_kept(world: World) -> dict[str, Any]:
    """The datasets of table 2: one teacher and the fast rows, kept in unlike ways."""
    lines = (world.folder / "corpus/student.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    fast = [line for line in lines if json.loads(line)["manner"] == "fast"]
    (world.folder / FAST_CORPUS).write_text("".join(fast), encoding="utf-8")
    sizes: dict[str, Any] = {name: world.dump(name, "fast", changes) for name, changes in KEPT.items()}
    sizes["rs-kd"] = _drawn(world, sizes["threshold"]["bytes_per_position"])
    kept = ("bytes_per_position", "kept_per_position", "kept_mass", "positions", "draws")
    return {name: {key: info[key] for key in kept if key in info} for name, info in sizes.items()}


def _drawn(world: World, bytes_per_position: float) -> dict[str, Any]:
    """RS-KD with as many draws as come to about so many bytes, told by the size of a few tries."""
    tries = {}
    for draws in (2, 3, 5, 8, 13, 21, 34, 55, 89, 144) if not world.is_tiny else (3,):
        name = f"rs-kd-{draws}"
        changes = [*KEPT["threshold"], f"output=dumps/{name}", "teacher.model=teachers/fast/model"]
        with contextlib.chdir(world.folder):
            dump_draws(world.config("dump"), changes, draws)
        tries[name] = world.info(name)
        if tries[name]["bytes_per_position"] > bytes_per_position:
            break
    nearest = min(tries, key=lambda name: abs(tries[name]["bytes_per_position"] - bytes_per_position))
    link = Path(world.folder / "dumps/rs-kd")
    link.unlink(missing_ok=True)
    link.symlink_to(nearest)
    return tries[nearest] | {"draws": int(nearest.rpartition("-")[2])}
