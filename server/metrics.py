"""Every metric of the server, declared once, in a registry of its own. Knows no ids and no texts.

Workers send observations by name; the API process counts them here, so that one scrape of one
process shows everything.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from imprint import __version__
from imprint.server import buckets
from imprint.server.host import Host
from imprint.server.messages import Heartbeat, Observation, WorkerStats
from imprint.server.pool_interface import WorkerStatus

PREFIX = "imprint_"

ENDINGS = ("succeeded", "rejected", "failed", "cancelled")
"""How a running adaptation ends."""
# Labels under which a metric is shown before its first event, in the order of its declaration.
ZEROS = {
    "admission_rejections_total": (
        "queue_full",
        "draining",
        "requests_per_minute",
        "tokens_per_minute",
        "key_share",
    ),
    "request_deadline_exceeded_total": ("queue", "quantum", "decode"),
    "adaptations_total": (*ENDINGS, "expired"),
    "adaptation_duration_seconds": ENDINGS,
    "gate_verdicts_total": (
        *("adaptation accepted", "adaptation rejected"),
        *("focus accepted", "focus rejected"),
    ),
    "focus_answers_total": ("focus", "passages", "document", "base"),
    "worker_restarts_total": ("killed", "crashed", "hung", "startup_timeout", "exited"),
    "engine_errors_total": ("intake", "begin", "prefill", "decode", "quantum", "focus", "evict"),
    "oom_total": ("read true", "read false", "prefill false", "decode false", "focus false"),
    "adapter_hits_total": ("device", "host", "disk"),
    "adapter_evictions_total": ("device", "host"),
}


class Metrics:
    """One instance per app; tests and several apps in a process never share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._by_name: dict[str, Any] = {}
        self._restarts_seen: dict[tuple[str, str], int] = {}
        self._tiers: set[str] = set()
        self._declare_http()
        self._declare_requests()
        self._declare_adaptations()
        self._declare_engine()
        self._declare_workers()
        self._declare_host()
        ProcessCollector(namespace="imprint", registry=self.registry)
        self._show_zeros()
        self.build_info.labels(version=__version__).set(1)

    def _add(self, kind: type[Any], name: str, text: str, labels: str = "", **options: Any) -> Any:
        metric = kind(f"{PREFIX}{name}", text, labels.split(), registry=self.registry, **options)
        self._by_name[name] = metric
        return metric

    def _declare_http(self) -> None:
        add = self._add
        self.build_info = add(Gauge, "build_info", "Version of the server.", "version")
        self.model_info = add(Gauge, "model_info", "The base model.", "model device dtype")
        self.http_requests = add(
            Counter, "http_requests_total", "HTTP requests.", "method route status"
        )
        self.http_duration = add(
            Histogram,
            "http_request_duration_seconds",
            "From the request's first byte to the response's last.",
            "method route",
            buckets=buckets.LATENCY,
        )

    def _declare_requests(self) -> None:
        add = self._add
        self.requests = add(
            Counter, "requests_total", "Ended answers and completions.", "kind outcome"
        )
        self.running = add(Gauge, "requests_running", "Requests and jobs being worked on.", "kind")
        self.waiting = add(Gauge, "requests_waiting", "Requests and jobs not yet begun.", "kind")
        add(
            Histogram,
            "request_queue_time_seconds",
            "From a worker's receipt to the first work.",
            "kind",
            buckets=buckets.LATENCY,
        )
        self.rejections = add(
            Counter, "admission_rejections_total", "Work refused at the door.", "reason"
        )
        self.deadlines = add(
            Counter,
            "request_deadline_exceeded_total",
            "Work ended by its deadline, by where that struck: queue, quantum, decode.",
            "phase",
        )
        self.ttft = add(
            Histogram,
            "time_to_first_token_seconds",
            "From an adapted document's questions to a sequence's first token, focus included.",
            buckets=buckets.TTFT,
        )
        self.inter_token = add(
            Histogram,
            "inter_token_latency_seconds",
            "Between two tokens of a sequence.",
            buckets=buckets.INTER_TOKEN,
        )
        self.prompt_tokens = add(
            Counter, "prompt_tokens_total", "Prompt tokens read, documents not counted."
        )
        self.generation_tokens = add(Counter, "generation_tokens_total", "Tokens generated.")

    def _declare_adaptations(self) -> None:
        add = self._add
        self.adaptations = add(Counter, "adaptations_total", "Ended adaptations.", "outcome")
        self.adaptation_duration = add(
            Histogram,
            "adaptation_duration_seconds",
            "From the first quantum to the end.",
            "outcome",
            buckets=buckets.LATENCY,
        )
        self.phase_duration = add(
            Histogram,
            "adaptation_phase_duration_seconds",
            "Time from one phase of an adaptation to the next.",
            "phase",
            buckets=buckets.LATENCY,
        )
        self.steps = add(Counter, "adaptation_steps_total", "Optimisation steps.")
        self.rollout_tokens = add(
            Counter, "adaptation_rollout_tokens_total", "Tokens sampled in rollouts."
        )
        add(
            Counter,
            "adaptation_checkpoints_total",
            "Checkpoints of running adaptations: written, unwritten, resumed, refused.",
            "outcome",
        )
        histograms = (
            ("document_tokens", "Length of adapted documents.", buckets.TOKEN),
            ("reward", "Mean reward of a step.", buckets.REWARD),
            (
                "entropy_nats",
                "Mean entropy of a document's next-token distributions.",
                buckets.NATS,
            ),
            ("grad_norm", "Gradient norm of a step, before clipping.", buckets.NORM),
            ("probe_gain_nats", "Recall probe: loss of the base minus adapted.", buckets.GAIN),
            ("neutral_rise_nats", "Loss on neutral text: adapted minus base.", buckets.RISE),
        )
        for name, text, edges in histograms:
            add(Histogram, f"adaptation_{name}", text, buckets=edges)

        self.verdicts = add(
            Counter,
            "gate_verdicts_total",
            "What the gate said of documents (adaptation) and of questions (focus).",
            "kind outcome",
        )
        add(
            Counter,
            "focus_answers_total",
            "Questions answered after a focus, by what they are answered from.",
            "way",
        )

    def _declare_engine(self) -> None:
        add = self._add
        add(Counter, "engine_steps_total", "Engine steps that did work.")
        add(
            Histogram,
            "engine_step_duration_seconds",
            "One engine step: decode, prefill and quanta.",
            buckets=buckets.STEP,
        )
        add(
            Counter,
            "broken_steps_total",
            "Decoding steps that broke off: their slots are read again.",
        )
        add(
            Counter,
            "engine_time_seconds_total",
            "Where engines spend their time: model (sampling included), slots (states copied in "
            "and out), quantum, disk (idle until an adapter is read or written), own (all else, "
            "in Python).",
            "part",
        )
        add(Histogram, "engine_batch_size", "Sequences per decode.", buckets=buckets.BATCH)
        add(Counter, "engine_errors_total", "Errors caught at the engine's edge.", "phase")
        add(
            Histogram,
            "quantum_duration_seconds",
            "One unit of adaptation work: what an answer may wait for.",
            "phase",
            buckets=buckets.STEP,
        )
        self.longest_quantum = add(
            Gauge,
            "longest_quantum_seconds",
            "The longest quantum of the last five to ten seconds, of any worker.",
        )
        add(Histogram, "quantum_batch_size", "Jobs per quantum.", buckets=buckets.BATCH)
        self.last_step = add(
            Gauge, "engine_last_step_timestamp_seconds", "End of the last step that did work."
        )
        add(Counter, "oom_total", "Out-of-memory errors.", "phase recovered")
        add(Counter, "adapter_hits_total", "Adapters found: device, host, disk.", "tier")
        add(Counter, "adapter_misses_total", "Adapters not found in any tier.")
        add(Counter, "adapter_evictions_total", "Adapters moved down a tier for space.", "tier")

    def _declare_workers(self) -> None:
        add = self._add
        self.adapters = add(Gauge, "adapters", "Adapters held.", "tier")
        self.adapter_bytes = add(Gauge, "adapter_bytes", "Bytes of the adapters held.", "tier")
        self.adapter_capacity = add(
            Gauge, "adapter_capacity_bytes", "Bytes a tier may hold.", "tier"
        )
        self.slots = add(Gauge, "slots", "Slots of recurrent state.", "state")
        self.worker_up = add(
            Gauge, "worker_up", "1 when ready and its heartbeat is young.", "worker"
        )
        self.worker_restarts = add(Counter, "worker_restarts_total", "Workers replaced.", "reason")
        self.heartbeat_age = add(
            Gauge, "worker_heartbeat_age_seconds", "Age of the last heartbeat.", "worker"
        )
        self.worker_adaptations = add(
            Gauge,
            "worker_adaptations",
            "A worker's adaptations: running, waiting.",
            "worker state",
        )
        self.worker_requests = add(
            Gauge, "worker_requests", "A worker's requests: running, waiting.", "worker state"
        )
        self.worker_memory = add(
            Gauge, "worker_memory_bytes", "Resident memory of a worker process.", "worker"
        )
        self.gpu_memory = add(
            Gauge,
            "gpu_memory_bytes",
            "Memory of a worker's GPU: allocated, reserved, free, total. None on a CPU.",
            "worker kind",
        )

    def _declare_host(self) -> None:
        add = self._add
        self.memory_limit = add(
            Gauge, "memory_limit_bytes", "The container's limit, or the machine's memory."
        )
        self.filesystem = add(
            Gauge,
            "data_filesystem_bytes",
            "File system of the data folder: size, available. 0 while the folder is gone.",
            "kind",
        )

    def _show_zeros(self) -> None:
        """What is watched exists before its first event: an increase needs a zero."""
        for name, sets in ZEROS.items():
            for values in sets:
                self._by_name[name].labels(*values.split())

    @property
    def declared(self) -> Collection[str]:
        """Every metric's name without the prefix."""
        return self._by_name.keys()

    @property
    def families(self) -> Mapping[str, Any]:
        """Every metric by its name without the prefix, in the order of declaration."""
        return self._by_name

    def observe(self, observation: Observation) -> None:
        """Count a worker's observation; raises KeyError for a name that is not declared here."""
        metric = self._by_name[observation.name]
        if observation.labels:
            metric = metric.labels(**observation.labels)
        if isinstance(metric, Counter):
            metric.inc(observation.value)
        elif isinstance(metric, Histogram):
            metric.observe(observation.value)
        else:
            metric.set(observation.value)

    def observe_step(self, data: dict[str, Any]) -> None:
        """Count one optimisation step from the numbers of its event."""
        self.steps.inc()
        for key, name in (
            ("reward_mean", "adaptation_reward"),
            ("grad_norm", "adaptation_grad_norm"),
        ):
            value = data.get(key)
            if isinstance(value, int | float):
                self._by_name[name].observe(value)

    def observe_result(
        self, result: dict[str, Any], usage: dict[str, Any], num_tokens: int
    ) -> None:
        """Count a finished adaptation's totals."""
        self._by_name["adaptation_document_tokens"].observe(num_tokens)
        self.rollout_tokens.inc(usage.get("rollout_tokens", 0))
        before, after = result.get("probe_before"), result.get("probe_after")
        if isinstance(before, int | float) and isinstance(after, int | float):
            self._by_name["adaptation_probe_gain_nats"].observe(before - after)
        rise = result.get("neutral_rise_nats")
        if isinstance(rise, int | float):
            self._by_name["adaptation_neutral_rise_nats"].observe(rise)

    def observe_host(self, host: Host) -> None:
        """Show what the machine still has."""
        self.memory_limit.set(host.memory_limit)
        self.filesystem.labels(kind="size").set(host.filesystem_size)
        self.filesystem.labels(kind="available").set(host.filesystem_available)

    def render(self, workers: Iterable[WorkerStatus]) -> bytes:
        """The exposition text, with the workers' gauges as of now."""
        workers = list(workers)
        for worker in workers:
            self.worker_up.labels(worker=worker.name).set(worker.up)
            self.heartbeat_age.labels(worker=worker.name).set(worker.heartbeat_age_s)
            for reason, total in worker.restarts.items():
                seen = self._restarts_seen.get((worker.name, reason), 0)
                self.worker_restarts.labels(reason=reason).inc(max(0, total - seen))
                self._restarts_seen[worker.name, reason] = total
            self._show_queue(worker)
            if worker.stats is not None:
                self.worker_memory.labels(worker=worker.name).set(worker.stats.stats.memory_bytes)
                for kind, nbytes in worker.stats.stats.device_bytes.items():
                    self.gpu_memory.labels(worker=worker.name, kind=kind).set(nbytes)
        self._sum_stats([worker.stats for worker in workers if worker.up and worker.stats])
        return generate_latest(self.registry)

    def _show_queue(self, worker: WorkerStatus) -> None:
        """What a worker has, by its last heartbeat; nothing, where it is not there."""
        stats = WorkerStats() if worker.stats is None else worker.stats.stats
        for metric, state, count in (
            (self.worker_adaptations, "running", stats.adaptations_running),
            (self.worker_adaptations, "waiting", stats.adaptations_waiting),
            (self.worker_requests, "running", stats.requests_running),
            (self.worker_requests, "waiting", stats.requests_waiting),
        ):
            metric.labels(worker=worker.name, state=state).set(count)

    def _sum_stats(self, beats: list[Heartbeat]) -> None:
        stats = [beat.stats for beat in beats]
        self.slots.labels(state="used").set(sum(s.slots_used for s in stats))
        self.slots.labels(state="free").set(sum(s.slots_free for s in stats))
        self.longest_quantum.set(max((s.longest_quantum_s for s in stats), default=0.0))
        self.last_step.set(max((s.engine_last_step_time for s in stats), default=0.0))
        gauges = (
            (self.adapters, "adapters"),
            (self.adapter_bytes, "adapter_bytes"),
            (self.adapter_capacity, "adapter_capacity_bytes"),
        )
        for gauge, field in gauges:
            tiers = [getattr(s, field) for s in stats]
            # The disk tier is one folder that all workers share: not a sum.
            # A tier that was seen once is shown for ever, so that it can be seen to be empty.
            self._tiers.update(name for counts in tiers for name in counts)
            for tier in sorted(self._tiers):
                values = [counts.get(tier, 0) for counts in tiers]
                gauge.labels(tier=tier).set(max(values) if tier == "disk" else sum(values))
