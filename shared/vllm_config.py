"""The config of vLLM, with which either phase may run a model; apart from `shared.vllm_start`, which looks for it."""

from typing import Any, Literal

from pydantic import Field, field_validator

from shared.config import Settings
from shared.manifest import PlainSettings


class VllmSettings(Settings):
    """How vLLM runs one replica of a model."""

    tensor_parallel: int = Field(default=1, ge=1)
    """Devices that share every layer."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Groups of devices that have some of the layers each."""
    expert_parallel: bool = False
    """A mixture's experts lie whole on one device each, instead of cut over all of them."""
    backend: Literal["auto", "mp", "ray"] = "auto"
    """What starts the workers: processes of this machine, or Ray, which reaches over several."""
    quantization: str | None = None
    """A method of vLLM's, such as fp8; null takes what the checkpoint says."""
    memory_fraction: float = Field(default=0.9, gt=0.0, le=1.0)
    """Of a device's memory, for weights, cache and logits together."""
    max_rows: int = Field(default=256, ge=1)
    """Rows of one forward pass at most."""
    enforce_eager: bool = False
    """No captured graphs and no compilation: slower, starts at once."""
    engine_args: PlainSettings = {}
    """Any further argument of vllm.EngineArgs by its name, such as load_format, nnodes, kv_cache_memory_bytes."""

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(arguments.keys() & OUR_ENGINE_ARGS):
            raise ValueError(f"{taken[0]} is set by other settings, or has to be what it is")
        return arguments

    def of_values(self) -> dict[str, Any]:
        """What values may depend on: quantization, and arguments that are not known to be about resources alone."""
        arguments = {name: value for name, value in self.engine_args.items() if name not in OF_RESOURCES}
        return arguments if self.quantization is None else arguments | {"quantization": self.quantization}


OF_RESOURCES = {
    "block_size", "cpu_offload_gb", "disable_custom_all_reduce", "download_dir", "kv_cache_memory_bytes",
    "long_prefill_token_threshold", "master_addr", "master_port", "max_logprobs", "max_num_partial_prefills", "nnodes",
    "node_rank", "num_gpu_blocks_override", "ray_workers_use_nsight", "scheduler_reserve_full_isl", "swap_space",
}  # fmt: skip
"""Arguments of vLLM that change no value."""
OUR_ENGINE_ARGS = {
    "model", "revision", "tokenizer", "trust_remote_code", "dtype", "max_model_len", "max_num_batched_tokens",
    "max_num_seqs", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "quantization",
    "distributed_executor_backend", "gpu_memory_utilization", "enforce_eager", "enable_prefix_caching", "worker_cls",
    "worker_extension_cls", "skip_tokenizer_init", "speculative_config", "spec_method", "spec_model", "spec_tokens",
    "runner", "convert", "data_parallel_size", "disable_log_stats", "logprobs_mode",
}  # fmt: skip
