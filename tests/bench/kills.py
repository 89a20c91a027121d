"""A dump that is killed at random moments, beside the same dump left alone: the same dataset, and what the kills cost.

    python -m tests.bench.kills dump.yaml --folder /tmp/kills [--kills 10] [--seed 0] [--workers 1] [--json FILE]

`dump.yaml` is any config of `teacher-dump run`; its `output` is not used.  Variants:

- `alone`: one worker, left alone.
- `killed`: `--kills` times all its workers get SIGKILL at a random moment, at which the dump would on average be so
  many parts further; then it is left to end.
- `together` (with `--workers` above 1): as many workers at once, left alone.

Prints for each the seconds until it is sealed, and at each kill the units that were done.  Ends with exit code 1 where
the datasets differ in any byte: engines that are not deterministic will.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shared.dataset import LogitDataset
from shared.verification import verify


def start(config: str, output: Path, workers: int) -> list[subprocess.Popen[bytes]]:
    log = output.with_suffix(".log").open("ab")
    command = [sys.executable, "-m", "teacher_dump", "run", config, "--set", f"output={output}"]
    shares = [[f"--worker={index}/{workers}"] for index in range(workers)] if workers > 1 else [[]]
    return [subprocess.Popen([*command, *share], stdout=log, stderr=log, start_new_session=True) for share in shares]


def run(config: str, output: Path, workers: int = 1) -> float:
    begin_s = time.monotonic()
    codes = [process.wait() for process in start(config, output, workers)]
    if any(codes):
        sys.exit(f"a run ended with {codes}; see {output.with_suffix('.log')}")
    return time.monotonic() - begin_s


def run_killed(
    config: str, output: Path, kills: int, whole_s: float, workers: int
) -> tuple[float, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    total_s = 0.0
    for _ in range(kills):
        wait_s = random.uniform(0, 2 * whole_s / (kills + 1))
        begin_s = time.monotonic()
        processes = start(config, output, workers)
        while time.monotonic() - begin_s < wait_s and any(process.poll() is None for process in processes):
            time.sleep(0.01)
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        total_s += time.monotonic() - begin_s
        done = len(list((output / ".logitferry/units").glob("*.json")))
        told.append({"after_s": round(wait_s, 2), "units_done": done, "sealed": (output / "manifest.json").is_file()})
        print(f"  killed after {wait_s:.1f} s, {done} units done", flush=True)
    return total_s + run(config, output, workers), told


def files_of(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".writing-")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    arguments.folder.mkdir(parents=True)  # not over an earlier one
    rows: list[dict[str, Any]] = []

    def tell(variant: str, seconds: float, **more: Any) -> None:
        dataset = LogitDataset.open(arguments.folder / variant)
        faults = verify(dataset, deep=True).faults
        same = files_of(dataset.folder) == files_of(arguments.folder / "alone")
        ids = [name for names in dataset.sample_ids() for name in names]
        rows.append(
            {"variant": variant, "seconds": seconds, "rows": len(ids), "positions": dataset.manifest.total("positions"),
             "shards": len(dataset.manifest.shards), "identity": dataset.identity(), "faults": len(faults),
             "same_bytes_as_alone": same, **more}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)

    whole_s = run(arguments.config, arguments.folder / "alone")
    tell("alone", whole_s)
    if arguments.workers > 1:
        seconds = run(arguments.config, arguments.folder / "together", arguments.workers)
        tell("together", seconds, workers=arguments.workers, of_alone=seconds / whole_s)
    if arguments.kills:
        output = arguments.folder / "killed"
        seconds, told = run_killed(arguments.config, output, arguments.kills, whole_s, arguments.workers)
        tell("killed", seconds, workers=arguments.workers, of_alone=seconds / whole_s, kills=told)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    sys.exit(0 if all(row["same_bytes_as_alone"] and not row["faults"] for row in rows) else 1)


if __name__ == "__main__":
    main()
