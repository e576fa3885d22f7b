"""The delta rules by flash-linear-attention's kernels, on a GPU, behind the guards that they need.

Used for 16-bit values only: in float32 fla's products are TF32, and float32 is asked for where
accuracy counts. Before a kernel is used for the sizes of a model, it is compared with plain torch,
in values and in gradients. Has not run on a GPU; in Triton's interpreter its values and gradients
are right.
Shapes: B = rows, H = heads, T = tokens, K / V = key / value width of a head, P = states.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.models.kernels import triton_version, version_numbers
from imprint.models.kernels.delta_rule import chunk_delta_rule
from imprint.models.kernels.gated_delta_rule import chunk_gated_delta_rule

MAX_KEY_WIDTH = 256  # asserted in fla's state kernels
SHORT_READ = 64
"""Reads of up to so many tokens without gradients go token by token, in float32."""

_OLDEST_FLA = (0, 6, 0)  # wrong gradients on Hopper and in convolutions before (#984, #1138, #1140)
_CHUNK_SIZES = (64, 32)  # the second is not touched by the miscompilations known of the first
_CHECK_TOKENS, _CHECK_HEADS = 128, 2
_VALUE_ERROR, _GRADIENT_ERROR = 2e-2, 5e-2  # a miscompiled kernel is off by its whole size

Reading = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]
"""q, k, v, beta, logarithm of the decay, state."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a delta rule is asked for: which kernels can serve it depends on nothing else."""

    key_width: int
    value_width: int
    gated: bool
    dtype: torch.dtype
    """Of the values; it decides the precision of the products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What is known of the machine's GPU and packages."""

    capability: tuple[int, int]
    """Compute capability: (9, 0) is Hopper."""
    triton: tuple[int, ...]
    fla: tuple[int, ...] | None
    """None: it is not installed."""


def find_obstacle(sizes: Sizes, platform: Platform, *, graded: bool) -> str | None:
    """Why fla's kernels must not be used, for people; None where nothing is known against them."""
    oldest = ".".join(map(str, _OLDEST_FLA))
    if platform.fla is None:
        return "flash-linear-attention is not installed: pip install 'imprint[gpu]'"
    if platform.fla < _OLDEST_FLA:
        shown = ".".join(map(str, platform.fla))
        return f"flash-linear-attention {shown} has wrong gradients; {oldest} or newer is needed"
    if sizes.dtype not in (torch.bfloat16, torch.float16):
        return f"its products of {sizes.dtype} would be TF32; plain torch keeps them exact"
    if sizes.key_width > MAX_KEY_WIDTH:
        return f"keys of width {sizes.key_width} are wider than the {MAX_KEY_WIDTH} that it takes"
    hopper = platform.capability[0] == 9
    if graded and sizes.gated and hopper and (3, 4) <= platform.triton < (3, 7, 1):
        shown = ".".join(map(str, platform.triton))
        return (
            f"Triton {shown} miscompiles the gradients of gated delta rules on Hopper GPUs "
            "(flash-linear-attention #640); install Triton 3.7.1 or newer"
        )
    return None


@dataclass(frozen=True, slots=True)
class FlaReader:
    """Reads tokens with fla's kernels."""

    chunk: Callable[..., Any]
    recurrent: Callable[..., Any]
    chunk_size: int

    def read(
        self,
        q_BHTK: Tensor,
        k_BHTK: Tensor,
        v_BHTV: Tensor,
        beta_BHT: Tensor,
        log_decay_BHT: Tensor | None,
        state_PHKV: Tensor,
        *,
        stops: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `chunk_delta_rule` or, with a decay, `chunk_gated_delta_rule`: same arguments, same
        results, o in the type of the values. Reading goes on from each of `stops`."""
        num_tokens = v_BHTV.shape[2]
        inputs = {"q": q_BHTK, "k": k_BHTK, "v": v_BHTV}
        inputs = {name: x.to(v_BHTV.dtype).transpose(1, 2) for name, x in inputs.items()}
        inputs["beta"] = beta_BHT.transpose(1, 2)
        if log_decay_BHT is not None:
            inputs["g"] = log_decay_BHT.transpose(1, 2)
        state = state_PHKV.repeat_interleave(v_BHTV.shape[0] // state_PHKV.shape[0], 0)
        ends = list(stops or ())
        if not ends or ends[-1] < num_tokens:
            ends.append(num_tokens)
        outputs, states, start = [], [], 0
        for end in ends:
            if end > start:
                part = {name: x[:, start:end].contiguous() for name, x in inputs.items()}
                o_BTHV, state = self._piece(part, state)
                outputs.append(o_BTHV)
            states.append(state)
            start = end
        o_BHTV = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).transpose(1, 2)
        return o_BHTV, state if stops is None else torch.cat(states[: len(stops)])

    def _piece(self, inputs: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        graded = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs.values(), state))
        common = {"initial_state": state, "output_final_state": True}
        # token by token has no gradient for every case: never with one
        if not graded and inputs["v"].shape[1] <= SHORT_READ:
            o, state = self.recurrent(**inputs, **common)
        else:
            o, state = self.chunk(**inputs, **common, chunk_size=self.chunk_size)
        return o, state


def find_reader(sizes: Sizes, device: torch.device, *, graded: bool) -> FlaReader | None:
    """The reader for these sizes, checked once on this device; None (and why in the log) where
    plain torch must do."""
    platform = _platform(device)
    obstacle = find_obstacle(sizes, platform, graded=graded)
    reader = None
    if obstacle is None:
        # gradients are compared wherever they can be right
        reader = _checked(sizes, device, find_obstacle(sizes, platform, graded=True) is None)
    elif sizes.dtype != torch.float32:
        _tell(obstacle)
    return reader


@functools.cache
def _tell(obstacle: str) -> None:
    log.warning("the delta rule runs in plain torch, which is slower: %s", obstacle)


@functools.cache
def _platform(device: torch.device) -> Platform:
    try:
        fla = version_numbers(importlib.metadata.version("fla-core"))
    except importlib.metadata.PackageNotFoundError:
        fla = None
    capability = torch.cuda.get_device_capability(device)
    return Platform(capability=capability, triton=triton_version() or (), fla=fla)


def load_reader(*, gated: bool, chunk_size: int = _CHUNK_SIZES[0]) -> FlaReader:
    """fla's kernels, unchecked. Raises ImportError where it does not import."""
    if gated:
        from fla.ops.gated_delta_rule import (
            chunk_gated_delta_rule as chunk,
        )
        from fla.ops.gated_delta_rule import (
            fused_recurrent_gated_delta_rule as recurrent,
        )
    else:
        from fla.ops.delta_rule import chunk_delta_rule as chunk
        from fla.ops.delta_rule import fused_recurrent_delta_rule as recurrent
    return FlaReader(chunk, recurrent, chunk_size)


@functools.cache
def _checked(sizes: Sizes, device: torch.device, graded: bool) -> FlaReader | None:
    from triton.errors import TritonError

    for chunk_size in _CHUNK_SIZES:
        try:
            reader = load_reader(gated=sizes.gated, chunk_size=chunk_size)
            problem = find_error(reader, sizes, device, graded=graded)
        except (ImportError, RuntimeError, AssertionError, TritonError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            return reader
        log.warning("fla's delta rule with chunks of %d fails its check: %s", chunk_size, problem)
    _tell(f"fla's kernels fail their check for {sizes}")
    return None


def find_error(
    reader: FlaReader, sizes: Sizes, device: torch.device, *, graded: bool
) -> str | None:
    """What differs from plain torch on a random reading of these sizes; None if nothing does."""
    reading = _random_reading(sizes, device)
    plain = chunk_gated_delta_rule if sizes.gated else chunk_delta_rule

    def read_plain(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        return plain(*(x for x in arguments if x is not None))

    with torch.enable_grad():
        exact = _map(torch.Tensor.float, reading)
        expected = _values_and_gradients(read_plain, exact, graded)
        actual = _values_and_gradients(reader.read, reading, graded)
    with torch.no_grad():
        q, k, v, beta, decay, _ = _map(lambda x: x[:, :, :SHORT_READ], reading)
        expected["o, token by token"] = expected["o"][:, :, :SHORT_READ]
        actual["o, token by token"] = reader.read(q, k, v, beta, decay, reading[-1])[0]
    for name, right in expected.items():
        error = float((actual[name].float() - right).norm() / right.norm().clamp_min(1e-6))
        limit = _GRADIENT_ERROR if name.startswith("gradient") else _VALUE_ERROR
        if not error <= limit:  # NaN is an error, too
            return f"{name} is off by {error:.2g} of its size, {limit:g} is allowed"
    return None


def _map(function: Callable[[Tensor], Tensor], reading: Reading) -> Reading:
    q, k, v, beta, decay, state = reading
    faded = None if decay is None else function(decay)
    return function(q), function(k), function(v), function(beta), faded, function(state)


def _random_reading(sizes: Sizes, device: torch.device) -> Reading:
    """A reading in the types that a model gives to `FlaReader`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (1, _CHECK_HEADS, _CHECK_TOKENS)
    q, k = (F.normalize(normal(*shape, sizes.key_width), dim=-1) for _ in "qk")
    v, beta = normal(*shape, sizes.value_width), normal(*shape).sigmoid()
    decay = -normal(*shape).exp() * 0.1
    state = normal(1, _CHECK_HEADS, sizes.key_width, sizes.value_width)
    q, k, v, beta = (x.to(device=device, dtype=sizes.dtype) for x in (q, k, v, beta))
    return q, k, v, beta, decay.to(device) if sizes.gated else None, state.to(device)


def _values_and_gradients(
    read: Callable[..., tuple[Tensor, Tensor]], reading: Reading, graded: bool
) -> dict[str, Tensor]:
    leaves = _map(lambda x: x.detach().clone().requires_grad_(graded), reading)
    o, state = read(*leaves)
    values = {"o": o.detach(), "state": state.detach()}
    if graded:
        names = ("q", "k", "v", "beta", "decay", "state")
        named = {name: x for name, x in zip(names, leaves, strict=True) if x is not None}
        # any smooth loss that needs both results
        loss = o.float().square().sum() + state.float().square().sum()
        grads = torch.autograd.grad(loss, list(named.values()))
        for name, grad in zip(named, grads, strict=True):
            values[f"gradient of {name}"] = grad
    return values
