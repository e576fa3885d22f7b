"""Settings of the server: each is a flag, an `IMPRINT_*` variable and a line of the documentation.

Reads the environment and nothing else; imports no torch. The order is: flag, variable, default.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from imprint.adapters import faults
from imprint.server.keys import KeyRing
from imprint.server.worker_config import PoolConfig, WorkerConfig

ENV_PREFIX = "IMPRINT_"
KEY_VARIABLE = "IMPRINT_API_KEY"
"""The key that the command line sends to a running server; no setting of the server."""
SECRETS = frozenset({"api_keys"})
"""Settings whose values are never shown."""
_ORIGIN = re.compile(r"https?://[a-z0-9.\[\]:-]+")
BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "models" / "pretrained" / "imprint-tiny"


class Settings(BaseSettings):
    """Everything an operator can set. Checked once, at start; immutable afterwards."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,  # one of them holds keys
    )

    host: str = "127.0.0.1"
    """Address to listen on. Beyond the loopback, keys are needed, or allow_keyless."""
    port: int = Field(default=8765, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    model: Path = BUNDLED_MODEL
    """Checkpoint folder (config.json, safetensors, tokenizer.json), or an id of the Hugging Face
    Hub."""
    revision: str = ""
    """Commit, tag or branch of a hub model; empty takes its branch main."""
    model_name: str = ""
    """Name of the model in the API; empty takes the checkpoint folder's name, or the hub id."""
    question_template: Path | None = None
    """File with a Jinja template for questions about a document; none takes the checkpoint's."""
    data_dir: Path = Path("imprint-data")
    """Folder of the journal and the adapters. Holds the text of documents: protect it like them."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged. Document text never is."""
    log_format: Literal["text", "json"] = "text"
    """Log lines for people, or one JSON object a line with the ids of requests and jobs."""
    otlp_endpoint: str = ""
    """Base address of an OpenTelemetry collector (OTLP over HTTP) that gets traces; empty takes
    OTEL_EXPORTER_OTLP_ENDPOINT, and where that is not set either, nothing is traced."""

    api_keys: Annotated[KeyRing | None, NoDecode] = None
    """API keys, each NAME:KEY or NAME:sha256:HEX, with commas between. What a key makes belongs
    to its name. Other processes can read a flag: prefer variable and file."""
    api_keys_file: Path | None = None
    """File with API keys, one a line, written as in api_keys; they are added to those."""
    allow_keyless: bool = False
    """Listen beyond the loopback without keys: something else keeps strangers out."""
    metrics_need_key: bool = False
    """Ask for a key at /metrics too."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins, such as https://example.org, whose pages may ask; with commas between. None may by
    default."""

    reward_encoder: str = ""
    """Encoder of the reward `semantic`, as module:function: it takes a list of texts and gives a
    vector for each. Python code that each worker imports; none by default."""

    device: str = "cpu"
    """Device of the workers, as torch names it; `cuda` is the first GPU, or cuda:0, cuda:1 and so
    on for several workers."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the base weights; recurrent states and deltas stay float32."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Kernels of the worker: auto takes Triton's where they run, reference plain torch, and triton
    stops with a reason where Triton cannot run."""
    threads: int = Field(default=1, ge=1)
    """Threads of torch per worker; leave one core to the API process."""
    workers: int = Field(default=1, ge=1)
    """Worker processes, each with a copy of the model; with device `cuda`, one GPU each."""

    pool: Literal["local", "ray"] = "local"
    """Where workers run: local, as processes beside the API process, or ray, as actors of a Ray
    cluster, on any of its machines (`pip install 'imprint[ray]'`)."""
    ray_address: str = "auto"
    """The Ray cluster: auto takes the one that this machine belongs to, HOST:PORT another, and
    local starts one on this machine."""
    pool_port: int = Field(default=0, ge=0, le=65535)
    """Port where the workers of a Ray cluster reach this process, encrypted; 0 takes a free
    one."""

    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    """Longest request body; a longer one is refused with 413 before it is read whole."""
    max_head_bytes: int = Field(default=16 * 2**10, ge=1024)
    """Longest head of a request, its target and headers; a longer one is refused with 431."""
    max_connections: int = Field(default=1024, ge=1)
    """Open connections; one more is refused with 503 `queue_full`."""
    requests_per_minute: int = Field(default=0, ge=0)
    """Requests a minute of each key's name, of all together without keys; 0 means no limit."""
    tokens_per_minute: int = Field(default=0, ge=0)
    """Tokens a minute of each key's name, in documents, prompts and completions; 0: no limit."""
    max_document_tokens: int = Field(default=2**20, ge=1)
    """Longest document, and longest prompt."""
    max_questions: int = Field(default=64, ge=1)
    """Most questions (or prompts) in one request."""
    max_completion_tokens: int = Field(default=4096, ge=1)
    """Largest `max_tokens` that a request may ask for."""
    max_active_adaptations: int = Field(default=256, ge=1)
    """Adaptations queued or running; one more is refused with 503 `queue_full`."""
    max_active_bytes: int = Field(default=64 * 2**20, ge=1)
    """Bytes of the documents of adaptations queued or running together; a document beyond that is
    refused with 503 `queue_full`, unless it is alone."""
    max_active_requests: int = Field(default=256, ge=1)
    """Answers and completions waiting or running; one more is refused with 503 `queue_full`."""
    max_event_streams: int = Field(default=256, ge=1)
    """Open SSE streams of adaptation events; one more is refused with 503 `queue_full`."""
    max_key_share: float = Field(default=0.75, gt=0, le=1)
    """Part of the places and bytes of these four limits that one key's name may hold, where several
    names have keys; one more is refused with 429 `share_exceeded`. 1: no such bound."""

    default_preset: Literal["default", "fast", "paper"] = "default"
    """Preset of an adaptation whose request names none."""
    default_max_tokens: int = Field(default=64, ge=1)
    """`max_tokens` of an answer whose request gives none."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of an answer or completion; a request may ask for a shorter one."""
    adaptation_timeout_s: float = Field(default=24 * 3600.0, gt=0)
    """Deadline of an adaptation, from its submission to a worker; a request may shorten it."""
    answer_adapter_ttl_s: float = Field(default=24 * 3600.0, gt=0)
    """How long the adapter of a document that was only sent with questions is kept for more."""
    adapter_idle_s: float = Field(default=0.0, ge=0)
    """Free an adapter that nobody has asked for this long, where the request that made it does not
    say otherwise; 0 keeps it."""
    history_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    """How long failed, cancelled and expired adaptations are remembered."""
    drain_timeout_s: float = Field(default=30.0, ge=0)
    """On SIGTERM, how long running answers may take to finish."""
    head_timeout_s: float = Field(default=10.0, gt=0)
    """How long the head of a request may take to arrive."""
    upload_timeout_s: float = Field(default=30.0, gt=0)
    """How long a body may take to arrive, and a second longer for each 16 KiB of it."""
    extraction_timeout_s: float = Field(default=30.0, gt=0)
    """How long reading the text of an uploaded file may take."""
    keep_alive_s: float = Field(default=15.0, gt=0)
    """Silence after which an SSE stream sends a comment, so that proxies keep it open."""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """A client that takes nothing of a response for this long is hung up on."""

    num_slots: int = Field(default=64, ge=1)
    """Sequences that decode at once on a worker; each holds one recurrent state."""
    segment_tokens: int = Field(default=256, ge=1)
    """Tokens of one quantum of reading: the bound on how long an answer waits for other work."""
    step_tokens: int = Field(default=256, ge=1)
    """Prompt tokens that one engine step prefills at most."""
    adaptation_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a worker's time for adaptations while answers are decoding."""
    max_running_adaptations: int | None = Field(default=None, ge=1)
    """Adaptations that take turns on a worker; the others wait. None: 8 on a CPU; on a GPU as many
    of 4096 tokens as adaptation_bytes hold, 64 at most."""
    max_batched_adaptations: int | None = Field(default=None, ge=1)
    """Adaptations, or focus runs, whose quanta of one kind are computed as one batch. None: as
    many as max_running_adaptations is without a setting of its own."""
    max_quantum_ms: float = Field(default=100.0, gt=0)
    """Batches of quanta are kept as small as this time asks, at the speed of late; the quantum of a
    single document is bounded by `segment_tokens`."""
    adaptation_bytes: int | None = Field(default=None, ge=1)
    """Memory that a worker's running adaptations may use together, by estimate. None: 4 GiB on a
    CPU; on a GPU 60 % of what it has free once model and slots are in place."""
    adapter_device_bytes: int | None = Field(default=None, ge=0)
    """Memory of a GPU for adapters at hand; the least recently used move to the host. None: 20 % of
    what it has free. Refused on a CPU, where this and the host's are the same memory."""
    adapter_host_bytes: int | None = Field(default=None, ge=0)
    """Memory of the host for adapters kept ready on a worker; the least recently used leave it
    first (all are on disk). None: an eighth of the machine's memory or its container's limit,
    shared by the workers."""
    idle_states: Literal["exact", "int8"] = "exact"
    """How the host keeps the recurrent states of adapters that are not in use: as they are, or in
    int8, which takes a quarter of a matrix's memory and changes what they remember a little."""
    heartbeat_timeout_s: float = Field(default=60.0, gt=0)
    """A worker silent for longer is killed and started again; keep it above the longest quantum."""
    startup_timeout_s: float = Field(default=120.0, gt=0)
    """How long a worker may take to load the model."""

    @field_validator("port", mode="before")
    @classmethod
    def _refuse_service_link(cls, value: object) -> object:
        # Kubernetes sets IMPRINT_PORT=tcp://… in every pod beside a Service named "imprint".
        if isinstance(value, str) and value.startswith("tcp://"):
            raise ValueError(
                "IMPRINT_PORT was set by Kubernetes for a Service named imprint; "
                "set enableServiceLinks: false on the pod, or give the port explicitly"
            )
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _read_keys(cls, value: object) -> object:
        return (KeyRing.parse(value) or None) if isinstance(value, str) else value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _read_origins(cls, value: object) -> object:
        if isinstance(value, str):
            value = tuple(origin.strip() for origin in value.split(",") if origin.strip())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError("an origin is http:// or https://, a name, and maybe a port")
        return value

    @model_validator(mode="after")
    def _refuse_a_second_tier_on_a_cpu(self) -> Self:
        if self.device == "cpu" and self.adapter_device_bytes is not None:
            raise ValueError(
                "adapter_device_bytes is for GPUs, and device is cpu: set adapter_host_bytes"
            )
        return self

    def key_ring(self) -> KeyRing:
        """Every key there is, the file's included. Raises KeysError for a file that has none."""
        given = self.api_keys or KeyRing()
        return given if self.api_keys_file is None else given | KeyRing.load(self.api_keys_file)

    @property
    def served_model_name(self) -> str:
        """The base model's name in requests and replies."""
        return self.model_name or self.model.resolve().name

    @property
    def journal_path(self) -> Path:
        """The SQLite file."""
        return self.data_dir / "journal.sqlite3"

    def pool_config(self) -> PoolConfig:
        """What the worker pool needs, as plain values."""
        worker = WorkerConfig(
            model=str(self.model.absolute()),  # other machines have other working directories
            store=str((self.data_dir / "adapters").resolve()),
            reward_encoder=self.reward_encoder,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            num_slots=self.num_slots,
            segment_tokens=self.segment_tokens,
            step_tokens=self.step_tokens,
            adaptation_share=self.adaptation_share,
            max_running_adaptations=self.max_running_adaptations,
            max_batched_adaptations=self.max_batched_adaptations,
            max_quantum_ms=self.max_quantum_ms,
            adaptation_bytes=self.adaptation_bytes,
            max_waiting_requests=self.max_active_requests,
            adapter_device_bytes=self.adapter_device_bytes,
            adapter_host_bytes=self.adapter_host_bytes,
            host_share=1 / self.workers,
            idle_states=self.idle_states,
            max_tokens=self.max_document_tokens,
            drain_timeout_s=self.drain_timeout_s,
        )
        return PoolConfig(
            worker=worker,
            num_workers=self.workers,
            pool=self.pool,
            ray_address=self.ray_address,
            pool_port=self.pool_port,
            startup_timeout_s=self.startup_timeout_s,
            heartbeat_timeout_s=self.heartbeat_timeout_s,
            max_waiting_requests=self.max_active_requests,
            log_level=self.log_level,
            log_format=self.log_format,
            kernels=self.kernels,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting as the command line and the documentation show it."""

    name: str
    flag: str
    env: str
    annotation: Any
    default: Any
    description: str


def options() -> list[Option]:
    """Every setting, in the order of the class."""
    return [
        Option(
            name=name,
            flag="--" + name.replace("_", "-"),
            env=ENV_PREFIX + name.upper(),
            annotation=field.annotation,
            default=field.default,
            description=field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """`IMPRINT_*` variables that set nothing: misspellings, which would pass in silence."""
    known = {faults.VARIABLE, KEY_VARIABLE, *(option.env for option in options())}
    names = os.environ if environ is None else environ
    return sorted(name for name in names if name.startswith(ENV_PREFIX) and name not in known)
