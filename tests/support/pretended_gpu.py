"""A GPU that is the host's memory, for machines without one: torch takes its tensors for those of
`cuda:0`, and what a GPU refuses is refused.

A plugin of pytest: `PYTHONPATH=tests python -m pytest -p support.pretended_gpu -m gpu ...` runs the
tests marked `gpu` on it, and Triton's kernels in its interpreter. It changes torch for the whole
process. Every operation is computed by torch's kernels for CPUs. What it finds:

- tensors of the host and of the device in one operation, numbers taken from it as from the host;
- while a CUDA graph is captured, waiting for the device and taking numbers from the host;
- graphs that read other memory than they were given: a replay computes again what was captured,
  on the same tensors, and spoils what other graphs have left in the memory that they share.

Limit: knows nothing of streams, of speed, of memory, and of how a GPU rounds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
_STAND_IN = torch.device("ipu", 0)
"""What torch's C++ takes the device for: it knows its type, and has nothing to do with it."""
_MEMORY = 8 << 30

_MIXED = {"copy_", "copy", "_to_copy", "index", "index_put_", "_index_put_impl_"}
"""Operations that a GPU does with tensors of the host, too."""
_WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2"}


class GpuError(RuntimeError):
    """What a GPU would have refused."""


class DeviceTensor(Tensor):
    """A tensor on the device; `host` holds its numbers."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        out: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=_STAND_IN,
        )
        out.host = host
        return out

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class _Captured:
    """Operations on tensors of the host, and what they gave."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.made: list[Tensor] = []

    def add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        known = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        made = _tensors(out)
        self.made += [x for x in made if x.untyped_storage().data_ptr() not in known]

        def again() -> None:
            for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.steps.append(again)


class _Graph:
    """A CUDA graph. All of them share their memory."""

    capturing: _Captured | None = None
    played: ClassVar[list[_Graph]] = []

    def __init__(self) -> None:
        self.captured = _Captured()

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            for other in _Graph.played:
                for tensor in other.captured.made if other is not self else ():
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
            for step in self.captured.steps:
                step()
        _Graph.played = [*{id(graph): graph for graph in (*_Graph.played, self)}.values()]


@contextlib.contextmanager
def _capture(graph: _Graph, **options: Any) -> Iterator[None]:
    assert _Graph.capturing is None
    _Graph.capturing = graph.captured
    try:
        yield
    finally:
        _Graph.capturing = None


class _Nothing:
    """A stream or an event: everything is done at once here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: None


class _Mode(TorchDispatchMode):
    """Sees operations that no tensor of the device takes part in: it may be where they create."""

    def __enter__(self) -> _Mode:
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type in (DEVICE.type, _STAND_IN.type)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_flatten(values)[0] if isinstance(x, Tensor)]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation of torch: on the host's tensors, its result where a GPU would have it."""
    name = func._schema.name.split("::")[1]
    leaves, layout = tree_flatten((args, kwargs))
    here = [x for x in leaves if isinstance(x, DeviceTensor)]
    there = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
    wanted = kwargs.get("device")
    to_device, to_host = _on_device(wanted), wanted is not None and not _on_device(wanted)
    if here:
        _refuse_mixing(func, name, args, [x for x in there if x.dim() > 0])
    if _Graph.capturing is not None:
        fetched = (to_device or (here and name == "copy_")) and any(x.dim() > 0 for x in there)
        mask = name == "index" and any(x.dtype == torch.bool for x in _tensors(args[1]))
        if fetched or (here and (name in _WAITING or to_host or mask)):
            raise GpuError(f"{func} while a graph is captured")
    on_host = [_host_of(x) for x in leaves]
    host_args, host_kwargs = tree_unflatten(on_host, layout)
    host_kwargs.pop("pin_memory", None)
    out = func(*host_args, **host_kwargs)
    into_host = name == "copy_" and here and not isinstance(args[0], DeviceTensor)
    if (here and (to_host or into_host)) or not (here or to_device):
        return out
    if _Graph.capturing is not None:
        _Graph.capturing.add(func, host_args, host_kwargs, out)
    known = {id(x.host): x for x in here}  # of operations in place

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else DeviceTensor(x)

    return tree_map(placed, out)


def _refuse_mixing(func: Any, name: str, args: tuple[Any, ...], strangers: list[Tensor]) -> None:
    """A single number of the host may take part in all that the device does."""
    into_host = name.startswith(("index", "_index")) and not isinstance(args[0], DeviceTensor)
    if into_host or (strangers and name not in _MIXED):
        shapes = [tuple(x.shape) for x in strangers]
        raise GpuError(f"{func}: tensors of the host, {shapes}, and of the device")


def _host_of(x: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.host
    return HOST if isinstance(x, torch.device) and _on_device(x) else x


def _let_gradients_pass() -> None:
    """Autograd asks for what switches between devices of a type; that of `meta` does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    kinds = (ctypes.c_void_p * 24).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    kinds[18] = kinds[14]  # ipu, meta: numbers of `c10::DeviceType`
    run = torch.autograd._engine_run_backward

    def run_here(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.set_multithreading_enabled(False):  # no thread for each device
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_here


def _let_tensors_move() -> None:
    """`cuda` means the device, wherever torch looks at the word before it comes to `_run`."""
    move = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def meant(x: Any) -> Any:
            return _STAND_IN if isinstance(x, str | torch.device) and _on_device(x) else x

        return move(self, *map(meant, args), **{name: meant(x) for name, x in kwargs.items()})

    Tensor.to = to

    def building(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def build(data: Any, *args: Any, device: Any = None, **rest: Any) -> Tensor:
            made = data if isinstance(data, DeviceTensor) else make(data, *args, **rest)
            return made if device is None else made.to(device)

        return build

    torch.tensor, torch.as_tensor = building(torch.tensor), building(torch.as_tensor)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    generator = torch.Generator

    class Generator(generator):
        def __new__(cls, device: Any = None) -> Any:
            return super().__new__(cls, HOST)

    torch.Generator = Generator


def _let_kernels_run() -> None:
    """Triton's interpreter gets the host's tensors."""
    from triton.runtime.interpreter import GridExecutor

    from imprint.models import kernels

    launch = GridExecutor.__call__

    def launch_on_host(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = tree_map(_host_of, (args, kwargs))

        def again() -> None:
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                launch(self, *args, **kwargs)

        again()
        if _Graph.capturing is not None:
            _Graph.capturing.steps.append(again)

    GridExecutor.__call__ = launch_on_host
    kernels._obstacle_of_gpu = lambda device: None


def _pretend() -> None:
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_name = lambda device=None: "a pretended GPU"
    cuda.mem_get_info = lambda device=None: (_MEMORY, _MEMORY)
    cuda.memory_allocated = cuda.memory_reserved = lambda device=None: 0
    cuda.max_memory_allocated = lambda device=None: 1
    cuda.synchronize = cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.Stream = cuda.Event = cuda.current_stream = _Nothing
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.CUDAGraph, cuda.graph = _Graph, _capture
    _let_gradients_pass()
    _let_tensors_move()
    _let_kernels_run()
    work = threading.Thread.run

    def work_with_device(self: threading.Thread) -> None:
        with _Mode():
            work(self)

    threading.Thread.run = work_with_device
    _Mode().__enter__()


assert not torch.cuda.is_available(), "there is a real GPU"
_pretend()
