"""How fast the operators and the model's steps are here, beside the matmul rate of the same run.

What is compared is timed alternately, so that a busy machine slows all of it. Limit: random tokens
and random deltas; one device; nothing of REFINE and no server.
Shapes: B = rows, H = heads, T = tokens, D = width of a head, N = rows of a pool.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprint.models.architecture import FastWeightModel
from imprint.models.checkpoint import load_model
from imprint.models.generate import prefill
from imprint.models.kernels import uses_triton
from imprint.models.kernels.choice import read_delta_rule
from imprint.models.kernels.chunks import chunk_size_for
from imprint.models.kernels.delta_rule import chunk_delta_rule
from imprint.models.kernels.gated_delta_rule import chunk_gated_delta_rule
from imprint.models.layers import l2_normalize
from imprint.models.lora import LoraDelta
from imprint.models.pool_decoder import PoolDecoder

HEAD_WIDTHS = (64, 128)
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_LARGE_CHUNK = 64  # fla's, too
_LORA_RANK = 8
_WARM_UPS = 2

Seconds = dict[str, list[float]]
_Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBenchmark:
    """What to measure."""

    model: Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int = 1
    num_tokens: int = 4096
    """Tokens of a reading, by an operator or by the model."""
    segment_tokens: int = 2048
    """The model reads in pieces of this length."""
    heads: int = 8
    """Heads of the operators."""
    batch_sizes: Sequence[int] = (1, 32)
    """Sequences that decode together."""
    repeats: int = 7


def run_kernel_benchmark(config: KernelBenchmark, progress: Say | None = None) -> dict[str, Any]:
    """Measure, and return JSON values; times are the best and the median of the repeats."""
    say = progress or (lambda _: None)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        say("matmul and the delta rules")
        rules = _measure_rules(config)
        say("loading the model")
        model = load_model(config.model, device=config.device, dtype=config.dtype)
        say("reading")
        reading = _measure_reading(config, model, rules["matmul"]["flops_per_s"])
        say("decoding")
        decoding = _measure_decoding(config, model)
    finally:
        torch.set_num_threads(before)
    device = torch.device(config.device)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "dtype": str(config.dtype).removeprefix("torch."),
        "threads": config.threads,
        "triton": uses_triton(device),
        **rules,
        "reading": reading,
        "decoding": decoding,
    }


def delta_rule_flops(num_tokens: int, heads: int, width: int, chunk_size: int) -> int:
    """Multiplications and additions of the chunkwise rule, forward, by its formulas.

    Per chunk and head 10 C^2 d for the products within the chunk, 6 C d^2 for those with the state
    and 2/3 C^3 for the triangular inverse.
    """
    per_chunk = 10 * chunk_size**2 * width + 6 * chunk_size * width**2 + 2 * chunk_size**3 // 3
    return per_chunk * heads * -(-num_tokens // chunk_size)


@torch.no_grad()
def _measure_rules(config: KernelBenchmark) -> dict[str, Any]:
    """The rules' flops per second as a share of a square matmul's."""
    size = _MATMUL_SIZE[torch.device(config.device).type]
    square = torch.randn(size, size, device=config.device, dtype=config.dtype)
    rules = {rule.name: rule for rule in _rules(config)}
    calls: dict[str, Callable[[], object]] = {"matmul": lambda: square @ square}
    calls.update({name: rule.call for name, rule in rules.items()})
    products = {name: _products(config, rule) for name, rule in rules.items()}
    calls.update({f"products of {name}": call for name, (call, _) in products.items()})
    seconds = _alternately(calls, config)
    matmul_flops = 2 * size**3
    numbers: dict[str, Any] = {
        "matmul": {"size": size, **_rates(seconds["matmul"], "flops", matmul_flops)}
    }
    for name, rule in rules.items():
        flops = delta_rule_flops(config.num_tokens, config.heads, rule.width, rule.chunk_size)
        relative = flops / matmul_flops
        pairs = zip(seconds["matmul"], seconds[name], strict=True)
        shares = [relative * matmul / taken for matmul, taken in pairs]
        numbers[name] = {
            "share_of_matmul_rate": relative * min(seconds["matmul"]) / min(seconds[name]),
            "median_share_of_matmul_rate": statistics.median(shares),
            "products_alone_share": products[name][1]
            / matmul_flops
            * min(seconds["matmul"])
            / min(seconds[f"products of {name}"]),
            "chunk_size": rule.chunk_size,
            **_rates(seconds[name], "flops", flops),
            "tokens_per_s": config.num_tokens / min(seconds[name]),
        }
    return numbers


@dataclass(frozen=True, slots=True)
class _Rule:
    """One delta rule at one width."""

    name: str
    width: int
    chunk_size: int
    call: Callable[[], object]


def _products(config: KernelBenchmark, rule: _Rule) -> tuple[Callable[[], object], int]:
    """The rule's eight products and nothing else, and their flops: what their sizes alone allow.

    Those of a chunk with itself for all chunks at once, those with the state a chunk at a time, as
    the plain rule has to; on a GPU, fla's kernels are not bound by this.
    """
    width, size = rule.width, rule.chunk_size
    num = -(-config.num_tokens // size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(num, config.heads, *shape, device=config.device)

    x_CK, x_CC, x_KV = normal(size, width), normal(size, size), normal(width, width)
    within = [(x_CK, x_CK.mT)] * 2 + [(x_CC, x_CK)] * 3
    across = [(x_CK, x_KV)] * 2 + [(x_CK.mT, x_CK)]

    def multiply() -> None:
        for left, right in within:
            torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
        for left, right in across:
            for left_n, right_n in zip(left.unbind(), right.unbind(), strict=True):
                torch.bmm(left_n, right_n)

    per_chunk = 10 * size**2 * width + 6 * size * width**2
    return multiply, per_chunk * config.heads * num


def _rules(config: KernelBenchmark) -> Iterator[_Rule]:
    """As the models call them; on a CPU, where small heads go in small chunks, also in large ones,
    which take more flops at a higher rate."""
    for width in HEAD_WIDTHS:
        used = _LARGE_CHUNK
        if config.device == "cpu":
            used = chunk_size_for(config.num_tokens, width)
        for gated in (False, True):
            name = f"{'gated_' if gated else ''}delta_rule_{width}"
            arguments = _arguments(config, width, gated)
            yield _Rule(name, width, used, partial(read_delta_rule, *arguments))
            if used != _LARGE_CHUNK:
                op = chunk_gated_delta_rule if gated else chunk_delta_rule
                given = [x for x in arguments if x is not None]
                call = partial(op, *given, chunk_size=_LARGE_CHUNK)
                yield _Rule(f"{name}_chunk_{_LARGE_CHUNK}", width, _LARGE_CHUNK, call)


def _arguments(config: KernelBenchmark, width: int, gated: bool) -> _Arguments:
    draw = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(config.device)

    shape = (1, config.heads, config.num_tokens)
    q, k = (l2_normalize(normal(*shape, width)) for _ in "qk")
    v = normal(*shape, width).to(config.dtype)
    decay = -normal(*shape).exp() * 0.1 if gated else None
    state = torch.zeros(1, config.heads, width, width, device=config.device)
    return q, k, v, normal(*shape).sigmoid(), decay, state


def _measure_reading(
    config: KernelBenchmark, model: FastWeightModel, matmul_rate: float
) -> dict[str, Any]:
    """Tokens per second, and the share of the matmul rate that the layers' weights alone take."""
    tokens_BT = _tokens(model, 1, config.num_tokens)

    def read() -> None:
        state = None
        for piece_BT in torch.split(tokens_BT, config.segment_tokens, 1):
            _, state = prefill(model, piece_BT, state)

    seconds = _alternately({"read": read}, config)["read"]
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    rate = config.num_tokens / min(seconds)
    return {
        "num_tokens": config.num_tokens,
        "segment_tokens": config.segment_tokens,
        "tokens_per_s": rate,
        "share_of_matmul_rate": 2 * weights * rate / matmul_rate,
        **_times(seconds),
    }


def _measure_decoding(config: KernelBenchmark, model: FastWeightModel) -> dict[str, Any]:
    """A step of each batch size, without deltas and with one a row, on rows of different texts."""
    _, pool = prefill(model, _tokens(model, max(config.batch_sizes) + 1, 8))
    decoder = PoolDecoder(model, pool)
    calls: dict[str, Callable[[], object]] = {}
    for size in config.batch_sizes:
        for name, delta in (("without", None), ("with", _deltas(model, size))):
            rows = range(1, size + 1)
            calls[f"{name} {size}"] = partial(decoder.decode, [7] * size, rows, delta)
    seconds = _alternately(calls, config)
    numbers: dict[str, Any] = {"lora_rank": _LORA_RANK}
    for name in ("without", "with"):
        times = {size: seconds[f"{name} {size}"] for size in config.batch_sizes}
        numbers[f"{name}_deltas"] = {
            str(size): {"tokens_per_s": size / min(values), **_times(values)}
            for size, values in times.items()
        }
        first, last = config.batch_sizes[0], config.batch_sizes[-1]
        numbers[f"batch_{last}_over_{first}_{name}_deltas"] = min(times[last]) / min(times[first])
    return numbers


def _deltas(model: FastWeightModel, num: int) -> LoraDelta:
    delta = LoraDelta.init(
        model.lora_targets(), _LORA_RANK, seed=0, num=num, device=model.device, dtype=torch.float32
    )
    for tensor in delta.b.values():
        tensor.normal_(0.0, 1e-3)
    return delta


def _tokens(model: FastWeightModel, batch: int, num_tokens: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    size = (batch, num_tokens)
    return torch.randint(model.config.vocab_size, size, generator=draw).to(model.device)


def _alternately(calls: Mapping[str, Callable[[], object]], config: KernelBenchmark) -> Seconds:
    """Seconds of each call, `repeats` of them, one call after the other."""
    for call in calls.values():
        for _ in range(_WARM_UPS):
            call()
    seconds: Seconds = {name: [] for name in calls}
    for _ in range(config.repeats):
        for name, call in calls.items():
            wait_for(config.device)
            began = time.perf_counter()
            call()
            wait_for(config.device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def wait_for(device: torch.device | str) -> None:
    """Until a GPU has done what it was given; a CPU has."""
    if torch.device(device).type != "cpu":
        torch.cuda.synchronize(device)


def _times(seconds: Sequence[float]) -> dict[str, float]:
    return {"best_s": min(seconds), "median_s": statistics.median(seconds)}


def _rates(seconds: Sequence[float], unit: str, amount: float) -> dict[str, float]:
    return {f"{unit}_per_s": amount / min(seconds), **_times(seconds)}
