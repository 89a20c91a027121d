"""What an evaluation found of probabilities: a calibration diagram and the teacher's mass on kept ids, as inline SVG.

Both are told by numbers as well: `title` elements show where the pointer is, without a script.
"""

from collections.abc import Sequence
from itertools import pairwise

from shared.page import escaped
from student_train.evaluation import Bin, Evaluation, Histogram

SIDE = 240
COUNTS = 44
"""Height of the bars below that say how many positions a bin has."""
ROW = 22
MIDDLING = 0.5
"""A bar's least width, so that what is rare is still seen, in percent."""


def diagrams(evaluation: Evaluation) -> str:
    """Both, as far as there is something to show."""
    figures = []
    if any(each.count for each in evaluation.calibration):
        note = f"error {evaluation.means.ece:.3f} over {evaluation.means.positions:,} supervised tokens"
        figures.append(
            _figure("Calibration", note, _calibration(evaluation.calibration), _told(evaluation.calibration))
        )
    if evaluation.kept_mass is not None and sum(evaluation.kept_mass.counts):
        note = "teacher's mass on kept ids, by share of supervised tokens"
        figures.append(_figure("Kept mass", note, _histogram(evaluation.kept_mass), ""))
    return f'<div class="diagrams">\n{"".join(figures)}</div>\n' if figures else ""


def _figure(title: str, note: str, drawing: str, told: str) -> str:
    caption = f"<figcaption><strong>{title}</strong> <small>{escaped(note)}</small></figcaption>"
    return f"<figure>\n{caption}\n{drawing}\n{told}</figure>\n"


def _calibration(bins: Sequence[Bin]) -> str:
    """Accuracy over confidence, the diagonal where both are the same, and below how many positions there are."""
    width, most = SIDE / len(bins), max(each.count for each in bins)
    parts = [
        f'<path class="grid" d="{"".join(f"M0 {SIDE * n / 4:g}H{SIDE}M{SIDE * n / 4:g} 0V{SIDE}" for n in range(5))}"/>'
    ]
    for number, each in enumerate(bins):
        if not each.count:
            continue
        x, top, line = width * number + 1, SIDE * (1 - each.accuracy), SIDE * (1 - each.confidence)
        bars = _bar("bin", x, max(top, line), width - 2, SIDE - max(top, line))
        bars += _bar("over" if line < top else "under", x, min(top, line), width - 2, abs(top - line))
        bars += _bar("count", x, SIDE + 8, width - 2, max(COUNTS * each.count / most, 1))
        bars += _bar("whole", x - 1, 0, width, SIDE + 8 + COUNTS)
        said = (
            f"probability {number / len(bins):.2f}–{(number + 1) / len(bins):.2f}: {each.count:,} tokens, "
            f"mean {each.confidence:.3f}, right {each.accuracy:.3f}"
        )
        parts.append(f"<g>{bars}<title>{said}</title></g>")
    parts.append(f'<path class="diagonal" d="M0 {SIDE}L{SIDE} 0"/>')
    for share in (0, 0.5, 1):
        y, label = SIDE * (1 - share), f"{share:g}"
        parts.append(f'<text class="left" x="-6" y="{y:g}" dy=".32em">{label}</text>')
    height = SIDE + 8 + COUNTS
    parts.append(f'<text x="0" y="{height + 16}">0</text><text class="end" x="{SIDE}" y="{height + 16}">1</text>')
    parts.append(f'<text class="middle" x="{SIDE / 2:g}" y="{height + 16}">probability of its first choice</text>')
    parts.append(f'<text class="left" x="-6" y="{height - COUNTS + 10}">tokens</text>')
    parts.append(f'<text class="middle" transform="rotate(-90)" x="{-SIDE / 2:g}" y="-36">how often it is right</text>')
    box = f'viewBox="-50 -8 {SIDE + 60} {height + 32}" width="{SIDE + 60}" height="{height + 32}"'
    return f'<svg class="calibration" {box} role="img" aria-label="calibration diagram">{"".join(parts)}</svg>'


def _bar(name: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _told(bins: Sequence[Bin]) -> str:
    """Which way it errs, in words."""
    ways = (("over", "too sure"), ("under", "not sure enough"))
    keys = "".join(f'<span><i class="{name}"></i>{way}</span>' for name, way in ways)
    key = f'<p class="keys">{keys}</p>\n'
    over = sum(each.count * (each.confidence - each.accuracy) for each in bins) / sum(each.count for each in bins)
    if abs(over) < 0.005:
        return f"<p>On the whole it is as sure as it is right.</p>\n{key}"
    way = "surer than it is right" if over > 0 else "right more often than it is sure"
    return f"<p>On the whole it is {way}, by {100 * abs(over):.1f} points.</p>\n{key}"


def _histogram(histogram: Histogram) -> str:
    """One bar for each bin, the fullest mass on top: bins differ in width, so their bars do not stand side by side."""
    total = sum(histogram.counts)
    most = max(histogram.counts) / total
    rows = list(zip(pairwise(histogram.edges), histogram.counts, strict=False))[::-1]
    parts = []
    for number, ((low, high), count) in enumerate(rows):
        y, share = ROW * number, count / total
        wide = max(58 * share / most, MIDDLING if count else 0)
        label = f"{low:g} – {high:g}"
        parts.append(
            f'<g><text class="left" x="104" y="{y + 15}">{label}</text>'
            f'<svg x="114" width="100%" height="{ROW * len(rows)}" overflow="visible">'
            f'<rect class="bin" x="0" y="{y + 4}" width="{wide:.2f}%" height="{ROW - 8}"/>'
            f'<text x="{wide:.2f}%" dx="6" y="{y + 15}">{_percent(share, count)}</text></svg>'
            f"<title>{label}: {count:,} of {total:,} supervised tokens</title></g>"
        )
    height = ROW * len(rows) + 4
    return f'<svg class="histogram" height="{height}" role="img" aria-label="kept mass">{"".join(parts)}</svg>'


def _percent(share: float, count: int) -> str:
    if not count:
        return "0"
    return "< 0.01 %" if share < 1e-4 else f"{100 * share:.{2 if share < 0.1 else 1}f} %"
