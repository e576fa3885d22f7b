"""Plain settings of a worker process and of the pool. No environment, no torch: `server/config.py`
fills them in."""

from typing import Literal

import msgspec


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker needs to know; it travels to the process as JSON."""

    model: str
    """Checkpoint folder."""
    store: str
    """Folder of the adapters, shared by all workers and kept over restarts."""
    reward_encoder: str = ""
    """`module:function` of the reward `semantic`; empty: there is none."""
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    """Threads of torch; one core is left to the API process."""
    num_slots: int = 64
    """Sequences that can hold a recurrent state at once."""
    segment_tokens: int = 256
    """Tokens of one quantum of reading: the bound on how long an answer waits for other work."""
    step_tokens: int = 256
    """Prompt tokens that one engine step prefills at most."""
    adaptation_share: float = 0.5
    """Share of the time that quanta get while answers are decoding; the rest is the answers'."""
    max_running_adaptations: int | None = None
    """None: see `budgets_of`, as for the four other budgets that may be None."""
    max_batched_adaptations: int | None = None
    """Jobs whose quanta of one kind run as one batch, at most."""
    max_quantum_ms: float = 100.0
    """Batches are kept as small as this time asks."""
    adaptation_bytes: int | None = None
    """Memory that running adaptations may use together, by estimate."""
    max_waiting_requests: int = 256
    adapter_device_bytes: int | None = None
    """Capacity of the adapters kept on a GPU; the least recently used move to the host."""
    adapter_host_bytes: int | None = None
    """Capacity of the adapters kept on the host; the least recently used leave first (they stay on
    disk)."""
    host_share: float = 1.0
    """This worker's share of what its machine gives to all; the others may run there, too."""
    idle_states: Literal["exact", "int8"] = "exact"
    """How the host keeps the states of adapters that are not in use; see `idle_states.py`."""
    max_tokens: int = 1 << 20
    """Longest document or prompt."""
    heartbeat_interval_s: float = 1.0
    drain_timeout_s: float = 30.0


class WireKeys(msgspec.Struct, frozen=True, kw_only=True):
    """CurveZMQ keys of one side, in Z85: whose they are, and the other side's public one."""

    server: str
    public: str
    secret: str


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What the pool hands to one process."""

    worker: WorkerConfig
    endpoint: str
    """Address of the pool's socket."""
    identity: str
    """Name and incarnation, so that a dead worker's messages are not taken for its successor's."""
    keys: WireKeys | None = None
    """For an endpoint on the network: what is said there is encrypted."""
    parent_pid: int | None
    """Of the process with which it dies; None where something else ends it then."""
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers run, how long the pool waits for them and how much it queues."""

    worker: WorkerConfig
    num_workers: int = 1
    pool: Literal["local", "ray"] = "local"
    """Whether workers are processes here or actors of a Ray cluster."""
    ray_address: str = "auto"
    """Of the cluster, as `ray.init` takes it."""
    pool_port: int = 0
    """Where workers on other machines reach the pool; 0 takes a free one."""
    startup_timeout_s: float = 120.0
    heartbeat_timeout_s: float = 60.0
    """A worker silent for longer is killed. Must exceed the longest quantum."""
    restart_backoff_s: float = 0.5
    """Wait before the first restart; doubled with each death without a minute's life, up to 30
    s."""
    max_waiting_requests: int = 256
    """Requests that wait for a worker to be ready; more are refused with `queue_full`."""
    worker_window: int = 8
    """Adaptations handed to a worker at a time; the others wait in the pool, where any worker can
    take them."""
    max_attempts: int = 2
    """Times that an adaptation may start before a dying worker fails it."""
    log_level: str = "info"
    """Level of the workers' logs."""
    log_format: Literal["text", "json"] = "text"
    """How the workers write their logs."""
    kernels: str = "auto"
    """`IMPRINT_KERNELS` of the workers."""
