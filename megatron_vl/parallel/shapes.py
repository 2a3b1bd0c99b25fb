"""Tensors without memory, for building and running one rank of a model of any size on any machine.

Inside `ShapesOnly` integers and booleans are computed as ever, on the CPU: token ids, positions, counts, what is sent
to whom. Floats are tensors of the device `meta`: they have a shape and a format and no values. So code whose shapes
depend on integers (which tokens are scored, which rows of features go where) runs as written, and nothing large exists.
Where Python asks for the value of a float (a norm, a loss), it is told 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


@dataclass(frozen=True)
class Message:
    """A tensor that a rank has sent to one other rank, or received from it. group: name of the process group."""

    received: bool
    group: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class ShapesOnly(TorchDispatchMode):
    """While it is entered, floats have no values. Collectives move nothing: `torch.distributed` must be the backend
    "fake" (`parallel/fake.py`). messages: what went from rank to rank, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []
        self._known: dict[tuple, Any] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return _one(args[0].dtype)
        if func is aten._to_copy.default:
            return _converted(func, args, kwargs)
        tensors = _tensors(args) + (_tensors(kwargs.values()) if kwargs else [])
        if tensors and func is not aten.lift_fresh.default:
            return self._computed(func, args, kwargs, [tensor.is_meta for tensor in tensors])
        if tensors:  # what Python has made of numbers
            return args[0].to(META) if args[0].is_floating_point() else func(*args)
        if _makes(func):
            dtype = kwargs.get("dtype") or _default_dtype(func, args)
            kwargs["device"] = META if dtype.is_floating_point else CPU
        return func(*args, **kwargs)

    def _computed(
        self, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], shapes_only: Sequence[bool]
    ) -> Any:
        """A call with tensors: for real where all of them have values. shapes_only: whether each has none."""
        if kwargs.get("device") is not None:
            kwargs["device"] = META if any(shapes_only) else CPU
        if not any(shapes_only):
            return func(*args, **kwargs)
        if not all(shapes_only):
            if func in INDEXED:
                args = (args[0], _places(args[1]), *args[2:])
            args, kwargs = _on_meta(args), {name: _on_meta(value) for name, value in kwargs.items()}
        return self._shaped(func, args, kwargs)

    def _shaped(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call; shapes that it has been called with before are not derived again: layers are alike, and for many
        operations deriving is slow Python."""
        if not _makes_new(func):
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if key not in self._known:
            result = func(*args, **kwargs)
            results = result if isinstance(result, tuple) else (result,)
            if all(one is None or isinstance(one, torch.Tensor) for one in results):
                self._known[key] = _replaced(result, lambda t: t.new_empty_strided(t.shape, t.stride()))
            return result
        return _replaced(self._known[key], lambda t: t.new_empty_strided(t.shape, t.stride()))

    def _communicate(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call with nothing in the place of every tensor without memory."""
        given = [tensor for tensor in _tensors(args) if tensor.is_meta]
        if func is torch.ops.c10d.send.default or func is torch.ops.c10d.recv_.default:
            group = torch.distributed.ProcessGroup.unbox(args[1]).group_name
            received = func is torch.ops.c10d.recv_.default
            self.messages += [Message(received, group, tuple(t.shape), t.dtype) for t in args[0]]
        nothing = {id(tensor): torch.empty(0, dtype=tensor.dtype, device=CPU) for tensor in given}
        back = {id(empty): tensor for empty, tensor in zip(nothing.values(), given)}
        put = _replaced(args, lambda tensor: nothing.get(id(tensor), tensor))
        return _replaced(func(*put, **kwargs), lambda tensor: back.get(id(tensor), tensor))


def _converted(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Another format or device: floats stay without memory, integers on the CPU. A float that is asked for on the
    CPU is about to be read: it gets memory and ones."""
    (tensor,) = args
    dtype = kwargs.get("dtype") or tensor.dtype
    device = kwargs.pop("device", None)
    if not tensor.is_meta:
        return func(tensor, **kwargs) if not dtype.is_floating_point else func(tensor, **kwargs, device=META)
    if device == CPU:
        return torch.ones(tensor.shape, dtype=dtype, device=CPU)
    return func(tensor, **kwargs)


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


@cache
def _makes(func: Callable) -> bool:
    """Whether the operation makes a tensor of nothing; others without tensors ask about formats."""
    return any(argument.name == "device" for argument in func._schema.arguments)


@cache
def _makes_new(func: Callable) -> bool:
    """Whether the results are tensors of their own: no views, nothing changed in place."""
    schema = func._schema
    return all(one.alias_info is None for one in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Any:
    """What shapes of results depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_key(one) for one in value)
    return type(value), value


def _default_dtype(func: Callable, args: Sequence[Any]) -> torch.dtype:
    """Of what a factory makes that was not told: integers where all it was given are (`arange`, `full`)."""
    name = func._schema.name
    if name in ("aten::arange", "aten::full", "aten::scalar_tensor"):
        values = [value for value in args if isinstance(value, (bool, int, float))]
        if not any(isinstance(value, float) for value in values):
            return torch.int64
    if name in ("aten::randint", "aten::randperm"):
        return torch.int64
    return torch.get_default_dtype()


def _tensors(values: Any) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _replaced(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(one, change) for one in value)
    return value


def _on_meta(value: Any) -> Any:
    return _replaced(value, lambda tensor: tensor if tensor.is_meta else tensor.to(META))


def _places(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks as the positions that they select, while their values are there."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
