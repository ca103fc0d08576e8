"""Networks whose weights are not in memory until they are used: they know where to read them again.

A sleeping network is the object that it was, with weights on the meta device: its configuration can be asked, and
whoever holds it sees it wake. `placement.shared` wakes it for its first user, and after its last one that naps sleeps
again.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from threading import RLock, Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

log = logging.getLogger(__name__)

Load = Callable[[], nn.Module]
_PAGE = 4096
_CPU = torch.device("cpu")


@dataclass(eq=False)
class _Sleeper:
    load: Load
    naps: bool
    is_asleep: bool = False
    home: torch.device = _CPU  # where it wakes
    dtype: torch.dtype | None = None  # in which it wakes; None: as it is loaded
    coming: Future[nn.Module] | None = None  # fetched ahead


_SLEEPERS: WeakKeyDictionary[nn.Module, _Sleeper] = WeakKeyDictionary()
_LOCK = RLock()


def can_sleep(module: nn.Module) -> bool:
    """Whether it is known where its weights come from."""
    return module in _SLEEPERS


def is_asleep(module: object) -> bool:
    sleeper = _SLEEPERS.get(module) if isinstance(module, nn.Module) else None
    return sleeper is not None and sleeper.is_asleep


def remember(
    module: nn.Module, load: Load, *, naps: bool = False, is_asleep: bool = False, home: torch.device | None = None
) -> None:
    """`load` makes the network anew in main memory, cast and quantized as it is wanted. With `naps` its weights leave
    memory after each use. `home`: where one that sleeps already is to lie."""
    with _LOCK:
        _SLEEPERS[module] = _Sleeper(load, naps, is_asleep, home or _CPU)


def home_of(module: nn.Module) -> torch.device | None:
    """Where a sleeping network will lie when it wakes; None for one that is awake."""
    sleeper = _SLEEPERS.get(module)
    return sleeper.home if sleeper is not None and sleeper.is_asleep else None


def forget(module: nn.Module) -> None:
    """It is no longer what is on the disk: its weights were changed."""
    with _LOCK:
        _SLEEPERS.pop(module, None)


def put_to_sleep(module: nn.Module) -> None:
    """Let go of its weights. ValueError for one of which nobody knows where to read them again."""
    with _LOCK:
        sleeper = _SLEEPERS.get(module)
        if sleeper is None:
            raise ValueError(f"This {type(module).__name__} came from no checkpoint: its weights would be lost.")
        if not sleeper.is_asleep:
            first = next(module.parameters(), None)
            if first is not None:
                sleeper.home = first.device
            dtype = getattr(module, "dtype", None)
            sleeper.dtype = dtype if isinstance(dtype, torch.dtype) else None
            _become(module, _shell(module))
            sleeper.is_asleep = True
        sleeper.coming = None


def wake(module: nn.Module) -> None:
    """Read the weights of a sleeping network; nothing for any other."""
    with _LOCK:
        sleeper = _SLEEPERS.get(module)
        if sleeper is None or not sleeper.is_asleep:
            return
        coming, sleeper.coming = sleeper.coming, None
        loaded = sleeper.load() if coming is None else coming.result()
        if sleeper.dtype not in (None, getattr(loaded, "dtype", None)):
            loaded = loaded.to(sleeper.dtype)
        if sleeper.home.type != "cpu":
            loaded = loaded.to(sleeper.home)
        _become(module, loaded)
        sleeper.is_asleep = False


def after_use(module: nn.Module) -> None:
    """The last user is gone."""
    sleeper = _SLEEPERS.get(module)
    if sleeper is not None and sleeper.naps and not sleeper.is_asleep:
        put_to_sleep(module)
        release()


def fetch_ahead(module: object) -> None:
    """Begin to read a sleeping network's weights behind what is computing; `wake` will take them."""
    with _LOCK:
        sleeper = _SLEEPERS.get(module) if isinstance(module, nn.Module) else None
        if sleeper is None or not sleeper.is_asleep or sleeper.coming is not None:
            return
        coming: Future[nn.Module] = Future()
        sleeper.coming = coming
    Thread(target=_fetch, args=(sleeper.load, coming), name="floyd-fetch", daemon=True).start()


def drop_fetched(module: object) -> None:
    """What was fetched ahead is not needed after all."""
    with _LOCK:
        sleeper = _SLEEPERS.get(module) if isinstance(module, nn.Module) else None
        if sleeper is not None:
            sleeper.coming = None


def _fetch(load: Load, coming: Future[nn.Module]) -> None:
    try:
        loaded = load()
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            _touch(tensor)
    except BaseException as error:  # it is for the one who waits
        coming.set_exception(error)
    else:
        coming.set_result(loaded)


def _touch(tensor: torch.Tensor) -> None:
    """A mapped file is read when its pages are first looked at; they are, here."""
    if tensor.device.type == "cpu" and tensor.numel() and tensor.is_contiguous():
        tensor.detach().reshape(-1).view(torch.uint8)[::_PAGE].sum()


def _shell(module: nn.Module) -> nn.Module:
    """A copy without weights."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        hollow = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(hollow, requires_grad=tensor.requires_grad) if is_parameter else hollow
    return deepcopy(module, memo)


def _become(module: nn.Module, other: nn.Module) -> None:
    """Take another network's weights and layers; hooks and everything else stay."""
    module._parameters, module._buffers, module._modules = other._parameters, other._buffers, other._modules


def release() -> None:
    """What nobody holds goes back to the system: the accelerator's memory and, where the C library tells, ours."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
