"""Replicas of the teacher as Ray actors, on one machine or over a cluster; a unit goes to whichever is free.

Ray does the placing, starts lost replicas again, elsewhere if need be, and repeats what they were at.  Units travel to
a replica as tokens and come back as the bytes of a shard.  The process that was started reads all input and writes all
output, so nodes share no file system but the one, or the cache, that the teacher is loaded from.

Every replica has two units in hand, so that it encodes one while it scores the other.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from shared.errors import ConfigError, LogitferryError
from teacher_dump.config import RaySettings
from teacher_dump.ledger import EncodedUnit
from teacher_dump.scoring import Engine
from teacher_dump.units import Unit, UnitWork, logger, this_process

UNITS_IN_HAND = 2
RETRIES = 3
"""Of one unit whose replica dies: more often, and the unit is what kills it."""


class Replica:
    """One loaded teacher; becomes an actor."""

    def __init__(self, work: UnitWork) -> None:
        self._work, self._scoring, self._stack = work, threading.Lock(), ExitStack()
        self._engine: Engine | None = None

    def encoded(self, unit: Unit) -> EncodedUnit | tuple[int, Exception, str]:
        """The unit's shard, or its number with the error that it ended in and the place of that."""
        worker = f"a replica on {this_process()}"
        try:
            with self._scoring:
                if self._engine is None:
                    self._engine = self._stack.enter_context(self._work.open_engine())
                (positions,) = self._engine.score([unit.rows])
            return self._work.encoded(unit, positions, worker)
        except Exception as error:
            return unit.number, error, f"on {this_process()}: {traceback.format_exc()}"


def encoded_by_replicas(
    units: Generator[Unit], work: UnitWork, settings: RaySettings, on_error: Callable[[int, str, Exception], None]
) -> Iterator[EncodedUnit]:
    """The units, encoded, in the order in which they are finished; `on_error` is told which one stopped the dump.

    Raises:
        ConfigError: Ray is not installed, or has no room for one replica.
        LogitferryError: a unit's replicas died again and again.
        What scoring raises.
    """
    try:
        import ray
        from ray.exceptions import RayActorError
        from ray.util import ActorPool
    except ImportError:
        raise ConfigError(
            "--launcher ray, but Ray is not installed", next_step="pip install 'logitferry[ray]'"
        ) from None
    with closing(units), _connected(ray), _replicas(ray, work, settings) as replicas:
        pool = ActorPool([replica for replica in replicas for _ in range(UNITS_IN_HAND)])

        def next_finished() -> EncodedUnit:
            try:
                found = pool.get_next_unordered()
            except RayActorError as error:
                raise LogitferryError(
                    f"a replica died {RETRIES + 1} times over one unit: {str(error).strip().splitlines()[-1]}",
                    next_step="look at its log for why (memory?), then run the same command again",
                ) from error
            if isinstance(found, EncodedUnit):
                return found
            number, error, place = found
            if not isinstance(error, LogitferryError):
                logger.warning("unit %d: %s", number, place)
            on_error(number, place.split(":")[0], error)
            raise error

        for unit in units:
            while not pool.has_free():
                yield next_finished()
            pool.submit(lambda replica, each: replica.encoded.remote(each), unit)
        while pool.has_next():
            yield next_finished()


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """To the cluster that RAY_ADDRESS names, else to one of this machine that ends with this process."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports home otherwise
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=True, **({} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would end the process at once
        yield
    finally:
        ray.shutdown()


@contextmanager
def _replicas(ray: Any, work: UnitWork, settings: RaySettings) -> Iterator[list[Any]]:
    needs = _needs(work, settings, ray.cluster_resources())
    count = settings.replicas or _room_for(needs, ray.cluster_resources())
    logger.info("%d replicas of the teacher, each with %s", count, _spelled(needs))
    others = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU")}
    actor = ray.remote(Replica).options(
        num_cpus=needs["CPU"],
        num_gpus=needs.get("GPU", 0),
        resources=others or None,
        max_restarts=-1,
        max_task_retries=RETRIES,
        max_concurrency=UNITS_IN_HAND,
    )
    replicas = [actor.remote(work) for _ in range(count)]
    try:
        yield replicas
    finally:
        for replica in replicas:
            ray.kill(replica)


def _needs(work: UnitWork, settings: RaySettings, cluster: dict[str, float]) -> dict[str, float]:
    """What one replica takes, by Ray's names."""
    gpus, vllm = settings.gpus, work.teacher.vllm
    if gpus is None:  # vLLM's own Ray workers ask for theirs
        gpus = vllm.tensor_parallel * vllm.pipeline_parallel if vllm.backend != "ray" else 0
        gpus = gpus if cluster.get("GPU") and not settings.resources else 0
    return {"CPU": settings.cpus, **({"GPU": gpus} if gpus else {}), **settings.resources}


def _room_for(needs: dict[str, float], cluster: dict[str, float]) -> int:
    count = min((int(cluster.get(name, 0) // amount) for name, amount in needs.items() if amount), default=1)
    if count < 1:
        raise ConfigError(
            f"one replica takes {_spelled(needs)}, and the Ray cluster has "
            + _spelled({name: cluster.get(name, 0) for name in needs}),
            next_step="set ray.cpus, ray.gpus and ray.resources to what a node has, ray.replicas if more will come",
        )
    return count


def _spelled(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
