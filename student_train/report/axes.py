"""Scales of charts, and numbers as they stand beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared.amounts import size
from student_train.report.read import Float64

Unit = Literal["nats", "share", "rate", "bytes", "number"]
Scale = Literal["linear", "from zero", "either", "log"]
"""`either` is logarithmic where that shows more."""
LOG_RATIO = 20.0
"""A curve that may be drawn on a logarithmic scale is, where its largest value is so many times its least."""
LEAST_RATIO = 1e-9
"""Of a logarithmic scale: what is less lies at its bottom."""
NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From low to high; of a logarithmic one both are above 0."""

    low: float
    high: float
    is_log: bool = False
    is_binary: bool = False
    """Its round numbers are multiples of powers of 1024."""

    def place(self, value: float) -> float:
        """0 to 1, and beyond where the value is; NaN stays NaN, and so does what a logarithm does not take."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else math.nan
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Three to six round numbers within it."""
        if self.is_log:
            return _log_ticks(self.low, self.high)
        unit = 1024.0 ** math.floor(math.log(self.high, 1024)) if self.is_binary else 1.0
        return [tick * unit for tick in round_numbers(self.low / unit, self.high / unit, 4)]


def fitted(values: Float64, *, scale: Scale, clips: bool = False, is_binary: bool = False) -> Axis:
    """An axis for all values that are numbers; one that clips leaves out the outermost 0.5 %."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    may_be_log = scale == "either" and len(positive) == len(finite) and len(positive) and _spans(positive)
    if len(positive) and (scale == "log" or may_be_log):
        high = float(positive.max())
        low = max(float(positive.min()), high * LEAST_RATIO)
        reach = (high / low) ** 0.06 if high / low > 2 else 1.5
        return Axis(low=low / reach, high=high * reach, is_log=True)
    if not len(finite):
        return Axis(low=0.0, high=1.0)
    low, high = (float(end) for end in (np.quantile(finite, [0.005, 0.995]) if clips else (finite.min(), finite.max())))
    low = min(low, 0.0) if scale == "from zero" else low
    reach = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = 0.0 if 0 <= low < 0.4 * high or low == high >= 0 else low - reach
    return Axis(low=bottom, high=high + reach, is_binary=is_binary)


def _spans(positive: Float64) -> bool:
    return float(positive.max()) > LOG_RATIO * float(positive.min())


def round_numbers(low: float, high: float, count: int) -> list[float]:
    """About so many multiples of a round number between both."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((nice for nice in NICE if nice * power >= raw), 10.0)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = sum(low <= 10.0**power <= high for power in range(first, last + 1))
    multiples: Sequence[int] = (1,) if decades > 3 else (1, 3) if decades > 1 else (1, 2, 5)
    ticks = [number * 10.0**power for power in range(first, last + 1) for number in multiples]
    ticks = [tick for tick in ticks if low <= tick <= high]
    stride = math.ceil(len(ticks) / 6)
    return ticks[::stride] if len(ticks) > 1 else round_numbers(low, high, 3)


def spoken(value: float | None, unit: Unit) -> str:
    """A value for people; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "bytes":
        return size(value)
    if unit == "share":
        return f"{100 * value:.2f} %" if abs(value) < 0.0995 or 0.995 <= value < 1 else f"{100 * value:.1f} %"
    if unit == "rate":
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return short(value, 3 if unit == "number" else 4)


def percent(share: float, places: int = 0) -> str:
    return f"{100 * share:.{places}f} %"


def short(value: float, digits: int = 3) -> str:
    """So many digits, with a proper minus, and without an exponent where a few zeros say it better."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent >= 6 or exponent < -4:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(power)}".replace("-", "−")
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}".replace("-", "−")


def tick_label(value: float, unit: Unit, step: float) -> str:
    """As short as the distance of two ticks allows."""
    if value == 0:
        return "0"
    if unit == "bytes":
        return size(value).replace(".0 ", " ")
    if unit == "share":
        return f"{100 * value:.{_places(100 * step)}f} %"
    return counted(value) if abs(value) >= 1000 else plain(value, step)


def plain(value: float, step: float) -> str:
    if abs(value) < 1e-3:
        mantissa, _, power = f"{value:.2g}".partition("e") if "e" in f"{value:.2g}" else f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}".replace("-", "−")
    return f"{value:.{_places(step)}f}".replace("-", "−")


def _places(step: float) -> int:
    """Digits behind the point that tell multiples of `step` apart."""
    for places in range(7):
        if abs(round(step, places) - step) < 1e-6 * step:
            return places
    return 7


def counted(number: float) -> str:
    """1,500 · 20k · 1.5M"""
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.4g}{letter}"
    raise AssertionError(number)
