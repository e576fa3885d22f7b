"""What a REFINE step costs: against one reading, against the published loop, and in memory.

The loop it is compared with is the oracle of the tests, so this runs in a source tree. Pairs are
timed alternately, so that a busy machine slows both. Limit: one document of random tokens.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from imprint.adapters.calls import run_calls
from imprint.adapters.config import RefineConfig
from imprint.adapters.document import document_tokens
from imprint.adapters.policy import StepResult
from imprint.adapters.reading import read_segments
from imprint.adapters.refine import Refiner
from imprint.adapters.selection import select_positions
from imprint.adapters.trunk import trunk_step
from imprint.models import BUNDLED, FastWeightModel, LoraDelta, load_model
from imprint.models.kernel_benchmark import wait_for

_STUDY_STEPS = 4
_ORACLE = Path(__file__).resolve().parents[1] / "tests" / "adapters" / "oracle.py"


def load_oracle() -> ModuleType:
    """The literal loop of the tests. Raises FileNotFoundError outside a source tree."""
    if not _ORACLE.is_file():
        raise FileNotFoundError(f"{_ORACLE} is missing: compare with the literal loop in a clone")
    spec = importlib.util.spec_from_file_location("imprint_step_oracle", _ORACLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_step_benchmark(
    *,
    model: Path = BUNDLED,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_tokens: int = 4096,
    positions: int = 8,
    rollout_length: int = 5,
    segment_tokens: int = 1024,
    repeats: int = 7,
    literal_repeats: int = 3,
    with_loop: bool = True,
    peak_tokens: tuple[int, int] = (8192, 32768),
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure, and return JSON values: the ratios first, then medians and spreads in seconds.

    Without `with_loop` nothing is compared with the published loop, which on a long document takes
    most of the time and of the memory.
    """
    say = progress or (lambda _: None)
    place = _Place(model, device, dtype)
    bench = _Bench(
        place.load(),
        RefineConfig(
            scope="lora",
            branches="continue",
            selection="entropy",
            positions=positions,
            rollout_length=rollout_length,
            segment_tokens=segment_tokens,
            min_entropy=0.0,
        ),
        num_tokens,
        seed,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        say("a step of 4 rollouts against one reading")
        reading = bench.alternately(bench.reading, bench.step(4), repeats)
        say(f"studies of {_STUDY_STEPS} steps")
        if bench.model.device.type != "cpu":
            bench.study()  # compiles what only a study runs
        study_s = bench.time(bench.study)
        loop = bench.against_the_loop(literal_repeats, say) if with_loop else {}
    finally:
        torch.set_num_threads(before)
    say("peak memory")
    if bench.model.device.type == "cpu":
        peaks = [_peak_in_child(place, size, segment_tokens, threads) for size in peak_tokens]
    else:
        peaks = [_peak_on_gpu(bench.model, size, segment_tokens) for size in peak_tokens]
    return {
        "step_over_reading": reading["ratio"]["median"],
        **loop,
        "peak_ratio_32k_8k": peaks[1] / peaks[0],
        "study_s": study_s,
        "study_steps": _STUDY_STEPS,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "num_tokens": num_tokens,
        "positions": positions,
        "rollout_length": rollout_length,
        "segment_tokens": segment_tokens,
        "threads": threads,
        "reading_then_step_4": reading,
        "peak_bytes": dict(zip(map(str, peak_tokens), peaks, strict=True)),
    }


@dataclass(frozen=True, slots=True)
class _Place:
    """A model, and where it runs."""

    model: Path
    device: str
    dtype: torch.dtype

    def load(self) -> FastWeightModel:
        return load_model(self.model, device=self.device, dtype=self.dtype)


class _Bench:
    """One model, one document, one delta that is not zero."""

    def __init__(
        self, model: FastWeightModel, config: RefineConfig, num_tokens: int, seed: int
    ) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.oracle = load_oracle()
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(
            model.config.vocab_size, (num_tokens,), generator=generator
        ).tolist()
        self.tokens_T = document_tokens(model, self.tokens)
        self.delta = LoraDelta.init(
            model.lora_targets(), config.lora_rank, seed=seed, device=model.device
        )
        for tensor in self.delta.b.values():
            tensor.copy_(torch.empty(tensor.shape).normal_(0.0, 1e-3, generator=generator))
        self.delta.requires_grad_()
        self.settings = self.oracle.Settings(
            config.lambda_rl, config.lambda_ntp, config.cue_tokens, "lora", config.rollout_length
        )

    def reading(self) -> None:
        """One pass without gradients, entropies included."""
        run_calls(
            read_segments(self.model, self.tokens_T, segment_tokens=self.config.segment_tokens)
        )

    def step(self, group_size: int) -> Callable[[], StepResult]:
        """A whole step: reading, selection, rollouts, gradients."""
        config = self.config.replace(group_size=group_size)

        def run() -> StepResult:
            self._forget_gradients()
            step = trunk_step(
                self.model, self.tokens_T, config, delta=self.delta, seed=self.seed, step=0
            )
            result: StepResult = run_calls(step)
            return result

        return run

    def study(self) -> None:
        """A whole study as a server runs it: reading, steps of 4 rollouts, probes and the gate."""
        config = self.config.replace(group_size=4, steps=_STUDY_STEPS, patience=_STUDY_STEPS)
        for _ in Refiner(self.model, self.tokens, config, seed=self.seed).run():
            pass

    def against_the_loop(
        self, repeats: int, say: Callable[[str], None]
    ) -> dict[str, float | dict[str, Any]]:
        """Times and gradients of the published loop against the trunk's."""
        say("the literal loop against the trunk, 1 rollout")
        single = self.alternately(self.step(1), self.literal(1), repeats)
        say("the literal loop against the trunk, 8 rollouts")
        eight = self.alternately(self.step(8), self.literal(8), repeats)
        say("gradients")
        return {
            "grad_rel_error": self.grad_rel_error(),
            "literal_over_trunk": single["ratio"]["median"],
            "literal_over_trunk_8": eight["ratio"]["median"],
            "trunk_then_literal_1": single,
            "trunk_then_literal_8": eight,
        }

    def literal(self, group_size: int) -> Callable[[], None]:
        """The published loop at as many positions, each prefix read again for each rollout."""
        positions_N = select_positions(
            torch.zeros(len(self.tokens)), self.config, seed=self.seed, step=0
        )

        def run() -> None:
            self._forget_gradients()
            self.oracle.literal_step(
                self.model,
                self.tokens,
                positions_N.tolist(),
                group_size,
                self.settings,
                self.delta,
                torch.Generator().manual_seed(self.seed),
            )

        return run

    def alternately(
        self, first: Callable[[], object], second: Callable[[], object], repeats: int
    ) -> dict[str, dict[str, float]]:
        """Time both in turn; medians and spreads, also of second over first pair by pair."""
        first()  # warm-up
        if self.model.device.type != "cpu":
            second()  # compiles its kernels
        times = [(self.time(first), self.time(second)) for _ in range(repeats)]
        return {
            "first_s": _spread([pair[0] for pair in times]),
            "second_s": _spread([pair[1] for pair in times]),
            "ratio": _spread([pair[1] / pair[0] for pair in times]),
        }

    def time(self, work: Callable[[], object]) -> float:
        """Seconds."""
        wait_for(self.model.device)
        start = time.perf_counter()
        work()
        wait_for(self.model.device)
        return time.perf_counter() - start

    def grad_rel_error(self) -> float:
        """Norm of the difference to the oracle's gradient over that gradient's norm."""
        result = self.step(1)()
        mine = self._flat_gradient()
        assert result.rollouts_QNGK is not None
        assert result.advantages_QNG is not None
        branches = [
            self.oracle.Branch(int(position), False, rollout.tolist(), float(advantage))
            for position, rollout, advantage in zip(
                result.positions_QN[0],
                result.rollouts_QNGK[0, :, 0],
                result.advantages_QNG[0, :, 0],
                strict=True,
            )
        ]
        self._forget_gradients()
        self.oracle.accumulate_gradients(
            self.model, self.tokens, branches, self.settings, self.delta
        )
        theirs = self._flat_gradient()
        return float((mine - theirs).norm() / theirs.norm())

    def _flat_gradient(self) -> Tensor:
        grads = [tensor.grad for tensor in self.delta.parameters()]
        return torch.cat([grad.double().flatten() for grad in grads if grad is not None])

    def _forget_gradients(self) -> None:
        for tensor in self.delta.parameters():
            tensor.grad = None


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _peak_in_child(place: _Place, num_tokens: int, segment_tokens: int, threads: int) -> int:
    """Peak resident bytes of one step above the loaded model, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(
        target=_measure_peak, args=(place, num_tokens, segment_tokens, threads, theirs)
    )
    child.start()
    theirs.close()
    try:
        peak: int = ours.recv()
    finally:
        child.join()
    return peak


def _measure_peak(
    place: _Place, num_tokens: int, segment_tokens: int, threads: int, out: Connection
) -> None:
    torch.set_num_threads(threads)
    step = _peak_step(place.load(), num_tokens, segment_tokens)
    loaded = _resident_bytes("VmRSS")
    step()
    out.send(_resident_bytes("VmHWM") - loaded)


def _peak_on_gpu(model: FastWeightModel, num_tokens: int, segment_tokens: int) -> int:
    """Peak bytes that the GPU's allocator gives out for one step."""
    step = _peak_step(model, num_tokens, segment_tokens)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    step()
    return torch.cuda.max_memory_allocated(model.device) - before


def _peak_step(
    model: FastWeightModel, num_tokens: int, segment_tokens: int
) -> Callable[[], StepResult]:
    """The step whose memory is measured: as published, in segments."""
    config = RefineConfig.preset(
        "paper", group_size=4, advantage="rloo", segment_tokens=segment_tokens
    )
    return _Bench(model, config, num_tokens, seed=0).step(config.group_size)


def _resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process; the peak for both where not on Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024
