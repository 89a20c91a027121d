"""Static workers: each takes a fixed share of the units, told by its number alone, without any coordinator."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import ConfigError

ENVIRONMENTS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Of torchrun and of srun: index and number of processes."""
ARRAY_SIZE = "SLURM_ARRAY_TASK_COUNT"
EXAMPLE = "for example --worker 0/4, the first of four"

logger = logging.getLogger("logitferry")


@dataclass(frozen=True)
class Share:
    """The share of worker `index`, counted from 0, out of `count`."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, unit: int) -> bool:
        """Is that unit this worker's?

        Of every `count` consecutive units each worker has one, which one varies, so that what a lost worker leaves
        is spread over all workers of a next run, whatever their number.
        """
        block = (unit // self.count).to_bytes(8, "big")
        shift = int.from_bytes(hashlib.blake2b(block, digest_size=8).digest(), "big")
        return (unit + shift) % self.count == self.index

    @staticmethod
    def parse(text: str) -> "Share":
        """Raises ConfigError unless it is i/n with 0 <= i < n."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None:
            raise ConfigError(f"--worker {text}: expected i/n", next_step=EXAMPLE)
        return _checked(int(match[1]), int(match[2]), f"--worker {text}")

    @staticmethod
    def of_environment(environment: Mapping[str, str]) -> tuple["Share", str | None]:
        """The share that torchrun or srun has given to this process, and the variables that say so.

        Raises:
            ConfigError: they are no numbers.
        """
        for names in ENVIRONMENTS:
            values = [environment.get(name) for name in names]
            if None in values:
                continue
            said = " and ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            index, count = (int(value) if value and value.isdecimal() else -1 for value in values)
            return _checked(index, count, said), said
        return Share(), None


def share_of_process(given: Share | None) -> Share:
    """The share that was given, or that this process has by its environment.

    Raises:
        ConfigError: what the environment says makes no sense.
    """
    if given is not None:
        return given
    share, said = Share.of_environment(os.environ)
    if said is not None:
        logger.info("worker %s, by %s", share, said)
    if share.count == 1 and (hint := array_hint(os.environ)) is not None:
        logger.warning(hint)
    return share


def array_hint(environment: Mapping[str, str]) -> str | None:
    """A warning for tasks of an array job that are about to do the same work."""
    if int(environment.get(ARRAY_SIZE) or 1) < 2:
        return None
    return (
        f"this is one of {environment[ARRAY_SIZE]} tasks of an array job and takes all units; "
        '--worker "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" shares them out'
    )


def _checked(index: int, count: int, said: str) -> Share:
    if not 0 <= index < count:
        raise ConfigError(f"{said}: workers are counted from 0 and are fewer than n", next_step=EXAMPLE)
    return Share(index, count)
