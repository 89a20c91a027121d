"""The paper's recipe on one machine, and what its parts are worth.

    python examples/pangu_recipe/run.py pipeline [--seed N]        one seed from corpus to the distilled student
    python examples/pangu_recipe/run.py table1 [--seeds N …]       the stages: which of them, in what order
    python examples/pangu_recipe/run.py table2 [--seeds N …]       what is kept of the teacher, and how it is used

Everything can be stopped and run again: commands that are done are not done twice, and a training run goes on from its
checkpoint.  `--jobs 2` runs two cells at once, with a thread each.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from cells import BUDGET, RATES, TABLE_1, TABLE_2, Cell, Run, make_kept, shared_start
from tables import markdown, write_pictures
from task import SIZES
from world import World

from shared.cli import run_command
from shared.errors import LogitferryError, MismatchError

RUNS: dict[str, dict[str, Run]] = {
    "table1": TABLE_1,
    "table2": {name: run for name, (_, run) in TABLE_2.items()},
}
ALL = RUNS["table1"] | RUNS["table2"]
TUNED_BY = {"table1": ("reasoning", "fast"), "table2": ("fast",)}
RATES_OF = {"table1": RATES, "table2": RATES[1:2]}
"""Table 2 goes on where two lines of table 1 do, which both were best at this one: SFT(F) and KD(F) after SFT(R)."""


def worlds(output: Path, seeds: Iterable[int], *, is_tiny: bool) -> list[World]:
    """One for each seed.  The teachers are those of seed 0: a seed is another corpus and another student."""
    first = output.resolve() / "seed-0"
    require_same(output, {"tiny": is_tiny, "sizes": SIZES, "budget": BUDGET})
    return [
        World(
            folder=output.resolve() / f"seed-{seed}",
            seed=seed,
            teachers_of=first if seed else None,
            is_tiny=is_tiny,
        )
        for seed in sorted({0, *seeds})
    ]


def require_same(output: Path, settings: dict[str, Any]) -> None:
    """What is kept in `output` was made with these settings.

    Raises:
        MismatchError: with others.
    """
    path = output / "settings.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    there = json.loads(path.read_text(encoding="utf-8"))
    if there != settings:
        raise MismatchError(
            f"{output} was made with {there}, and this is {settings}", next_step="give another --output"
        )


def find(cell: Cell, split: str) -> dict[str, Any]:
    """Train a cell and measure it, or what was found when that was done."""

    def work() -> dict[str, Any]:
        model = cell.world.once(f"{cell.slug}-model", lambda: {"model": ALL[cell.name](cell)})
        begin_s = time.monotonic()
        found = cell.measure(model["model"], split)
        measure_s = round(time.monotonic() - begin_s, 1)
        return found | {"train_s": model["seconds"], "measure_s": measure_s, "model": model["model"]}

    return cell.world.once(f"{cell.slug}-{split}", work)


def find_in_process(cell: Cell, split: str) -> dict[str, Any]:
    """The same in a process of its own, with one thread; what it says goes to a log."""
    log = cell.world.folder / "logs" / f"{cell.slug}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    options = ["--seed", str(cell.world.seed), "--rate", str(cell.rate), "--split", split]
    options += ["--output", str(cell.world.folder.parent), *(["--tiny"] if cell.world.is_tiny else [])]
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, __file__, "cell", cell.name, *options],
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode:
        raise LogitferryError(f"{cell.name}, seed {cell.world.seed}: exit code {done.returncode}, see {log}")
    return find(cell, split)


def best_rates(tried: dict[Cell, dict[str, Any]], manners: tuple[str, ...]) -> dict[str, float]:
    """For each line the rate of the highest exact match in these manners together, then of the lower cross-entropy."""

    def score(cell: Cell) -> tuple[float, float]:
        found = tried[cell]
        return sum(found[each]["exact"] for each in manners), -sum(found[each]["ce"] for each in manners)

    best: dict[str, Cell] = {}
    for cell in tried:
        if cell.name not in best or score(cell) > score(best[cell.name]):
            best[cell.name] = cell
    return {name: cell.rate for name, cell in best.items()}


def side_by_side(cells: list[Cell], split: str, jobs: int) -> dict[Cell, dict[str, Any]]:
    """What was found of each; the first that fails ends it, when those under way have ended."""
    with ThreadPoolExecutor(jobs) as threads:
        futures = {cell: threads.submit(find_in_process, cell, split) for cell in cells}
        try:
            results = {}
            for cell, future in futures.items():
                results[cell] = future.result()
                exact = " ".join(f"{manner} {results[cell][manner]['exact']:.1%}" for manner in ("reasoning", "fast"))
                click.echo(f"seed {cell.world.seed}, {cell.name}, lr {cell.rate:g}, {split}: {exact}")
            return results
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


@click.group()
def main() -> None:
    """The paper's recipe on one machine, and what its parts are worth."""


def options(function: Any) -> Any:
    for option in (
        click.option("--tiny", is_flag=True, help="Small enough for a test: the numbers mean nothing."),
        click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Cells at once."),
        click.option("--seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True),
        click.option(
            "--output", type=click.Path(path_type=Path), default=Path("build/pangu_recipe"), show_default=True
        ),
    ):
        function = option(function)
    return function


@main.command()
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("build/pangu_recipe"), show_default=True)
@click.option("--tiny", is_flag=True)
def pipeline(seed: int, output: Path, tiny: bool) -> None:
    """Teachers, dumps, SFT(R), SFT(F), KD(F), rollouts, KD on them: one seed."""
    begin_s = time.monotonic()
    everything = worlds(output, [seed], is_tiny=tiny)
    for world in everything:
        for name, part in world.make().items():
            click.echo(f"seed {world.seed}, {name}: {part['seconds']:.0f} s")
    cell = Cell(world=everything[-1], name="… + one round of rollouts", rate=RATES[1])
    result = find(cell, "test")
    click.echo(json.dumps(result, indent=1))
    click.echo(f"{time.monotonic() - begin_s:.0f} s")


def make_for_table_2(world: World) -> dict[str, Any]:
    """The datasets that are kept in unlike ways, and the student that all cells go on from."""
    parts = {"kept": lambda: make_kept(world), "start": lambda: {"model": shared_start(world)}}
    return {name: world.once(name, work) for name, work in parts.items()}


def table(name: str, output: Path, seeds: tuple[int, ...], jobs: int, tiny: bool) -> None:
    """All cells of a table: tuned on the development split of seed 0, measured on the test split of every seed."""
    begin_s, runs, rates = time.monotonic(), RUNS[name], RATES[1:2] if tiny else RATES_OF[name]
    everything = worlds(output, seeds, is_tiny=tiny)
    shared = {world.seed: world.make() | (make_for_table_2(world) if name == "table2" else {}) for world in everything}
    tried = side_by_side(
        [Cell(world=everything[0], name=each, rate=rate) for each in runs for rate in rates], "dev", jobs
    )
    chosen = best_rates(tried, TUNED_BY[name])
    cells = [Cell(world=w, name=each, rate=chosen[each]) for w in everything if w.seed in seeds for each in runs]
    results = side_by_side(cells, "test", jobs)
    found_of_all = [*tried.items(), *results.items()]
    tree = {
        "cells": [{"name": c.name, "seed": c.world.seed, "rate": c.rate, **found} for c, found in results.items()],
        "kept": {seed: parts.get("kept") for seed, parts in shared.items()},
        "shared_s": {seed: {name: found["seconds"] for name, found in parts.items()} for seed, parts in shared.items()},
        "tried": [{"name": c.name, "rate": c.rate, **found} for c, found in tried.items()],
        "train_s": round(sum({cell: found["train_s"] for cell, found in found_of_all}.values())),
        "measure_s": round(sum(found["measure_s"] for _, found in found_of_all)),
        "this_run_s": round(time.monotonic() - begin_s),
    }
    tree = json.loads(json.dumps(tree))
    (output / f"{name}.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
    click.echo(markdown(name, tree))
    write_pictures(name, tree, output)


@main.command("cell", hidden=True)
@click.argument("name")
@click.option("--seed", type=int)
@click.option("--rate", type=float)
@click.option("--split")
@click.option("--output", type=click.Path(path_type=Path))
@click.option("--tiny", is_flag=True)
def one_cell(name: str, seed: int, rate: float, split: str, output: Path, tiny: bool) -> None:
    """One cell of a table, as the tables start it."""
    world = next(each for each in worlds(output, [seed], is_tiny=tiny) if each.seed == seed)
    find(Cell(world=world, name=name, rate=rate), split)


@main.command()
@options
def table1(output: Path, seeds: tuple[int, ...], jobs: int, tiny: bool) -> None:
    """Which stages, in what order."""
    table("table1", output, seeds, jobs, tiny)


@main.command()
@options
def table2(output: Path, seeds: tuple[int, ...], jobs: int, tiny: bool) -> None:
    """What is kept of the teacher, and how it is used."""
    table("table2", output, seeds, jobs, tiny)


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("build/pangu_recipe"), show_default=True)
def readme(output: Path) -> None:
    """Put tables and pictures into the README of this example."""
    here = Path(__file__).resolve().parent
    text = (here / "README.md").read_text(encoding="utf-8")
    for name in RUNS:
        if not (output / f"{name}.json").exists():
            raise click.UsageError(f"{output}/{name}.json is not there; run {name} first")
        tree = json.loads((output / f"{name}.json").read_text())
        opening, closing = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(opening)
        shown = f"{markdown(name, tree)}\n\n![Exact match of every line in both manners]({name}.png)"
        text = f"{before}{opening}\n{shown}\n{closing}{rest.partition(closing)[2]}"
        shutil.copyfile(output / f"{name}.png", here / f"{name}.png")
    (here / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
