"""Replicas of the teacher as Ray actors, on one machine or over a cluster; a unit goes to whichever is free.

Ray places the actors and finds out which are lost.  For a lost one another is asked for, which Ray places when there
is room, and what it was at goes to whoever is free next: nothing waits for a node that does not come back.  Units
travel to a replica as tokens and come back as the bytes of a shard.  The process that was started reads all input and
writes all output, so nodes share no file system but the one, or the cache, that the teacher is loaded from.

Every replica has two units in hand, so that it encodes one while it scores the other.
"""

import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from shared.errors import ConfigError, LogitferryError
from teacher_dump.config import RaySettings
from teacher_dump.ledger import EncodedUnit
from teacher_dump.scoring import Engine
from teacher_dump.units import Unit, UnitWork, logger, this_process

UNITS_IN_HAND = 2
DEATHS = 4
"""Of replicas over one unit, which is then what kills them."""
TOLD_EVERY_S = 60.0

Failed = tuple[int | None, Exception, str]
"""The number of a unit, what it ended in, and where."""


class Replica:
    """One loaded teacher; becomes an actor."""

    def __init__(self, work: UnitWork) -> None:
        self._work, self._scoring, self._stack = work, threading.Lock(), ExitStack()
        self._engine: Engine | None = None

    def load(self) -> Failed | None:
        """Load the teacher; the error that this ended in."""
        try:
            self._engine = self._stack.enter_context(self._work.open_engine())
        except Exception as error:
            return None, error, f"on {this_process()}: {traceback.format_exc()}"
        return None

    def encoded(self, unit: Unit) -> EncodedUnit | Failed:
        """The unit's shard, or the error that it ended in."""
        assert self._engine is not None
        try:
            with self._scoring:
                (positions,) = self._engine.score([unit.rows])
            return self._work.encoded(unit, positions, f"a replica on {this_process()}")
        except Exception as error:
            return unit.number, error, f"on {this_process()}: {traceback.format_exc()}"


def encoded_by_replicas(
    units: Generator[Unit], work: UnitWork, settings: RaySettings, on_error: Callable[[int, str, Exception], None]
) -> Iterator[EncodedUnit]:
    """The units, encoded, in the order in which they are finished; `on_error` is told which one stopped the dump.

    Raises:
        ConfigError: Ray is not installed, or has no room for one replica.
        LogitferryError: replicas died over one unit again and again.
        What loading and scoring raise.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--launcher ray, but Ray is not installed", next_step="pip install 'logitferry[ray]'"
        ) from None
    with closing(units), _connected(ray):
        pool = _Pool(ray, work, settings, on_error)
        try:
            yield from pool.encoded(units)
        finally:
            pool.close()


class _Pool:
    """Replicas that load, and units that are at those which have loaded."""

    def __init__(
        self, ray: Any, work: UnitWork, settings: RaySettings, on_error: Callable[[int, str, Exception], None]
    ) -> None:
        self._ray, self._work, self._on_error = ray, work, on_error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = _needs(work, settings, ray.cluster_resources())
        count = settings.replicas or _room_for(needs, nodes)
        logger.info("%d replicas of the teacher, each with %s", count, _spelled(needs))
        self._actor = ray.remote(Replica).options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            resources={name: amount for name, amount in needs.items() if name not in ("CPU", "GPU")} or None,
            max_concurrency=UNITS_IN_HAND,
        )
        self._replicas: list[Any] = []
        self._loading: dict[Any, Any] = {}
        self._running: dict[Any, tuple[Unit, Any]] = {}
        self._free: list[Any] = []
        self._again: deque[Unit] = deque()
        self._deaths: Counter[int | None] = Counter()
        for _ in range(count):
            self._start()

    def encoded(self, units: Iterator[Unit]) -> Iterator[EncodedUnit]:
        told_s = time.monotonic()
        while True:
            while self._free and (unit := self._again.popleft() if self._again else next(units, None)) is not None:
                replica = self._free.pop()
                self._running[replica.encoded.remote(unit)] = unit, replica
            if not self._running and not self._again and (self._free or not self._loading):
                return
            ready, _ = self._ray.wait([*self._running, *self._loading], num_returns=1, timeout=1.0)
            if ready:
                found = self._taken(ready[0])
                if found is not None:
                    yield found
            if self._loading and time.monotonic() - told_s > TOLD_EVERY_S:
                told_s = time.monotonic()
                logger.info("%d replicas wait for room in the cluster, or load the teacher", len(self._loading))

    def close(self) -> None:
        for replica in self._replicas:
            self._ray.kill(replica)

    def _start(self) -> None:
        replica = self._actor.remote(self._work)
        self._replicas.append(replica)
        self._loading[replica.load.remote()] = replica

    def _taken(self, ready: Any) -> EncodedUnit | None:
        """What a replica has finished, if it is a unit."""
        from ray.exceptions import RayActorError

        is_loaded = ready in self._loading
        unit, replica = (None, self._loading.pop(ready)) if is_loaded else self._running.pop(ready)
        try:
            found: EncodedUnit | Failed | None = self._ray.get(ready)
        except RayActorError as error:
            self._lost(unit, replica, error)
            return None
        if isinstance(found, tuple):
            number, error, place = found
            if not isinstance(error, LogitferryError):
                logger.warning("a replica %s", place)
            if number is not None:
                self._on_error(number, place.split(":")[0], error)
            raise error
        if replica in self._replicas:  # and not lost since
            self._free += [replica] * (UNITS_IN_HAND if is_loaded else 1)
        return found

    def _lost(self, unit: Unit | None, replica: Any, error: Exception) -> None:
        """Start another replica, once, and do its units again."""
        number = None if unit is None else unit.number
        self._deaths[number] += 1
        if self._deaths[number] == DEATHS:
            what = "while they loaded the teacher" if unit is None else f"over unit {number}"
            raise LogitferryError(
                f"{DEATHS} replicas died {what}: {str(error).strip().splitlines()[-1]}",
                next_step="look at Ray's logs for why (memory?), then run the same command again",
            ) from error
        if unit is not None:
            self._again.append(unit)
        if replica in self._replicas:
            logger.warning("a replica was lost; another one takes its place where there is room")
            self._replicas.remove(replica)
            self._free = [other for other in self._free if other is not replica]
            self._start()


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """To the cluster that RAY_ADDRESS names, else to one of this machine that ends with this process."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports home otherwise
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        here = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
        ray.init(log_to_driver=True, **here)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would end the process at once
        yield
    finally:
        ray.shutdown()


def _needs(work: UnitWork, settings: RaySettings, cluster: dict[str, float]) -> dict[str, float]:
    """What one replica takes, by Ray's names."""
    gpus, vllm = settings.gpus, work.teacher.vllm
    if gpus is None:  # vLLM's own Ray workers ask for theirs
        gpus = vllm.tensor_parallel * vllm.pipeline_parallel if vllm.backend != "ray" else 0
        gpus = gpus if cluster.get("GPU") and not settings.resources else 0
    return {"CPU": settings.cpus, **({"GPU": gpus} if gpus else {}), **settings.resources}


def _room_for(needs: dict[str, float], nodes: Sequence[dict[str, float]]) -> int:
    """How many replicas fit, each onto one node."""
    wanted = {name: amount for name, amount in needs.items() if amount}
    count = sum(min((int(node.get(name, 0) // amount) for name, amount in wanted.items()), default=1) for node in nodes)
    if count < 1:
        have = "; ".join(_spelled({name: node.get(name, 0) for name in needs}) for node in nodes)
        raise ConfigError(
            f"one replica takes {_spelled(needs)}, and the nodes of the Ray cluster have {have}",
            next_step="set ray.cpus, ray.gpus and ray.resources to what a node has, ray.replicas if more will come",
        )
    return count


def _spelled(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
