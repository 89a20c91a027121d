"""What eval.json holds, shown to people and told to programs; needs no torch."""

from typing import Any

FULL_TEXTS = ("worst", "examples")


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The result without settings and full texts, for programs that look for a number."""
    parts = {name: result[name] for name in ("evaluation", "exact_match")}
    short = {
        name: part and {key: value for key, value in part.items() if key not in FULL_TEXTS}
        for name, part in parts.items()
    }
    return {**short, "lm_eval": result["lm_eval"], "versions": result["versions"]}


def describe(result: dict[str, Any]) -> list[str]:
    """A few lines for people."""
    lines = []
    if evaluation := result["evaluation"]:
        lines += _table(f"{evaluation['rows']:,} rows", _means(evaluation["means"]))
    if matched := result["exact_match"]:
        share, error = 100 * matched["share"], 100 * matched["standard_error"]
        lines += _table(
            f"exact match: {share:.1f} % ± {error:.1f}, {matched['right']:,} of {matched['checkable']:,}",
            {
                "without a checkable answer": _count(matched["uncheckable"]),
                "without a prompt": _count(matched["without_prompt"]),
                "cut at max_new_tokens": _count(matched["cut"]),
                "shortened by the context": _count(matched["shortened"]),
                "tokens of a reply": f"{matched['mean_reply_tokens']:.1f}",
                "tokens per second": f"{matched['tokens_per_s']:,.0f}",
            },
        )
    for name, task in (result["lm_eval"] or {}).items():
        metrics = task["metrics"].items()
        lines += _table(f"lm-eval: {name}", {metric: _with_error(**found) for metric, found in metrics})
    return lines


def _means(means: dict[str, Any]) -> dict[str, str | None]:
    def nats(name: str) -> str | None:
        return None if means[name] is None else f"{means[name]:.4f} nats"

    def share(name: str) -> str | None:
        return None if means[name] is None else f"{100 * means[name]:.1f} %"

    return {
        "supervised tokens": f"{means['positions']:,}",
        "cross-entropy": nats("ce"),
        "accuracy": share("accuracy"),
        "calibration error": share("ece"),
        "KL to the teacher": nats("kl"),
        "agreement with the teacher": share("agreement"),
        "entropy, student": nats("student_entropy"),
        "entropy, teacher": nats("teacher_entropy"),
    }


def _count(number: int) -> str | None:
    return f"{number:,}" if number else None


def _with_error(value: float | None, stderr: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _table(title: str, entries: dict[str, str | None]) -> list[str]:
    """Under a title, those entries that there are."""
    return [title, *(f"  {name:<28}{value}" for name, value in entries.items() if value is not None)]
