"""What an engine tells of itself: values as they are measured, and the gauges of a heartbeat.

Knows the parts that it counts; decides nothing. Observations leave in batches: with a heartbeat, or
when many are held.
"""

import time

import torch

from imprint.server.adapter_cache import AdapterCache
from imprint.server.messages import Observation, Observations, WorkerStats
from imprint.server.scheduler import Scheduler
from imprint.server.slot_states import SlotStates
from imprint.server.step_times import StepTimes
from imprint.server.tasks import Emit
from imprint.server.worker_memory import device_bytes, resident_bytes

MAX_HELD_OBSERVATIONS = 256


class EngineReport:
    """Measurements that have not been told yet, and how the last steps went."""

    def __init__(self, emit: Emit, times: StepTimes, device: torch.device) -> None:
        self._emit = emit
        self._times = times
        self._device = device
        self._observed: list[Observation] = []
        self._num_steps = 0
        self._last_duration_s = 0.0
        self._last_time = 0.0
        self._batch_size = 0

    def observe(self, observation: Observation) -> None:
        """One value for a metric of the API process."""
        self._observed.append(observation)
        if len(self._observed) >= MAX_HELD_OBSERVATIONS:
            self.flush()

    def flush(self) -> None:
        """Send what has been measured since the last time."""
        self._observed += self._times.take()
        if self._observed:
            self._emit(Observations(values=self._observed))
            self._observed = []

    def step(self, duration_s: float, batch_size: int) -> None:
        """A step has done work, and decoded so many sequences."""
        self._last_duration_s = duration_s
        self._last_time = time.time()
        self._num_steps += 1
        self._batch_size = batch_size
        self.observe(Observation(name="engine_steps_total", value=1.0))
        self.observe(Observation(name="engine_step_duration_seconds", value=duration_s))
        if batch_size:
            self.observe(Observation(name="engine_batch_size", value=batch_size))

    def stats(self, scheduler: Scheduler, slots: SlotStates, cache: AdapterCache) -> WorkerStats:
        """The gauges of this moment."""
        counts = scheduler.counts()
        adapters, adapter_bytes = cache.sizes()
        finish_s, backlog_s = scheduler.finish_estimates()
        writing = cache.writing  # these adaptations have an end left, and no work
        return WorkerStats(
            adaptations_waiting=counts.adaptations_waiting,
            adaptations_running=counts.adaptations_running + len(writing),
            requests_waiting=counts.requests_waiting,
            requests_running=counts.requests_running,
            adaptation_finish_s={**finish_s, **dict.fromkeys(writing, 0.0)},
            backlog_s=backlog_s,
            adaptation_bytes=counts.adaptation_bytes,
            adaptation_capacity_bytes=scheduler.config.adaptation_bytes,
            slots_used=slots.table.num_used,
            slots_free=slots.table.num_free,
            adapters=adapters,
            adapter_bytes=adapter_bytes,
            adapter_capacity_bytes=cache.capacities(),
            engine_steps=self._num_steps,
            engine_last_step_duration_s=self._last_duration_s,
            longest_quantum_s=self._times.longest_quantum_s,
            engine_last_step_time=self._last_time,
            batch_size=self._batch_size,
            memory_bytes=resident_bytes(),
            device_bytes=device_bytes(self._device),
        )
