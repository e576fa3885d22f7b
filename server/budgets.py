"""How much a worker takes on at once: measured constants on a CPU, shares of free memory on a GPU,
and of the host's memory for adapters that wait there.

A setting that is given always holds. A pure function of numbers; no torch, nothing is measured
here. Limit: the shares are chosen, not tuned, on no GPU yet.
"""

from dataclasses import dataclass

from imprint.server.scheduler import SchedulerConfig
from imprint.server.worker_config import WorkerConfig

CPU_ADAPTATION_BYTES = 4 << 30
CPU_ADAPTATIONS = 8
"""More make a quantum too long; what eight together save is in BENCHMARKS.md."""
GPU_USABLE = 0.8
"""Share of the free memory that is given away: the rest is for decoding, prefill and the
allocator's losses."""
GPU_ADAPTERS = 0.25
"""Share of that for adapters at hand; the rest is for studying."""
HOST_ADAPTERS = 1 / 8
"""Share of a machine's memory for the adapters that its workers keep ready."""
MOST_ADAPTATIONS = 64
"""More in one batch fill no GPU better, and make each of them wait."""
TYPICAL_TOKENS = 4096
"""Length of the document whose study, in the default preset, `job_bytes` is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bounds of one worker; see `WorkerConfig` for their meaning."""

    adaptation_bytes: int
    adapter_device_bytes: int
    """0 on a CPU, which has no such tier."""
    adapter_host_bytes: int
    max_running_adaptations: int
    max_batched_adaptations: int


def budgets_of(
    config: WorkerConfig, *, free_bytes: int | None, host_bytes: int, job_bytes: int
) -> Budgets:
    """The budgets of a worker whose model and slots are in place.

    `free_bytes` are what its GPU has left; None on a CPU. `host_bytes` is all the memory of its
    machine. `job_bytes` is what a typical study needs, by the estimate that admits it.
    """
    kept_bytes = config.adapter_host_bytes
    if kept_bytes is None:
        kept_bytes = int(HOST_ADAPTERS * config.host_share * host_bytes)
    adaptation_bytes, device_bytes = config.adaptation_bytes, config.adapter_device_bytes
    if free_bytes is None:
        adaptation_bytes = adaptation_bytes or CPU_ADAPTATION_BYTES
        device_bytes, together = 0, CPU_ADAPTATIONS
    else:
        room = int(GPU_USABLE * free_bytes)
        if device_bytes is None:
            left = room - (adaptation_bytes or 0)
            device_bytes = max(0, min(left, int(GPU_ADAPTERS * room)))
        adaptation_bytes = adaptation_bytes or max(1, room - device_bytes)
        together = max(1, min(adaptation_bytes // max(job_bytes, 1), MOST_ADAPTATIONS))
    return Budgets(
        adaptation_bytes=adaptation_bytes,
        adapter_device_bytes=device_bytes,
        adapter_host_bytes=kept_bytes,
        max_running_adaptations=config.max_running_adaptations or together,
        max_batched_adaptations=config.max_batched_adaptations or together,
    )


def scheduler_config(config: WorkerConfig, budgets: Budgets) -> SchedulerConfig:
    """The bounds that the scheduler keeps."""
    return SchedulerConfig(
        num_slots=config.num_slots,
        step_tokens=config.step_tokens,
        adaptation_share=config.adaptation_share,
        max_running_adaptations=budgets.max_running_adaptations,
        max_batched_adaptations=budgets.max_batched_adaptations,
        max_quantum_s=config.max_quantum_ms / 1000,
        adaptation_bytes=budgets.adaptation_bytes,
        max_waiting_requests=config.max_waiting_requests,
    )
