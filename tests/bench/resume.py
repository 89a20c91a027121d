"""A training run that is stopped at random steps, beside the same run left alone: the same losses and weights?

    python -m tests.bench.resume train.yaml --folder /tmp/resume [--stops 20] [--seed 0] [--ranks 1 2] [--json FILE]

`train.yaml` is any config of `student-train run`; its `output` is not used.  Variants:

- `alone`: left alone.
- `stopped`: `--stops` times SIGTERM or SIGKILL, as chance has it, at a random step, so that on average they are spread
  over the whole run; then it is left to end.  With several `--ranks` each start takes the next number of them.
- `N ranks` for every number above 1 of `--ranks`: left alone.

Prints for each the seconds, and how many losses and weights differ from those of `alone`, and by how much at most.
With one rank, on a device and in a setting that are deterministic, none may; then the exit code is 1 where one does.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

EXACT = ("step", "loss", "grad_norm", "ce", "kd", "lr", "positions")


def start(config: str, output: Path, ranks: int) -> subprocess.Popen[bytes]:
    log = output.with_suffix(".log").open("ab")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "student_train", "run", config, "--set", f"output={output}"]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def run(config: str, output: Path, ranks: int) -> float:
    begin_s = time.monotonic()
    if code := start(config, output, ranks).wait():
        sys.exit(f"a run ended with {code}; see {output.with_suffix('.log')}")
    return time.monotonic() - begin_s


def entries_of(output: Path) -> list[dict[str, Any]]:
    path = output / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [entry for line in lines if line.endswith("\n") for entry in [json.loads(line)] if "loss" in entry]


def last_step(output: Path) -> int:
    return max((entry["step"] for entry in entries_of(output)), default=0)


def run_stopped(config: str, output: Path, stops: int, num_steps: int, ranks: list[int]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for index, count in enumerate(itertools.islice(itertools.cycle(ranks), stops)):
        number = random.choice([signal.SIGTERM, signal.SIGKILL])
        done = last_step(output)
        target = done + random.randint(1, max(1, 2 * (num_steps - done) // (stops - index + 1)))
        process = start(config, output, count)
        while last_step(output) < target and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            time.sleep(random.uniform(0, 0.05))
            os.killpg(process.pid, number)
        code = process.wait()
        saved = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
        told.append(
            {"signal": number.name, "ranks": count, "after_step": last_step(output), "code": code, "saved": saved[-1:]}
        )
        print(f"  {told[-1]}", flush=True)
        if (output / "model").exists():
            break
    return told


def compared(output: Path, alone: Path) -> dict[str, Any]:
    pairs = list(itertools.zip_longest(entries_of(output), entries_of(alone), fillvalue={}))
    unlike = [(one, two) for one, two in pairs if any(one.get(key) != two.get(key) for key in EXACT)]
    weights, others = (load_file(folder / "model/model.safetensors") for folder in (output, alone))
    return {
        "steps": len(pairs),
        "unlike_steps": len(unlike),
        "first_unlike_step": unlike[0][1].get("step") if unlike else None,
        "most_unlike_loss": max((abs(one["loss"] - two["loss"]) for one, two in unlike if one and two), default=0.0),
        "unlike_weights": sum(not torch.equal(weights[name], others[name]) for name in others),
        "most_unlike_weight": max(float((weights[name] - others[name]).abs().max()) for name in others),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    arguments.folder.mkdir(parents=True)  # not over an earlier one
    alone, stopped = arguments.folder / "alone", arguments.folder / "stopped"
    rows: list[dict[str, Any]] = []

    def tell(variant: str, output: Path, seconds: float, **more: Any) -> None:
        rows.append({"variant": variant, "seconds": round(seconds, 1), **compared(output, alone), **more})
        print(json.dumps(rows[-1]), flush=True)

    tell("alone", alone, run(arguments.config, alone, 1))
    for count in arguments.ranks:
        if count > 1:
            output = arguments.folder / f"{count}-ranks"
            tell(f"{count} ranks", output, run(arguments.config, output, count))
    if arguments.stops:
        begin_s = time.monotonic()
        told = run_stopped(arguments.config, stopped, arguments.stops, last_step(alone), arguments.ranks)
        run(arguments.config, stopped, arguments.ranks[0])
        tell("stopped", stopped, time.monotonic() - begin_s, stops=told)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    exact = arguments.ranks == [1]
    sys.exit(1 if exact and any(row["unlike_steps"] or row["unlike_weights"] for row in rows) else 0)


if __name__ == "__main__":
    main()
