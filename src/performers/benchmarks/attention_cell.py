"""One cell of `performers benchmark attention`: a system, its inputs, and what is measured of them.

The three measurements are called in a process of their own and know nothing of each other. A cell is a dictionary:

    system       "performers", or one of the rivals below
    kernel       of FAVOR, None for exact attention
    backend      of `favor_attention`, and precision of `FavorFeatures`; None for rivals
    direction    "bidirectional" or "causal"
    dtype, length, batch_size, heads, head_dim, num_features, device, threads, seed
    seconds      how long the measurement is repeated
    product      the size of the matrices whose product gives the dense rate; of decoding, positions instead
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from performers.attention import FavorFeatures, FavorState, favor_attention
from performers.benchmarks.experiment import DONE, Cell, Figures
from performers.benchmarks.isolation import or_no_room, refuse_beyond_available_memory
from performers.memory import forget_peak, peak_memory, resident_memory

Attend = Callable[..., Tensor]

# Estimators whose parameters depend on the sequence: no phi(x) of a token alone to check the output against.
_DATA_DEPENDENT = ("softmax-sharp", "softmax-optimal")
_LONGEST_CHECKED = 131_072


@or_no_room
def layer_memory(cell: Cell) -> Figures:
    """Makes one forward and backward pass and weighs it.

    Returns:
        status; needed_bytes, of inputs, output, its gradient and theirs; total_bytes, at the peak; extra_bytes, the difference.
    """
    prepared = _Prepared(cell)
    on_cuda = prepared.device.type == "cuda"
    if on_cuda:
        prepared.run(prepared.leaves)  # what autotuning takes is not the pass's
        torch.cuda.synchronize(prepared.device)
        torch.cuda.reset_peak_memory_stats(prepared.device)
        before = torch.cuda.memory_allocated(prepared.device)
    else:
        # A few tokens, so that the pages of the libraries' code and what they set up once are there already.
        prepared.run(prepared.first_tokens(64))
        forget_peak()
        before = resident_memory()
    kept = prepared.run(prepared.leaves)
    wait(prepared.device)
    peak = torch.cuda.max_memory_allocated(prepared.device) if on_cuda else peak_memory()
    made = sum(tensor.nbytes for tensor in kept)
    needed = made + sum(tensor.nbytes for tensor in (*prepared.leaves, prepared.d_out))
    extra = max(peak - before - made, 0)
    return {"status": DONE, "needed_bytes": needed, "extra_bytes": extra, "total_bytes": needed + extra}


@or_no_room
def layer_time(cell: Cell) -> Figures:
    """Times forward and backward passes between two measurements of the dense rate.

    Returns:
        status; seconds, of the fastest pass; all_seconds; dense_rate in floating-point operations a second, and dense_product,
        which says of what; features, how many there are of a token; threads_used; error, the relative error of some rows of the
        output against float64.
    """
    prepared = _Prepared(cell)
    # On a GPU kernels are tuned to the length.
    prepared.run(prepared.leaves if prepared.device.type == "cuda" else prepared.first_tokens(2048))
    before = dense_rate(cell["product"], prepared.dtype, prepared.device)
    times: list[float] = []
    kept: list[Tensor] = []
    while len(times) < 2 or (sum(times) < cell["seconds"] and len(times) < 100):
        kept.clear()
        wait(prepared.device)
        started = time.perf_counter()
        kept += prepared.run(prepared.leaves)
        wait(prepared.device)
        times.append(time.perf_counter() - started)
    rate, product = max(before, dense_rate(cell["product"], prepared.dtype, prepared.device))
    return {
        "status": DONE,
        "seconds": min(times),
        "all_seconds": times,
        "dense_rate": rate,
        "dense_product": product,
        "features": prepared.features.size if prepared.features else cell["num_features"],
        "threads_used": torch.get_num_threads(),
        "error": prepared.error(kept[0]) if cell["length"] <= _LONGEST_CHECKED else None,
    }


@or_no_room
def decoding_time(cell: Cell) -> Figures:
    """Times the decoding of single tokens after the states have seen so many others, the positions taken in turn.

    Returns:
        status; seconds_per_token, for each position; ratio, of the last to the first; state_bytes.
    """
    prepared = _Prepared({**cell, "length": 64})
    features, device = prepared.features, prepared.device
    assert features is not None
    options: dict[str, Any] = {"is_causal": True, "return_state": True, "backend": cell["backend"]}
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(cell["seed"])
        states: list[FavorState] = []
        state: FavorState | None = None
        seen = 0
        for position in cell["positions"]:
            while seen < position:
                shape = (cell["batch_size"], cell["heads"], min(16_384, position - seen), cell["head_dim"])
                key, value = (
                    torch.randn(shape, generator=generator, device=device, dtype=prepared.dtype) for _ in range(2)
                )
                nobody = key[:, :, :0]
                state = favor_attention(nobody, key, value, features, state=state, **options)[1]
                seen += shape[2]
            assert state is not None
            states.append(state)
        tokens = [tuple(x.detach()[:, :, i : i + 1] for x in prepared.leaves) for i in range(64)]
        fastest = [math.inf] * len(states)
        started = time.perf_counter()
        while math.inf in fastest or time.perf_counter() - started < cell["seconds"]:
            for index, state in enumerate(states):
                wait(device)
                began = time.perf_counter()
                for q, k, v in tokens:
                    state = favor_attention(q, k, v, features, state=state, **options)[1]
                wait(device)
                fastest[index] = min(fastest[index], (time.perf_counter() - began) / len(tokens))
    return {
        "status": DONE,
        "seconds_per_token": fastest,
        "ratio": fastest[-1] / fastest[0],
        "state_bytes": states[0].nbytes,
    }


class _Prepared:
    """A system and its inputs.

    Attributes:
        leaves: what the pass is given and differentiates by: queries, keys and values.
        d_out: the gradient of the output.
        features: of FAVOR, None for exact attention.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self.device = torch.device(cell["device"])
        self.dtype: torch.dtype = getattr(torch, cell["dtype"])
        self.causal = cell["direction"] == "causal"
        if cell["threads"]:
            torch.set_num_threads(cell["threads"])
        if self.device.type == "cpu":
            refuse_beyond_available_memory()
        self.features: FavorFeatures | None = None
        if cell["kernel"] is not None:
            precision = cell["precision"] or "accurate"
            self.features = FavorFeatures(
                cell["head_dim"], cell["num_features"], cell["kernel"], seed=cell["seed"], precision=precision
            ).to(self.device)
        generator = torch.Generator(self.device).manual_seed(cell["seed"])
        shape = (cell["batch_size"], cell["heads"], cell["length"], cell["head_dim"])
        q, k, v, self.d_out = (
            torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) for _ in range(4)
        )
        self._inputs = (q, k, v)
        self.attend = _SYSTEMS[cell["system"]](cell, self.features)
        if cell["system"] == "flash-linear-attention-given":
            assert self.features is not None
            q, k = (self.features(x).to(x.dtype) for x in (q, k))
        self.leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))

    def first_tokens(self, number: int) -> tuple[Tensor, ...]:
        """The first tokens of the inputs, as inputs of their own."""
        return tuple(x.detach()[:, :, :number].clone().requires_grad_() for x in self.leaves)

    def run(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The output, and the gradients of the leaves."""
        out = self.attend(*leaves, self.causal)
        d_out = self.d_out if out.shape == self.d_out.shape else self.d_out[:, :, : out.shape[2]]
        return out.detach(), *torch.autograd.grad(out, leaves, d_out)

    def error(self, out: Tensor) -> float | None:
        """The relative error of some rows against what the system sets out to compute, in float64."""
        if self._cell["kernel"] in _DATA_DEPENDENT:
            return None
        rows = sorted({round(i * (out.shape[2] - 1) / 7) for i in range(8)})
        exact = rows_in_float64(*self._inputs, rows, self.causal, self.features)
        return float((out[:, :, rows].double() - exact).norm() / exact.norm())


def rows_in_float64(
    q: Tensor, k: Tensor, v: Tensor, rows: list[int], is_causal: bool, features: FavorFeatures | None
) -> Tensor:
    """Some rows of attention's output from the definition, in float64: FAVOR with these features, or exact without any.

    Returns:
        (B, H, len(rows), D).
    """
    with torch.no_grad():
        index = torch.tensor(rows, device=q.device)
        some = q[:, :, rows].double() * q.shape[-1] ** -0.5
        phi_q = some if features is None else features(q[:, :, rows].double())
        numerator, denominator = torch.zeros_like(some), torch.zeros_like(some[..., :1])
        for start in range(0, k.shape[2], 1024):
            key, value = k[:, :, start : start + 1024].double(), v[:, :, start : start + 1024].double()
            weights = torch.exp(some @ key.mT) if features is None else phi_q @ features(key, side="key").mT
            if is_causal:
                seen = torch.arange(start, start + key.shape[2], device=q.device) <= index[:, None]
                weights = weights * seen
            numerator += weights @ value
            denominator += weights.sum(-1, keepdim=True)
        return numerator / denominator


def dense_rate(size: int, dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    """The best rate of a product of two square matrices, in floating-point operations a second, and by what it was reached."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products: dict[str, Callable[[], Any]] = {"torch.matmul": lambda: a @ b}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # matmul may go to a library that is slow on this processor.
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    best = (0.0, "")
    for name, product in products.items():
        try:
            product()
        except (RuntimeError, AttributeError):
            continue
        for _ in range(3):
            wait(device)
            started = time.perf_counter()
            product()
            wait(device)
            best = max(best, (2 * size**3 / (time.perf_counter() - started), f"{size:,}^3 by {name}"))
    return best


def wait(device: torch.device) -> None:
    """Returns when the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _performers(cell: Cell, features: FavorFeatures | None) -> Attend:
    assert features is not None
    return lambda q, k, v, causal: favor_attention(q, k, v, features, is_causal=causal, backend=cell["backend"])


def _sdpa(cell: Cell, features: FavorFeatures | None) -> Attend:
    return lambda q, k, v, causal: scaled_dot_product_attention(q, k, v, is_causal=causal)


def _materialised(cell: Cell, features: FavorFeatures | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        return logits.softmax(-1) @ v

    return attend


def _textbook(cell: Cell, features: FavorFeatures | None) -> Attend:
    assert features is not None
    projection = features.projection.to(getattr(torch, cell["dtype"]))

    def phi(x: Tensor, over: tuple[int, ...]) -> Tensor:
        u = x @ projection.T * x.shape[-1] ** -0.25
        if cell["kernel"] == "relu":
            return torch.relu(u) + 1e-3
        u = u - x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)
        return torch.exp(u - u.detach().amax(over, keepdim=True)) + 1e-6

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        phi_q, phi_k = phi(q, (-1,)), phi(k, (-2, -1))
        if not causal:
            return (phi_q @ (phi_k.mT @ v)) / (phi_q @ phi_k.sum(-2).unsqueeze(-1))
        out, rows = [], 128
        state, total = (
            phi_k.new_zeros(*k.shape[:2], phi_k.shape[-1], v.shape[-1]),
            phi_k.new_zeros(phi_k[..., :1, :].shape),
        )
        for a, b, c in zip(*(x.split(rows, 2) for x in (phi_q, phi_k, v)), strict=True):
            weights = (a @ b.mT).tril()
            out.append((weights @ c + a @ state) / (weights.sum(-1, keepdim=True) + a @ total.mT))
            state, total = state + b.mT @ c, total + b.sum(-2, keepdim=True)
        return torch.cat(out, 2)

    return attend


def _performer_pytorch(cell: Cell, features: FavorFeatures | None) -> Attend:
    from performer_pytorch import FastAttention  # pyright: ignore[reportMissingImports]

    assert features is not None
    theirs = FastAttention(
        cell["head_dim"],
        cell["num_features"],
        causal=cell["direction"] == "causal",  # without its CUDA extension by a form that keeps L x M x D numbers
        generalized_attention=cell["kernel"] == "relu",
    ).to(features.projection.device)
    theirs.projection_matrix = features.projection
    return lambda q, k, v, causal: theirs(q, k, v)


def _flash_linear_attention(cell: Cell, features: FavorFeatures | None) -> Attend:
    from fla.ops.linear_attn import chunk_linear_attn  # pyright: ignore[reportMissingImports]

    assert features is not None
    compute: Any = chunk_linear_attn  # torch's decorator hides its arguments from the type checker
    given = cell["system"] == "flash-linear-attention-given"

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if not given:
            q, k = (features(x).to(x.dtype) for x in (q, k))
        return compute(*(x.transpose(1, 2) for x in (q, k, v)), scale=1.0)[0].transpose(1, 2)

    return attend


_SYSTEMS: dict[str, Callable[[Cell, Any], Any]] = {
    "performers": _performers,
    "sdpa": _sdpa,
    "materialised": _materialised,
    "textbook": _textbook,
    "performer-pytorch": _performer_pytorch,
    "flash-linear-attention": _flash_linear_attention,
    "flash-linear-attention-given": _flash_linear_attention,
}
