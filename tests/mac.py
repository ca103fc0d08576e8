"""A Mac for machines that are none: a device "mps" that computes on the CPU and refuses what a Mac cannot do.

Whatever a call places on the device becomes a `MacTensor`. Under `Mac()` every operator on such tensors is looked at:

- nothing in float64 may come to be there, not even for a moment;
- the operator must have a kernel for MPS, or be built of others, by the table that torch itself is generated from:
  operators for CUDA alone fail, and so do those that a Mac would have to hand back to the CPU;
- tensors of the device and of the CPU may not meet, but for numbers (0-dimensional tensors) and indices;
- a generator draws on its own device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("mps:0")
CPU = torch.device("cpu")
DOUBLES = (torch.float64, torch.complex128)
ENTERING = (
    torch.Tensor.__getitem__,
    torch.Tensor.__invert__,
    torch.Tensor.contiguous,
)  # before any operator, torch enters the device
COPIES = ("aten::_to_copy", "aten::copy_")


class MacTensor(torch.Tensor):
    """Says it lies on the Mac's GPU; its numbers lie in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> MacTensor:
        if host.dtype in DOUBLES:
            raise TypeError(f"A Mac has no {host.dtype}: a tensor of shape {list(host.shape)} was to be one.")
        strides, offset = host.stride(), host.storage_offset()
        tensor: MacTensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=strides, storage_offset=offset, dtype=host.dtype, device=DEVICE
        )
        tensor.host = host
        return tensor

    def __repr__(self, **options: Any) -> str:
        return f"MacTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func} works on the Mac's tensors outside `with Mac():`.")


class MacGenerator(torch.Generator):
    """Draws on the Mac's GPU."""

    @property
    def device(self) -> torch.device:
        return DEVICE


class Mac(TorchDispatchMode):
    """While it is entered, there is a device "mps". `seen` are the names of all operators that ran there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        self._entered.enter_context(_for_all_threads())
        self._entered.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="mps") is seen, too
        self._entered.enter_context(torch.no_grad())  # torch would ask a real Mac for its gradients' stream
        self._entered.enter_context(_PythonCalls(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        is_here = any(isinstance(tensor, MacTensor) for tensor in tensors)
        target = kwargs.pop("device", None)
        if not is_here and (target is None or target.type != "mps"):
            return func(*args, **kwargs) if target is None else func(*args, **kwargs, device=target)
        if func is torch.ops.prim.device.default:
            return DEVICE
        self.check(func, name, tensors)
        if target is not None:
            kwargs["device"] = CPU
        result = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        if name == "aten::_to_copy" and target == CPU:
            return result
        own = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, MacTensor)}
        written_to_cpu = name == "aten::copy_" and not isinstance(args[0], MacTensor)
        if written_to_cpu:
            return args[0]
        return tree_map(lambda part: own[id(part)] if id(part) in own else _on_the_mac(part), result)

    def check(self, func: Any, name: str, tensors: list[Tensor]) -> None:
        self.seen.add(name)
        if not runs_on_mps(str(func._schema.name).removeprefix("aten::"), func._schema.overload_name):
            raise NotImplementedError(f"{func} has no kernel for MPS.")
        strangers = [t for t in tensors if not isinstance(t, MacTensor) and t.ndim and t.is_floating_point()]
        if strangers and name not in COPIES:
            raise RuntimeError(f"{func} was given tensors of the Mac's GPU and of the CPU, {list(strangers[0].shape)}.")


_SWITCHES = ExitStack()
_USERS: list[None] = []
_LOCK = Lock()


@contextmanager
def _for_all_threads() -> Iterator[None]:
    """Switches of the whole process: on with the first Mac, off with the last."""
    with _LOCK:
        if not _USERS:
            torch.__future__.set_overwrite_module_params_on_conversion(True)  # a weight that moves is another tensor
            _SWITCHES.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
            _SWITCHES.enter_context(mock.patch("torch.cuda._lazy_init", side_effect=AssertionError("a Mac, no CUDA")))
        _USERS.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _USERS.pop()
            if not _USERS:
                _SWITCHES.close()


class _PythonCalls(TorchFunctionMode):
    """What is decided before an operator is chosen."""

    def __init__(self, mac: Mac) -> None:
        super().__init__()
        self.mac = mac

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if generator is not None and device is not None and generator.device.type != torch.device(device).type:
            raise RuntimeError(f"A generator on {generator.device} cannot draw on {device}.")
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], MacTensor):
            return self._attention(*args, **kwargs)
        if func is torch.Tensor.tolist:
            return _host(args[0]).tolist()
        if func in ENTERING and isinstance(args[0], MacTensor):
            return MacTensor(func(*tree_map(_host, args), **kwargs))
        return func(*map(_numbered, args), **{name: _numbered(value) for name, value in kwargs.items()})

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        """MPS has a kernel of its own, which torch picks by a table that knows no devices but the machine's."""
        name = "aten::_scaled_dot_product_attention_math_for_mps"
        given = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        self.mac.check(torch.ops.aten._scaled_dot_product_attention_math_for_mps.default, name, given)
        host = torch.nn.functional.scaled_dot_product_attention(*tree_map(_host, args), **tree_map(_host, kwargs))
        return MacTensor(host)


def _numbered(value: Any) -> Any:
    """ "mps" is "mps:0", which only a Mac could find out."""
    is_mps = isinstance(value, str | torch.device) and str(value) == "mps"
    return DEVICE if is_mps else value


def _host(value: Any) -> Any:
    return value.host if isinstance(value, MacTensor) else value


def _on_the_mac(value: Any) -> Any:
    return MacTensor(value) if isinstance(value, Tensor) and not isinstance(value, MacTensor) else value


@cache
def _table() -> dict[str, tuple[frozenset[str], str | None]]:
    """By operator and overload: the dispatch keys it has kernels for, and the operator it is written with."""
    home = find_spec("torchgen")
    assert home is not None, "torchgen comes with torch"
    assert home.submodule_search_locations
    path = Path(home.submodule_search_locations[0]) / "packaged" / "ATen" / "native" / "native_functions.yaml"
    return dict(_entries(path.read_text()))


def _entries(text: str) -> Iterator[tuple[str, tuple[frozenset[str], str | None]]]:
    for entry in re.split(r"^- func: ", text, flags=re.MULTILINE)[1:]:
        name = entry.split("(", 1)[0]
        delegate = re.search(r"^  structured_delegate: (\S+)", entry, flags=re.MULTILINE)
        section = re.search(r"^  dispatch:\n((?:    .*\n)+)", entry, flags=re.MULTILINE)
        rows = section[1].splitlines() if section else []
        keys = {key.strip() for row in rows for key in row.split("#")[0].split(":")[0].split(",")}
        yield name, (frozenset(keys), delegate[1] if delegate else None)


def runs_on_mps(operator: str, overload: str = "") -> bool:
    """Whether a Mac computes it itself."""
    name = f"{operator}.{overload}" if overload else operator
    keys, delegate = _table()[name]
    if delegate is not None:
        return runs_on_mps(*delegate.split("."))
    return not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys)
