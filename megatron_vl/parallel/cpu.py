"""Run Megatron-Core 0.16.1 on CPU with gloo.

Megatron-Core asks for ``torch.cuda.current_device()`` or ``device="cuda"`` in some 250 places and compares
``Tensor.type()`` with CUDA type names in its optimizers. ``install()`` redirects those calls, once per process,
and refuses when a CUDA device is present. Nothing else in this package asks whether the device is a CPU.

Factories are wrapped in place rather than through a ``TorchFunctionMode``: a mode costs microseconds on *every*
torch call, a wrapped factory only on its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_vl.errors import ConfigError

_FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "linspace",
    "empty_like", "zeros_like", "ones_like", "full_like", "eye", "as_tensor",
)  # fmt: skip
_installed = False


class InertStream:
    """Stands in for CUDA streams and events: everything on CPU is already in order."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: Any = None) -> InertStream:
        return event if event is not None else InertStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        raise RuntimeError("CUDA events do not measure time on CPU: use time.perf_counter()")


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory with ``device="cuda..."`` read as CPU and ``pin_memory`` dropped."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _tensor_to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if args and isinstance(args[0], (str, torch.device)) and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """Answer ``torch.cuda.FloatTensor`` for a CPU float tensor: the optimizers compare with that string."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and answer.startswith("torch.") and ".cuda." not in answer:
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


def _cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    del args, kwargs
    return torch.get_rng_state()


def _set_cpu_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    del args, kwargs
    torch.set_rng_state(new_state)


def refuse_if_cuda() -> None:
    """Raise ConfigError when a CUDA device is present: the redirects would silently leave it idle."""
    if torch.cuda.is_available():
        raise ConfigError(
            f"parallel.device = cpu: {torch.cuda.device_count()} CUDA device(s) are visible and would stay idle; "
            "run with parallel.device=cuda, or hide them with CUDA_VISIBLE_DEVICES=''"
        )


def installed() -> bool:
    """Whether ``install`` has run in this process."""
    return _installed


def install() -> None:
    """Redirect Megatron-Core's CUDA calls to CPU; a second call does nothing.

    Raises:
        ConfigError: when a CUDA device is present.
    """
    global _installed
    refuse_if_cuda()
    if _installed:
        return
    _installed = True
    _device_constructors()  # `with torch.device(...)` knows factories by identity, and remembers those of its first use
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.to = _tensor_to(torch.Tensor.to)
    torch.Tensor.type = _tensor_type(torch.Tensor.type)

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.set_device = lambda *args, **kwargs: None
    torch.cuda.Stream = torch.cuda.Event = InertStream
    torch.cuda.current_stream = torch.cuda.default_stream = InertStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.get_rng_state = _cpu_rng_state
    torch.cuda.set_rng_state = _set_cpu_rng_state
    torch.cuda.manual_seed = torch.manual_seed
    _redirect_megatron_rng()


def _redirect_megatron_rng() -> None:
    """Give Megatron-Core's RNG tracker the CPU generator, so that dropout and recompute draw alike."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._lazy_call = lambda fn: fn()
    megatron_random._get_cuda_rng_state = _cpu_rng_state
    megatron_random._set_cuda_rng_state = _set_cpu_rng_state
