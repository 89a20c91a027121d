"""Tables and pictures of what was found, as the README shows them."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
from cells import TABLE_2

MANNERS = ("reasoning", "fast")


def by_name(tree: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The cells of each line, one for each seed."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for cell in tree["cells"]:
        lines.setdefault(cell["name"], []).append(cell)
    return lines


def spread(values: list[float], show: Callable[[float], str]) -> str:
    """Mean ± standard deviation over the seeds."""
    return show(mean(values)) + (f" ± {show(stdev(values))}" if len(values) > 1 else "")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def nats(value: float) -> str:
    return f"{value:.3f}"


def markdown(name: str, tree: dict[str, Any]) -> str:
    """One of the two tables."""
    lines = by_name(tree)
    heads = ["exact match, reasoning %", "fast %", "CE, reasoning", "CE, fast", "KL, reasoning", "KL, fast"]
    heads += ["reply tokens, R", "F"]
    if name == "table2":
        heads += ["gap closed %", "bytes per position"]
    heads += ["lr"]
    rows = ["| test split | " + " | ".join(heads) + " |"]
    rows.append("|---" * (len(heads) + 1) + "|")
    rows += [
        f"| {line} | " + " | ".join(columns(line, cells, lines, tree, name)) + " |" for line, cells in lines.items()
    ]
    times: dict[str, float] = {"training the cells": tree["train_s"], "measuring them": tree["measure_s"]}
    for of_seed in tree["shared_s"].values():
        for part, seconds in of_seed.items():
            times[part] = times.get(part, 0) + seconds
    rows += ["", "Seconds, all seeds and rates: " + ", ".join(f"{part} {s:,.0f}" for part, s in times.items()) + "."]
    return "\n".join(rows)


def columns(
    line: str, cells: list[dict[str, Any]], lines: dict[str, list[dict[str, Any]]], tree: dict[str, Any], name: str
) -> list[str]:
    def of(manner: str, key: str) -> list[float]:
        return [cell[manner][key] for cell in cells]

    found = [spread(of(manner, "exact"), percent) for manner in MANNERS]
    found += [spread(of(manner, key), nats) for key in ("ce", "kl") for manner in MANNERS]
    found += [f"{mean(of(manner, 'reply_tokens')):.1f}" for manner in MANNERS]
    if name == "table2":
        found += [gap_closed(cells, lines), bytes_of(line, tree)]
    return [*found, f"{cells[0]['rate']:g}"]


def gap_closed(cells: list[dict[str, Any]], lines: dict[str, list[dict[str, Any]]]) -> str:
    """From SFT to the live teacher, in exact match of the fast manner, of the means over seeds."""
    low, high = (mean(cell["fast"]["exact"] for cell in lines[each]) for each in list(TABLE_2)[:2])
    here = mean(cell["fast"]["exact"] for cell in cells)
    return f"{100 * (here - low) / (high - low):.0f}" if high > low else "–"


def bytes_of(line: str, tree: dict[str, Any]) -> str:
    dataset = TABLE_2[line][0]
    if dataset is None:
        return "–"
    return f"{mean(of_seed[dataset]['bytes_per_position'] for of_seed in tree['kept'].values()):.1f}"


def write_pictures(name: str, tree: dict[str, Any], folder: Path) -> None:
    """Exact match of every line in both manners: each seed a dot, their mean a bar."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = by_name(tree)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.42 * len(lines) + 1.2), layout="constrained", sharey=True)
    places = range(len(lines))
    for axis, manner in zip(axes, MANNERS, strict=True):
        values = [[100 * cell[manner]["exact"] for cell in cells] for cells in lines.values()]
        axis.barh(places, [mean(each) for each in values], color="#9ecae1", height=0.6)
        for place, each in zip(places, values, strict=True):
            axis.plot(each, [place] * len(each), "o", color="#08519c", markersize=4)
        axis.set(title=f"{manner} manner", xlabel="exact match, %", xlim=(0, 100))
        axis.grid(visible=True, axis="x", alpha=0.3)
    axes[0].set_yticks(list(places), list(lines))
    axes[0].invert_yaxis()
    figure.savefig(folder / f"{name}.png", dpi=130)
    plt.close(figure)
