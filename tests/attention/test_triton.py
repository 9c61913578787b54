"""The Triton kernels against the oracle: on a GPU where there is one, and else in Triton's interpreter.

Triton decides when it is imported whether it interprets, and the other tests of this process compile with it: the checks run in a
process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from mechanisms import CASES, condition
from torch import Tensor

from performers.attention import FavorAttention, FavorFeatures, FavorState, favor_attention
from performers.attention.features import FeatureRows
from performers.attention.kernels import triton_backend
from performers.attention.kernels.reference import reference
from performers.attention.kernels.state import Request, StateTensors, Upstream

PLACES = ["interpreter", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


# The interpreter takes a minute of a core for each of the slow ones.
CHECKS = [
    "values",
    pytest.param("further", marks=pytest.mark.slow),
    "rows_of or fast or supported or nothing",
    pytest.param("extreme or again or waves", marks=pytest.mark.slow),
    pytest.param("bit or state", marks=pytest.mark.slow),
]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install triton")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("checks", CHECKS)
def test_checks_in_a_process_of_their_own(checks: str, place: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if place == "interpreter" else "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-o", "python_functions=check_*", "-k", checks, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


class Cell(NamedTuple):
    kernel: str
    is_causal: bool
    dtype: torch.dtype = torch.float32
    length: int = 150
    head_dim: int = 24
    num_features: int = 24
    layout: str = "plain"  # or padded, packed, longer (more keys than queries), shorter, strided
    batch: int = 1

    def __str__(self) -> str:
        size = f"L{self.length}-D{self.head_dim}-M{self.num_features}"
        direction = "causal" if self.is_causal else "bidirectional"
        return f"{self.kernel}-{direction}-{str(self.dtype)[6:]}-{size}-{self.layout}"


B, F, H = torch.bfloat16, torch.float32, torch.float16
CELLS = [
    Cell("softmax", False, F, 70, num_features=50, batch=2),
    Cell("softmax", True, F, 70, num_features=50),
    Cell("softmax", False, B, 40, 64),
    Cell("softmax", True, B, 66, num_features=80),
    Cell("softmax", False, H, 17),
    Cell("softmax", True, H, 17, 64, 50),
    Cell("softmax", False, F, 1, num_features=1),
    Cell("softmax", True, F, 1, num_features=1),
    Cell("softmax", False, F, 17, 64, 256),
    Cell("softmax", True, F, 17, 24, 256),
    Cell("softmax", False, F, 40, num_features=50, layout="padded", batch=2),
    Cell("softmax", True, F, 40, layout="padded", batch=2),
    Cell("softmax", False, F, 40, layout="packed"),
    Cell("softmax", True, F, 40, layout="packed"),
    Cell("softmax", False, F, 17, layout="longer"),
    Cell("softmax", True, F, 17, layout="longer"),
    Cell("softmax", True, F, 133, layout="shorter"),
    Cell("softmax", True, F, 17, layout="strided"),
    Cell("softmax-hyperbolic", False, F, 17),
    Cell("relu", False, F, 17, 64, 256),
    Cell("relu", True, F, 70, num_features=50),
    Cell("relu", False, B, 40),
    Cell("relu", True, B, 17, 64),
    Cell("relu", True, H, 17),
    Cell("relu", False, F, 40, layout="padded"),
    Cell("relu", True, F, 40, layout="padded"),
    Cell("relu", True, F, 40, layout="packed"),
    Cell("relu", True, F, 133, layout="shorter"),
    *(Cell(kernel, True, F, 17) for kernel in ("elu", "abs", "sigmoid", "tanh", "gelu", "cos", "identity", "exp")),
]


def draw(cell: Cell, scale: float = 0.5) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(cell.length)
    keys = {"longer": cell.length + 40, "shorter": cell.length - 123}.get(cell.layout, cell.length)
    shapes = [
        (cell.batch, 2, cell.length, cell.head_dim),
        (cell.batch, 2, keys, cell.head_dim),
        (cell.batch, 2, keys, 20),
    ]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    arguments: dict[str, Any] = {"is_causal": cell.is_causal}
    if cell.layout == "padded":
        mask = torch.rand(cell.batch, keys, generator=generator) > 0.4
        mask[0, : keys // 2] = False
        arguments["key_padding_mask"] = mask.to(DEVICE)
    if cell.layout == "packed":
        cuts = [0, 0, cell.length // 5, cell.length // 5, cell.length - cell.length // 3, cell.length]
        arguments["cu_seqlens"] = torch.tensor(cuts, dtype=torch.int32, device=DEVICE)
    q, k, v = (x.to(DEVICE, cell.dtype) for x in (q * scale, k * scale, v))
    if cell.layout == "strided":  # heads after tokens, and a last dimension that does not come last in memory
        q, k, v = q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v[:, :1].expand(-1, 2, -1, -1)
    return q, k, v, arguments


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, floor: float = 0.1) -> None:
    assert actual.isfinite().all(), f"{what} is not finite"
    error = (actual.double() - expected).abs().max().item() if actual.numel() else 0.0
    limit = tolerance * max(expected.abs().max().item() if actual.numel() else 0.0, floor)
    assert error <= limit, f"{what} is off by {error:.3g}, more than {limit:.3g}"


def assert_equals_oracle(cell: Cell, scale: float = 0.5, tolerance: float | None = None) -> None:
    features = FavorFeatures(cell.head_dim, cell.num_features, kernel=cell.kernel).to(DEVICE)
    q, k, v, arguments = draw(cell, scale)
    inputs, exact = [x.detach().requires_grad_() for x in (q, k, v)], [x.double().requires_grad_() for x in (q, k, v)]
    out = favor_attention(*inputs, features, backend="triton", **arguments)
    expected = favor_attention(*exact, features, backend="reference", **arguments)
    assert out.dtype == cell.dtype
    # Where a signed kernel's denominator nearly cancels, rounding is amplified by kappa: see test_laws.
    [case] = [case for case in CASES if case.name == f"favor-{cell.kernel}"]
    mechanism = FavorAttention(cell.head_dim, num_features=cell.num_features, kernel=cell.kernel)
    kappa = condition(case, mechanism, q.cpu(), k.cpu(), is_causal=cell.is_causal).unsqueeze(-1).to(DEVICE)
    moderate = kappa < 30
    tolerance = tolerance or TOLERANCE[cell.dtype]
    assert_close(out.double().where(moderate, 0) / kappa, expected.where(moderate, 0) / kappa, tolerance, "output")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, cell.dtype) * moderate
    gradients = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    floor = 1.0 if cell.num_features > 1 and k.shape[2] > 1 else 30.0
    amplified = tolerance * float(torch.where(moderate, kappa, 1.0).max()) ** 2
    for name, gradient, wanted in zip("qkv", gradients, expected_gradients, strict=True):
        assert gradient.dtype == cell.dtype
        assert_close(gradient, wanted, amplified, f"gradient of {name}", floor)


@pytest.mark.parametrize("cell", CELLS[::2], ids=str)
def check_values_and_gradients_equal_the_oracle(cell: Cell) -> None:
    assert_equals_oracle(cell)


@pytest.mark.parametrize("cell", CELLS[1::2], ids=str)
def check_further_cells(cell: Cell) -> None:
    assert_equals_oracle(cell)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 20.0), (torch.bfloat16, 8.0)])
def check_extreme_inputs(dtype: torch.dtype, scale: float, is_causal: bool) -> None:
    # Exponents of a few thousand in float32, and a few hundred of bfloat16's 16-bit pairs, are right to 1e-3 at best.
    assert_equals_oracle(Cell("softmax", is_causal, dtype, 40, 64, 32), scale, 3e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
def check_rows_computed_again_equal_the_oracle(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOST_BELOW", "SAFE_ABOVE"):
        monkeypatch.setattr(triton_backend, name, -1e30)
    assert_equals_oracle(Cell("softmax", True, length=40, num_features=40, layout=layout))


@pytest.mark.parametrize(
    ("kernel", "is_causal", "layout"),
    [("softmax", True, "plain"), ("relu", True, "packed"), ("softmax", False, "packed"), ("relu", True, "longer")],
)
def check_waves_of_jobs_equal_the_oracle(
    kernel: str, is_causal: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "SUMMARY_BYTES", 2 * (2 * 16 * 20 * 4))
    assert_equals_oracle(Cell(kernel, is_causal, length=130, layout=layout, num_features=16))


@pytest.mark.parametrize(
    ("kernel", "scale", "dtype"), [("softmax", 0.5, F), ("softmax", 8.0, F), ("softmax", 8.0, B), ("relu", 0.5, H)]
)
def check_causal_output_ignores_the_future_bit_for_bit(kernel: str, scale: float, dtype: torch.dtype) -> None:
    q, k, v, arguments = draw(Cell(kernel, True, dtype, 80), scale)
    features = FavorFeatures(24, 24, kernel=kernel).to(DEVICE)
    before = favor_attention(q, k, v, features, backend="triton", **arguments)
    for t, factor in ((5, 1000.0), (40, 0.0), (63, 1.5), (70, 1000.0)):
        changed = [torch.cat([x[:, :, : t + 1], x[:, :, t + 1 :] * factor], 2) for x in (q, k, v)]
        after = favor_attention(*changed, features, backend="triton", **arguments)
        assert torch.equal(after[:, :, : t + 1], before[:, :, : t + 1]), (t, factor)


@pytest.mark.parametrize(
    ("kernel", "is_causal", "lengths"),
    [
        *(("softmax", is_causal, lengths) for is_causal in (False, True) for lengths in ((70, 70), (5, 0), (0, 5))),
        *(
            ("softmax", True, (10, 80)),
            ("softmax", True, (80, 10)),
            ("relu", False, (17, 17)),
            ("relu", True, (70, 75)),
        ),
    ],
)
def check_past_and_next_state_and_their_gradients(kernel: str, is_causal: bool, lengths: tuple[int, int]) -> None:
    features = FavorFeatures(24, 24, kernel=kernel).to(DEVICE)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    numerator, denominator = normal(1, 2, 24, 20), normal(1, 2, 24).abs() + 1
    log_scale = normal(1, 2, 24) * (0.0 if kernel == "relu" else 1.0)
    tokens = [normal(1, 2, lengths[0], 24), normal(1, 2, lengths[1], 24), normal(1, 2, lengths[1], 20)]
    upstream = normal(1, 2, lengths[0], 20), normal(1, 2, 24, 20), normal(1, 2, 24)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (*tokens, numerator, denominator)]
        past = FavorState(*leaves[3:], log_scale.to(dtype))
        out, state = favor_attention(
            *leaves[:3], features, is_causal=is_causal, state=past, return_state=True, backend=backend
        )
        unscaled = torch.exp(state.log_scale.double())
        after = state.numerator.double() * unscaled.unsqueeze(-1), state.denominator.double() * unscaled
        loss = sum((x.double() * y.double()).sum() for x, y in zip((out, *after), upstream, strict=True))
        results.append([out, *after, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])  # pyright: ignore
    names = ("output", "numerator", "denominator", *(f"gradient {n}" for n in range(5)))
    for name, actual, expected in zip(names, *results, strict=True):
        assert_close(actual, expected, 3e-5, name, 1.0)


@pytest.mark.parametrize("is_causal", [False, True])
def check_rows_of_sequence_and_head_with_bias(is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 24, generator=generator).to(DEVICE) for _ in range(3))
    shapes = [(2, 2, 24, 24), (1, 2, 24, 24), (2, 1, 24), (2, 2, 24)]
    rows = FeatureRows(*(torch.randn(shape, generator=generator).to(DEVICE) * 0.4 for shape in shapes))
    state = StateTensors.empty((2, 2), 24, 24, True, q)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = reference(Request(*exact, rows, state, is_causal=is_causal))
    request = Request(q, k, v, rows, state, is_causal=is_causal)
    out, norm, after = triton_backend.forward(request)
    assert_close(out, expected, 3e-5, "output")
    d_out = torch.randn(out.shape, generator=generator).to(DEVICE)
    zeros = torch.zeros_like(after.numerator), torch.zeros_like(after.denominator)
    gradients = triton_backend.backward(Upstream(d_out, *zeros, norm, after), request)
    wanted = torch.autograd.grad(expected, exact, d_out.double())
    for name, gradient, x in zip("qkv", gradients, wanted, strict=False):
        assert_close(gradient, x, 3e-5, f"gradient of {name}", 1.0)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def check_fast_precision(dtype: torch.dtype) -> None:
    features = FavorFeatures(64, 50, precision="fast").to(DEVICE)
    q, k, v, _ = draw(Cell("softmax", False, dtype, 17, 64))
    out = favor_attention(q, k, v, features, backend="triton")
    assert_close(
        out, favor_attention(q.double(), k.double(), v.double(), features, backend="reference"), 0.05, "output"
    )


def check_what_is_supported() -> None:
    q = torch.zeros(1, 1, 4, 24, device=DEVICE)
    rows = FavorFeatures(24, 50).to(DEVICE).rows(q, q, 1.0, is_causal=False)

    state = StateTensors.empty((1, 1), 50, 24, True, q)

    def supported(x: Tensor = q, rows: FeatureRows = rows, **given: Any) -> bool:
        return triton_backend.supports(Request(x, x, x, rows, state, **given))

    assert supported()
    assert supported(kernel="relu")
    assert supported(q.half())
    assert not supported(q.double())
    assert not supported(q[..., :8])
    assert not supported(kernel="softmax-trig")
    assert not supported(learned=True)
    assert not supported(rows=rows._replace(queries=rows.queries.expand(1, 1, 50, 24).repeat(1, 1, 20, 1)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def check_queries_with_nothing_to_attend_to_give_zeros(kernel: str, is_causal: bool) -> None:
    q, k, v, arguments = draw(Cell(kernel, is_causal, F, 20, layout="padded"))
    arguments["key_padding_mask"][:] = False
    k[0, 0, 3], v[0, 0, 3] = torch.inf, torch.nan  # whatever stands in padding
    features = FavorFeatures(24, 50, kernel=kernel).to(DEVICE)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = favor_attention(*inputs, features, backend="triton", **arguments)
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert torch.equal(x, torch.zeros_like(x))


def check_nothing_at_all() -> None:
    features = FavorFeatures(24, 50).to(DEVICE)
    for is_causal in (False, True):
        q = torch.zeros(1, 2, 0, 24, device=DEVICE, requires_grad=True)
        out = favor_attention(q, q, q, features, is_causal=is_causal, backend="triton")
        out.sum().backward()
        assert out.shape == (1, 2, 0, 24)
