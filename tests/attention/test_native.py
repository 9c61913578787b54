"""The native CPU backend by itself: what the laws do not reach through "auto", and what happens where it cannot be compiled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from performers.attention.features import FeatureRows, kernel_of
from performers.attention.kernels import native
from performers.attention.kernels.reference import reference
from performers.attention.kernels.state import Request, StateTensors, Upstream

needs_native = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
# Relative to the largest entry.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


class Problem(NamedTuple):
    """Inputs of one call, and what flows back into it."""

    query: Tensor
    key: Tensor
    value: Tensor
    rows: FeatureRows
    state: StateTensors
    mask: Tensor | None
    kernel: str
    is_causal: bool
    d_out: Tensor
    d_after: tuple[Tensor, Tensor]


def draw(
    kernel: str = "softmax",
    is_causal: bool = False,
    queries: int = 150,
    keys: int = 150,
    dim: int = 24,
    value_dim: int = 20,
    features: int = 50,
    dtype: torch.dtype = torch.float32,
    own_rows: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    masked: bool = False,
) -> Problem:
    """Two sequences and two heads with a past state; `own_rows` gives every head and sequence features of its own."""
    generator = torch.Generator().manual_seed(queries + keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lead = (2, 2) if own_rows else (1, 1)
    rows = FeatureRows(
        normal(*lead, features, dim) * dim**-0.25,
        normal(*lead, features, dim) * dim**-0.25,
        normal(*lead, dim).abs() * dim**-0.5,
        normal(*lead, features),
    )
    exponential = kernel_of(kernel).scaled
    state = StateTensors(
        normal(2, 2, features, value_dim),
        1 + normal(2, 2, features).abs(),
        normal(2, 2, features) if exponential else torch.zeros(2, 2, features),
    )
    d_after = (normal(2, 2, features, value_dim), normal(2, 2, features))
    q, k, v = normal(2, 2, queries, dim), normal(2, 2, keys, dim), normal(2, 2, keys, value_dim)
    inputs = [layout((x * 0.5).to(dtype)) for x in (q, k, v)]
    mask = torch.rand(2, keys, generator=generator) > 0.3 if masked else None
    d_out = normal(2, 2, queries, value_dim).to(dtype)
    return Problem(*inputs, rows, state, mask, kernel, is_causal, d_out, d_after)


def run(problem: Problem) -> list[Tensor]:
    """The output, the state after it, and all gradients, by the native backend."""
    q, k, v, rows, state, mask, kernel, is_causal, d_out, d_after = problem
    request = Request(q, k, v, rows, state, mask, None, kernel, is_causal)
    assert native.supports(request)
    out, normaliser, after = native.forward(request)
    return [out, *after, *native.backward(Upstream(d_out, *d_after, normaliser, after), request)]


def oracle(problem: Problem) -> list[Tensor]:
    """The same by autograd, in float64."""
    q, k, v, rows, state, mask, kernel, is_causal, d_out, d_after = problem
    inputs = [x.double().requires_grad_() for x in (q, k, v, state.numerator, state.denominator)]
    past = StateTensors(*inputs[3:], state.log_scale.double())
    out, after = reference(Request(*inputs[:3], rows, past, mask, None, kernel, is_causal))
    outputs, upstream = (out, after.numerator, after.denominator), (d_out.double(), *(x.double() for x in d_after))
    gradients = torch.autograd.grad(outputs, inputs, upstream, materialize_grads=True)
    return [x.detach() for x in (out, *after)] + list(gradients)


NAMES = ["out", "numerator", "denominator", "log_scale", "d_query", "d_key", "d_value", "d_past_num", "d_past_den"]


def assert_equal_to_oracle(problem: Problem) -> None:
    tolerance = TOLERANCE[problem.query.dtype]
    for name, actual, expected in zip(NAMES, run(problem), oracle(problem), strict=True):
        assert actual.shape == expected.shape
        assert actual.is_contiguous()
        if not actual.numel():
            continue
        error = (actual.double() - expected).abs().max().item()
        assert error <= tolerance * max(expected.abs().max().item(), 1.0), f"{name} is off by {error:.3g}"


@needs_native
@pytest.mark.parametrize("kernel", ["softmax", "exp", "relu", "elu", "sigmoid"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(150, 150), (1, 1), (0, 70), (70, 0), (200, 60), (60, 200)])
def test_states_and_their_gradients_equal_the_oracles(kernel: str, is_causal: bool, queries: int, keys: int) -> None:
    assert_equal_to_oracle(draw(kernel, is_causal, queries, keys, masked=keys > 1))


@needs_native
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_rows_of_every_head_and_sequence(kernel: str, is_causal: bool, dtype: torch.dtype) -> None:
    assert_equal_to_oracle(draw(kernel, is_causal, own_rows=True, dtype=dtype))


@needs_native
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sizes", [(64, 64, 256), (17, 33, 39), (16, 80, 100), (100, 16, 33)], ids=str)
def test_sizes_that_fit_no_tile(sizes: tuple[int, int, int], is_causal: bool, dtype: torch.dtype) -> None:
    dim, value_dim, features = sizes
    assert_equal_to_oracle(draw("softmax", is_causal, 131, 131, dim, value_dim, features, dtype))


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _with_strange_columns(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _shared(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


@needs_native
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", [_transposed, _with_strange_columns, _shared])
def test_any_strides(layout: Callable[[Tensor], Tensor], is_causal: bool) -> None:
    assert_equal_to_oracle(draw("softmax", is_causal, layout=layout))


@needs_native
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads: int, is_causal: bool) -> None:
    problem, before = draw("softmax", is_causal, 3000, 3000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(problem)
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(problem), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("scale", [5.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_out_keys_end_panels_and_leave_no_trace_before_them(scale: float, dtype: torch.dtype) -> None:
    problem = draw("softmax", True, 300, 300, 64, 64, 64)
    q, k, v = (x.mul(2 * scale).to(dtype) for x in problem[:3])
    state = StateTensors.empty((2, 2), 64, 64, True, torch.empty(()))

    def out(k: Tensor, v: Tensor) -> Tensor:
        return native.forward(Request(q, k, v, problem.rows, state, is_causal=True))[0]

    before = out(k, v)
    assert before.isfinite().all()
    for t in (3, 47, 63, 64, 130, 298):
        for factor in (0.0, 1.5, 1000.0):
            changed = [torch.cat([x[:, :, : t + 1], x[:, :, t + 1 :] * factor], 2) for x in (k, v)]
            assert torch.equal(out(*changed)[:, :, : t + 1], before[:, :, : t + 1]), (t, factor)


@needs_native
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_whose_square_overflows_count_as_padding(is_causal: bool) -> None:
    problem = draw("softmax", is_causal)
    far, weight = problem.key.clone(), torch.ones(2, 150, dtype=torch.bool)
    far[:, :, [3, 70, 149]] = 1e30
    weight[:, [3, 70, 149]] = False
    expected = run(problem._replace(mask=weight))
    for actual, wanted in zip(run(problem._replace(key=far)), expected, strict=True):
        assert torch.equal(actual, wanted)


@needs_native
def test_what_it_leaves_to_others() -> None:
    request = Request(*draw()[:5])
    q, k, v, *_ = request
    assert native.supports(request)
    assert not native.supports(request._replace(query=q.double(), key=k.double(), value=v.double()))
    assert not native.supports(request._replace(kernel="cos"))
    assert not native.supports(request._replace(kernel="callable-1"))
    assert not native.supports(request._replace(learned=True))


@pytest.mark.parametrize("reason", ["no compiler", "broken compiler", "no folder"])
def test_a_machine_without_compiler_or_folder(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import warnings, sys\n"
        "from performers.attention.kernels import native\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    reasons = native.unavailable_reason(), native.unavailable_reason()\n"
        "print(reasons[0] is None, reasons[0] == reasons[1], len(caught))\n"
    )
    environment: dict[str, Any] = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    if reason == "broken compiler":
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\nexit 1\n")
        compiler.chmod(0o755)
    if reason == "no folder":
        if native.unavailable_reason() is not None:
            pytest.skip("needs a compiler")
        (tmp_path / "file").touch()
        environment = {"XDG_CACHE_HOME": str(tmp_path / "file"), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    wanted = {"no compiler": "False True 0", "broken compiler": "False True 1", "no folder": "True True 0"}[reason]
    assert run.stdout.strip() == wanted, run.stdout + run.stderr


@needs_native
def test_the_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = native._compiler()
    assert compiler is not None
    native._load(compiler)
    (library,) = (tmp_path / "performers").iterdir()
    stamp = library.stat().st_mtime_ns
    native._load(compiler)
    assert [(x, x.stat().st_mtime_ns) for x in (tmp_path / "performers").iterdir()] == [(library, stamp)]
