"""The C++ kernels: compiled on first use for the processor at hand, kept in the user's cache, called through ctypes.

Needed is a C++17 compiler (`$CXX`, or c++, g++ or clang++ on the path), once: nothing of torch's headers, no ninja.

K channels that are read  N channels that are written
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from floyd.errors import EngineError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "kernels"
_COMMON = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# In the order in which they are tried. Without OpenMP, which Apple's compiler lacks, everything runs on one thread.
_TARGETS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",))
_TIMEOUT_S = 300

_POINTERS = "x x2 weight bias add scale shift text_k text_v text_bias rows columns groups out".split()
_NUMBERS = (
    "batch height width x_height x_width channels channels2 out_channels bias_stride film_stride add_is_halved "
    "is_doubled pools num_groups act tile kernel stride padding heads head_width text looks_at_pixels"
).split()


class Op(ctypes.Structure):
    """One operation: kernels/op.h, field by field."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_float) for name in ("eps", "alpha", "factor")),
    )


KINDS = "from_nchw to_nchw conv3 conv norm linear pool attention layer_norm geglu".split()
ACTS = "none silu gelu mish relu".split()


class Kernels:
    """The compiled library."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise EngineError(
                f"The compiled engine {path} cannot be loaded: delete it and try again. {error}"
            ) from error
        self.path, self.library = path, library
        self.lanes: int = library.floyd_lanes()
        self.has_threads = bool(library.floyd_has_threads())
        self._work, self._run, self._pack = library.floyd_work, library.floyd_run, library.floyd_pack_conv3
        library.floyd_op_bytes.restype = self._work.restype = ctypes.c_int64
        self._run.restype = self._pack.restype = None
        assert library.floyd_op_bytes() == ctypes.sizeof(Op), "op.h and native.py differ"

    def work_floats(self, op: Op, threads: int) -> int:
        """How much scratch an operation needs."""
        return int(self._work(ctypes.byref(op), ctypes.c_int32(threads)))

    def run(
        self, ops: ctypes.Array[Op], work: int, threads: int, seconds: ctypes.Array[ctypes.c_double] | None = None
    ) -> None:
        self._run(ops, ctypes.c_int64(len(ops)), ctypes.c_void_p(work), ctypes.c_int32(threads), seconds)

    def pack_conv3(
        self,
        weight_NK33: Tensor,
        packed: Tensor,
        *,
        tile: int,
        channels: int,
        out_channels: int,
        place_K: Tensor,
        factor: float,
        threads: int,
    ) -> None:
        """A kernel times `factor`, transformed for tiles of `tile` x `tile` pixels (2 or 4: arXiv:1509.09308).

        `channels`, `out_channels`: of the maps that it reads and writes, padded. `place_K`, int32: where in a row each
        of the K channels lies. `packed`: [(tile + 2)^2 channels out_channels] zeros, to be filled.
        """
        if weight_NK33.stride(2) != 3 * weight_NK33.stride(3):
            weight_NK33 = weight_NK33.contiguous()
        long, pointer = ctypes.c_int64, ctypes.c_void_p
        self._pack(
            pointer(weight_NK33.data_ptr()), *(long(weight_NK33.stride(axis)) for axis in (0, 1, 3)),
            *(long(size) for size in weight_NK33.shape[:2]), pointer(place_K.data_ptr()), long(channels),
            long(out_channels), ctypes.c_float(factor), long(tile), pointer(packed.data_ptr()),
            ctypes.c_int32(threads),
        )  # fmt: skip


@cache
def kernels() -> Kernels:
    """The library for this processor, compiled if it is not in the cache."""
    compiler = found_compiler()
    target, traits = _target(compiler)
    path = cache_folder() / f"kernels-{_name(compiler, target, traits)}.so"
    if not path.exists():
        _compile(compiler, target, path)
    return Kernels(path)


@cache
def are_here() -> bool:
    """Whether the kernels can be had. Found out once: a compiler that fails takes its time."""
    try:
        kernels()
    except EngineError as error:
        log.info("Without the engine 'winograd': %s", error)
        return False
    return True


def cache_folder() -> Path:
    """Where compiled engines are kept; `XDG_CACHE_HOME` moves it."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "floyd" / "engines"


def found_compiler() -> list[str]:
    """Its words on a command line. EngineError: there is none."""
    if sys.platform == "win32":
        raise EngineError(
            "The engine's kernels are compiled with GCC or Clang, which floyd does not look for on Windows. Use WSL, "
            "the engine 'openvino', or no engine."
        )
    told = os.environ.get("CXX")
    for name in (told,) if told else ("c++", "g++", "clang++"):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    sought = f"the one that CXX names, {told!r}" if told else "c++, g++ or clang++"
    raise EngineError(
        f"The engine's kernels are compiled on first use, and no C++ compiler was found ({sought}). Install one "
        "(Debian and Ubuntu: apt install g++), use the engine 'openvino', or no engine."
    )


def _target(compiler: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The first set of flags that the compiler takes, and what it then says of itself and of the processor."""
    failures = []
    for flags in _TARGETS:
        done = _called([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        if done.returncode == 0:
            return flags, done.stdout
        failures.append(done.stderr.strip())
    raise EngineError(f"The C++ compiler {' '.join(compiler)} cannot compile for this processor: {failures[0][-500:]}")


def _name(compiler: Sequence[str], target: Sequence[str], traits: str) -> str:
    """Of everything that decides what is compiled."""
    digest = hashlib.sha256(repr((compiler, _COMMON, target, traits)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _compile(compiler: Sequence[str], target: Sequence[str], path: Path) -> None:
    """Beside its place and then into it: whoever compiles the same at the same time does no harm."""
    log.info("Compiling the engine's kernels, once, into %s.", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            done = _called([*compiler, *_COMMON, *target, str(SOURCES / "engine.cpp"), "-o", str(made)])
            if done.returncode != 0:
                raise EngineError(
                    f"The C++ compiler {' '.join(compiler)} failed on the engine's kernels; another one can be named "
                    f"in CXX. It said:\n{done.stderr[-2000:]}"
                )
            made.replace(path)
    except OSError as error:
        raise EngineError(
            f"The compiled engine cannot be kept in {path.parent}: {error}. Set XDG_CACHE_HOME to a folder that can be "
            "written."
        ) from error


def _called(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"The C++ compiler {command[0]} cannot be run: {error}") from error
