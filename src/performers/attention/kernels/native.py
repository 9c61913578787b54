"""FAVOR attention on CPUs in C++, compiled on first use with the machine's compiler.

`native.cpp` needs no headers of torch or Python: it is compiled for the processor at hand, kept in the user's cache folder
($XDG_CACHE_HOME, or ~/.cache) under a name that says what it was made from, and called through ctypes. Without a compiler, or
when anything on the way fails, `supports` says no for good, and `unavailable_reason` says why. Nothing happens at import.

float16 and bfloat16 inputs are computed in float32; but where the processor has matrix tiles for bfloat16 (AMX), products of
bfloat16 inputs are taken from rounded factors, except that the rows of the features are a sum of two bfloat16 numbers, which
keeps the exponents exact, unless `fast`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from performers.attention.kernels.state import Request, StateTensors, Upstream

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
# What tells the compiler to use all that this processor has; the second is for compilers that know the first for x86 only.
_TARGETS = ("-march=native", "-mcpu=native")
_COMPILE_SECONDS = 300

# The numbers that native.cpp knows them by.
_KERNELS = {
    "softmax": 0,
    "softmax-hyperbolic": 0,
    "softmax-reg": 0,
    "softmax-optimal": 0,
    "softmax-sharp": 0,
    "softmax-prototypes": 0,
    "exp": 0,
    "relu": 1,
    "elu": 2,
    "sigmoid": 3,
    "tanh": 4,
    "identity": 5,
}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64))


_NUMBERS = ("batch", "heads", "queries", "keys", "dim", "value_dim", "features")
_CHOICES = ("kernel", "dtype", "causal", "fast", "threads", "segments")
_INPUTS = ("query", "key", "value", "query_rows", "key_rows", "metric", "bias")
_STATES = ("past_numerator", "past_denominator", "past_log", "after_numerator", "after_denominator", "after_log")
_GRADIENTS = (
    "d_after_numerator",
    "d_after_denominator",
    "d_query",
    "d_key",
    "d_value",
    "d_past_numerator",
    "d_past_denominator",
)


class _Call(ctypes.Structure):
    """`struct Call` of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_NUMBERS, *_CHOICES)),
        *((name, _Tensor) for name in (*_INPUTS, *_STATES, "normaliser", "out")),
        ("mask", ctypes.c_void_p),
        ("cu_seqlens", ctypes.c_void_p),
        *((name, _Tensor) for name in _GRADIENTS),
    )


class _Library:
    """The compiled library, built or opened when it is first asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tried = False
        self._handle: ctypes.CDLL | None = None
        self.reason: str | None = None

    def handle(self) -> ctypes.CDLL | None:
        """None where there is none to be had; `reason` then says why."""
        if not self._tried:
            with self._lock:
                if not self._tried:
                    self._open()
                    self._tried = True
        return self._handle

    def _open(self) -> None:
        compiler = _compiler()
        if compiler is None:
            self.reason = "there is no C++ compiler ($CXX, c++, g++ or clang++)"
            return
        try:
            self._handle = _load(compiler)
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
            self.reason = f"{' '.join(compiler)}: {error}" + (f"\n{detail[-2000:]}" if detail else "")
            warnings.warn(f"FAVOR attention runs without its native kernels: {self.reason}", stacklevel=2)


_LIBRARY = _Library()


def unavailable_reason() -> str | None:
    """Why the native backend cannot be used on this machine; None if it can."""
    _LIBRARY.handle()
    return _LIBRARY.reason


def _available() -> bool:
    return _LIBRARY.handle() is not None


# Where a row hangs on a few features, products of numbers rounded to 16 bits are not averaged, nor are they where signs cancel.
_FEWEST_FEATURES = 32
_SIGNED = ("identity", "tanh")


def supports(request: Request) -> bool:
    """Whether this backend can take these inputs: on the CPU, in at most 32 bits, and a kernel that it knows."""
    query, key, value, rows, *_ = request
    kernel = request.kernel
    return (
        kernel in _KERNELS
        and rows.queries.shape[-2] >= _FEWEST_FEATURES
        and (query.dtype == torch.float32 or kernel not in _SIGNED)
        and all(x.device.type == "cpu" for x in (query, key, value, *rows))
        and query.dtype in _DTYPES
        and key.dtype == value.dtype == query.dtype
        and not request.learned
        and _available()
    )


def forward(request: Request) -> tuple[Tensor, Tensor, StateTensors]:
    """The output (B, H, Lq, Dv), one number per row when causal, and the state after the last key."""
    out, normaliser = request.output(), request.normaliser()
    after = StateTensors(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in request.state))
    call = _Arguments(request)
    call.tensors(out=out, normaliser=normaliser if request.is_causal else None)
    if request.cu_seqlens is None:
        call.tensors(after_numerator=after.numerator, after_denominator=after.denominator, after_log=after.log_scale)
    else:  # nobody asks for it
        for tensor, past in zip(after, request.state, strict=True):
            tensor.copy_(past)
    call.run("performers_favor_forward")
    return out, normaliser, after


def backward(upstream: Upstream, request: Request) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, and of the past numerator and denominator."""
    wanted = (*request[:3], request.state.numerator, request.state.denominator)
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted)
    d_query, d_key, d_value, d_past_numerator, d_past_denominator = gradients
    call = _Arguments(request)
    call.tensors(out=upstream.d_out, normaliser=upstream.normaliser if request.is_causal else None)
    call.tensors(d_query=d_query, d_key=d_key, d_value=d_value)
    if request.cu_seqlens is None:
        call.tensors(
            after_numerator=upstream.after.numerator,
            after_denominator=upstream.after.denominator,
            after_log=upstream.after.log_scale,
            d_after_numerator=upstream.d_numerator,
            d_after_denominator=upstream.d_denominator,
            d_past_numerator=d_past_numerator,
            d_past_denominator=d_past_denominator,
        )
    else:  # the past is the empty state
        d_past_numerator.zero_()
        d_past_denominator.zero_()
    call.run("performers_favor_backward")
    return gradients


class _Arguments:
    """One call: the numbers and addresses that native.cpp reads, and the tensors that must outlive it."""

    def __init__(self, request: Request) -> None:
        query, key, value, rows, state, key_padding_mask, cu_seqlens, kernel, is_causal, fast, _ = request
        heads = query.shape[:2]
        self._kept: list[Tensor] = []
        self._call = call = _Call(
            *heads, query.shape[2], key.shape[2], query.shape[3], value.shape[3], rows.queries.shape[2]
        )
        call.kernel, call.dtype, call.causal, call.fast = _KERNELS[kernel], _DTYPES[query.dtype], is_causal, fast
        call.threads, call.segments = torch.get_num_threads(), -1
        self.tensors(query=query, key=key, value=value)
        query_rows, key_rows, metric, bias = (x.expand(*heads, *x.shape[2:]) for x in rows)
        self.tensors(query_rows=query_rows, key_rows=key_rows, metric=metric, bias=bias)
        numerator, denominator, log_scale = (x.contiguous() for x in state)
        self.tensors(past_numerator=numerator, past_denominator=denominator, past_log=log_scale)
        if key_padding_mask is not None:
            call.mask = self._address(key_padding_mask.contiguous())
        if cu_seqlens is not None:
            call.segments = len(cu_seqlens) - 1
            call.cu_seqlens = self._address(cu_seqlens.to(torch.int64).contiguous())

    def _address(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()

    def tensors(self, **named: Tensor | None) -> None:
        """Set fields of these names; None leaves a field null."""
        for name, x in named.items():
            if x is None:
                continue
            if x.stride(-1) != 1 and name != "normaliser":
                x = x.contiguous()
            batch, head, *rest = x.stride()
            setattr(self._call, name, _Tensor(self._address(x), batch, head, rest[0] if rest else 1))

    def run(self, function: str) -> None:
        """Call `function` of the library.

        Raises:
            MemoryError: there was none for its scratch.
        """
        library = _LIBRARY.handle()
        assert library is not None
        if getattr(library, function)(ctypes.byref(self._call)):
            raise MemoryError("FAVOR attention found no memory for its scratch.")


def _compiler() -> list[str] | None:
    """The command of the C++ compiler."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen and shutil.which(chosen[0]):
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def _load(compiler: list[str]) -> ctypes.CDLL:
    """The library for this source, compiler and processor, from the cache or compiled into it."""
    target, macros = _probed(compiler)
    command = [*compiler, target, *_FLAGS]
    made_from = _SOURCE.read_bytes() + macros + " ".join(command).encode()
    name = f"native-{hashlib.sha256(made_from).hexdigest()[:32]}.so"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "performers"
        if not (cache / name).exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                # Another process may be at the same: whoever is last replaces the other's file by an equal one.
                os.replace(_compiled(command, Path(folder)), cache / name)
        return _functions(cache / name)
    except (OSError, RuntimeError):  # no home, or a folder that cannot be written to or run from
        with tempfile.TemporaryDirectory() as folder:  # what is open stays open when its file goes
            return _functions(_compiled(command, Path(folder)))


def _probed(compiler: list[str]) -> tuple[str, bytes]:
    """The option that makes the compiler use this processor, and the macros it then predefines: its version among them, and
    every kind of instruction.
    """
    for target in _TARGETS:
        command = [*compiler, target, *_FLAGS[:2], "-dM", "-E", "-x", "c++", os.devnull]
        probe = subprocess.run(command, capture_output=True, check=False, timeout=_COMPILE_SECONDS)
        if probe.returncode == 0:
            return target, probe.stdout
    raise OSError(f"it takes none of {', '.join(_TARGETS)}")


def _compiled(command: list[str], folder: Path) -> Path:
    target = folder / "native.so"
    subprocess.run(
        [*command, str(_SOURCE), "-o", str(target)],
        capture_output=True,
        text=True,
        check=True,
        timeout=_COMPILE_SECONDS,
    )
    return target


def _functions(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function in (library.performers_favor_forward, library.performers_favor_backward):
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], ctypes.c_int
    return library
