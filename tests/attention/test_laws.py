"""The laws that every mechanism obeys (the oracle, causality, padding, packing, streaming, extremes, one answer everywhere)."""

from __future__ import annotations

import shutil
from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
import torch
from allpairspy import AllPairs
from mechanisms import CASES, EXACTLY_CAUSAL_CASES, POSITIVE_CASES, Case, condition, favor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from performers.attention import FavorAttention, FavorFeatures, favor_attention
from performers.attention.features import KERNELS
from performers.attention.kernels import native
from performers.attention.kernels.state import Request, StateTensors
from performers.attention.projections import PROJECTIONS
from performers.errors import InputError

# Relative to the largest entry: rounding of the output type, and of float32 sums.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


class Cell(NamedTuple):
    case: Case
    length: int
    head_dim: int
    num_features: int
    dtype: torch.dtype
    is_causal: bool
    layout: str  # plain, padded, packed, longer (more keys than queries), shorter, grouped (fewer key heads)

    def __str__(self) -> str:
        direction = "causal" if self.is_causal else "bidirectional"
        size = f"L{self.length}-D{self.head_dim}-M{self.num_features}"
        return f"{self.case}-{size}-{str(self.dtype)[6:]}-{direction}-{self.layout}"


AXES: list[list[Any]] = [
    CASES,
    [1, 2, 63, 257, 1000],
    [24, 64],
    [1, 50, 256],
    list(TOLERANCE),
    [False, True],
    ["plain", "padded", "packed", "longer", "shorter", "grouped"],
]


def _grid(cover_alone: bool) -> list[Any]:
    """Every cell, of which those outside a pairwise cover are slow; or the cover alone.

    A mechanism without features has one number of them. A single signed feature cancels between numerator and denominator:
    the output does not depend on q, and its gradient is rounding divided by a phi(q) that crosses zero.
    """

    def sensible(cell: Any) -> bool:
        return len(cell) < 4 or (cell[3] == 50 if not cell[0].has_features else cell[0].positive or cell[3] > 1)

    cover = {Cell(*cell) for cell in AllPairs(AXES, filter_func=sensible)}
    cells = [Cell(*cell) for cell in product(*AXES) if sensible(cell)]
    return [
        pytest.param(cell, id=str(cell), marks=[] if cell in cover else [pytest.mark.slow])
        for cell in cells
        if cell in cover or not cover_alone
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`make test` runs the cover: tens of thousands of slow cells would be made in each process only to be left out."""
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", _grid(cover_alone=metafunc.config.getoption("markexpr") == "not slow"))


def draw(cell: Cell, value_dim: int = 20) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Inputs of a cell, unit normal halved so that all kernels stay in their usual range, and the layout's arguments."""
    generator = torch.Generator().manual_seed(cell.length)
    keys = {"longer": cell.length + 150, "shorter": max(1, cell.length - 150)}.get(cell.layout, cell.length)
    # Two sequences where they differ; one where a second would only double the oracle's L x L matrices.
    batch = 1 if cell.layout == "packed" or (cell.length >= 1000 and cell.layout != "padded") else 2
    heads, key_heads = 2, 1 if cell.layout == "grouped" else 2
    q = torch.randn(batch, heads, cell.length, cell.head_dim, generator=generator) * 0.5
    k = torch.randn(batch, key_heads, keys, cell.head_dim, generator=generator) * 0.5
    v = torch.randn(batch, key_heads, keys, value_dim, generator=generator)
    arguments: dict[str, Any] = {"is_causal": cell.is_causal}
    if cell.layout == "padded":
        mask = torch.rand(batch, keys, generator=generator) > 0.4
        mask[0, : keys // 3] = False
        arguments["key_padding_mask"] = mask
    if cell.layout == "packed":
        cuts = [0, 0, cell.length // 5, cell.length // 5, cell.length - cell.length // 3, cell.length]
        arguments["cu_seqlens"] = torch.tensor(cuts, dtype=torch.int32)
    if cell.layout == "grouped":
        arguments["enable_gqa"] = True
    return q.to(cell.dtype), k.to(cell.dtype), v.to(cell.dtype), arguments


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, floor: float = 0.1) -> None:
    """Relative to the largest entry, but not below `floor`, where sums of order one have cancelled to nothing."""
    assert actual.isfinite().all(), f"{what} is not finite"
    error = (actual.double() - expected).abs().max().item()
    limit = tolerance * max(expected.abs().max().item(), floor)
    assert error <= limit, f"{what} is off by {error:.3g}, more than {limit:.3g}"


def check_against_the_oracle(
    cell: Cell, mechanism: nn.Module, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]
) -> None:
    """Compare values and gradients of a mechanism with those of its case's oracle."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out = mechanism(*inputs, **arguments)
    expected = cell.case.oracle(mechanism, *exact, **arguments)
    assert out.dtype == cell.dtype
    assert out.shape == expected.shape

    # Where a signed kernel's denominator nearly cancels, rounding is amplified by kappa: the tolerance grows with it, and
    # gradients are sent through the rows where it is moderate.
    kappa = condition(cell.case, mechanism, q, k, **arguments).unsqueeze(-1)
    tolerance = TOLERANCE[cell.dtype]
    moderate = kappa < 30
    assert_close(out.double().where(moderate, 0) / kappa, expected.where(moderate, 0) / kappa, tolerance, "output")
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator).double() * moderate
    gradients = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    expected_gradients = torch.autograd.grad(expected, exact, upstream.to(out.dtype).double())
    amplified = tolerance * float(torch.where(moderate, kappa, 1.0).max()) ** 2
    # A gradient is a sum of terms of order one. With a single feature or key it cancels to nothing, term by term, and the terms
    # are divided by a feature as small as relu's epsilon. A row that sees one key has no gradient either: what 16-bit products
    # leave there is their rounding of terms d_out.v times rows of W.
    floor = 1.0 if cell.num_features > 1 and k.shape[2] > 1 else 30.0
    if cell.dtype == torch.bfloat16:
        floor = max(floor, 4.0)
    floors = dict.fromkeys("qkv", floor)
    if cell.num_features == 1 and isinstance(
        mechanism, FavorAttention
    ):  # a query's own feature, where no epsilon bounds it
        smallest = mechanism.features(exact[0].detach()).abs().min().item()
        floors["q"] = max(floor, 0.03 / max(smallest, 1e-5))
    for name, gradient, wanted in zip("qkv", gradients, expected_gradients, strict=True):
        assert_close(gradient, wanted, amplified, f"gradient of {name}", floors[name])


def test_values_and_gradients_equal_the_oracle(cell: Cell, record_cell: Any) -> None:
    record_cell("oracle")
    check_against_the_oracle(cell, cell.case.make(cell.head_dim, cell.num_features), *draw(cell))


FAVOR_AXES: list[list[Any]] = [
    list(KERNELS),
    [*PROJECTIONS, None],
    ["chunked", "native"],
    list(TOLERANCE),
    [False, True],
]


def _favor_grid() -> list[Any]:
    cover = {tuple(cell) for cell in AllPairs(FAVOR_AXES)}
    return [
        pytest.param(*cell, id="-".join(map(str, cell)), marks=[] if cell in cover else [pytest.mark.slow])
        for cell in product(*FAVOR_AXES)
    ]


@pytest.mark.parametrize(("kernel", "projection", "backend", "dtype", "is_causal"), _favor_grid())
def test_every_kernel_projection_backend_and_type_equals_the_oracle(
    kernel: str, projection: str | None, backend: str, dtype: torch.dtype, is_causal: bool, record_cell: Any
) -> None:
    positive = kernel not in ("softmax-trig", "gelu", "tanh", "cos", "identity")
    case = favor(kernel, positive, kernel=kernel, projection=projection, backend=backend)
    cell = Cell(case, 140, 24, 50, dtype, is_causal, "padded")
    record_cell("estimators")
    q, k, v, arguments = draw(cell)
    mechanism = case.make(24, 50)
    assert isinstance(mechanism, FavorAttention)
    rows = mechanism.features.rows(q, k, 0.2, is_causal=is_causal)
    state = StateTensors.empty(q.shape[:2], mechanism.features.size, 24, True, q)
    request = Request(q, k, v, rows, state, kernel=mechanism.features.kernel_key, is_causal=is_causal)
    if backend == "native" and not native.supports(request):
        with pytest.raises(InputError, match="backend='native' cannot compute"):
            mechanism(q, k, v, **arguments)
        return
    check_against_the_oracle(cell, mechanism, q, k, v, arguments)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", EXACTLY_CAUSAL_CASES, ids=str)
def test_causal_output_ignores_the_future_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    mechanism = case.make(24, 50)
    cell = Cell(case, 300, 24, 50, dtype, True, "plain")
    q, k, v, _ = draw(cell)
    before = mechanism(q, k, v, is_causal=True)
    for t in (0, 5, 127, 128, 200):
        for factor in (0.0, 1.5, 1000.0):
            changed = [torch.cat([x[:, :, : t + 1], x[:, :, t + 1 :] * factor], 2) for x in (q, k, v)]
            after = mechanism(*changed, is_causal=True)
            assert torch.equal(after[:, :, : t + 1], before[:, :, : t + 1]), (t, factor)


@pytest.mark.parametrize("scale", [5.0, 20.0])
def test_causality_holds_where_rows_are_computed_again(scale: float) -> None:
    mechanism = FavorAttention(64, num_features=64)
    q, k, v = (torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(i)) * scale for i in range(3))
    before = mechanism(q, k, v, is_causal=True)
    for t in (3, 64, 130, 198):
        for factor in (0.0, 1.5, 1000.0):
            changed = [torch.cat([x[:, :, : t + 1], x[:, :, t + 1 :] * factor], 2) for x in (q, k, v)]
            assert torch.equal(mechanism(*changed, is_causal=True)[:, :, : t + 1], before[:, :, : t + 1])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_is_invisible(case: Case, is_causal: bool) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 90, 24, 50, torch.float32, is_causal, "plain"))
    alone = mechanism(q[:1], k[:1], v[:1], is_causal=is_causal)
    for side in ("left", "right"):
        noise = torch.randn(2, 2, 160, 24, generator=torch.Generator().manual_seed(3)) * 3
        padded = [torch.cat(pair if side == "left" else pair[::-1], 2) for pair in ((noise, q), (noise, k))]
        padded.append(torch.cat([noise[..., :20], v][:: 1 if side == "left" else -1], 2))
        mask = torch.ones(2, 250, dtype=torch.bool)
        mask[0, slice(0, 160) if side == "left" else slice(90, 250)] = False
        out = mechanism(*padded, is_causal=is_causal, key_padding_mask=mask)
        real = out[:1, :, 160:] if side == "left" else out[:1, :, :90]
        kappa = condition(case, mechanism, q[:1], k[:1], is_causal=is_causal).unsqueeze(-1)
        assert_close(real / kappa, alone.double() / kappa, 1e-5, f"{side}-padded output")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_sequences_equal_each_alone(case: Case, is_causal: bool) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 700, 24, 50, torch.float32, is_causal, "packed"))
    offsets = [0, 1, 1, 130, 400, 700]
    for dtype in (torch.int32, torch.int64):
        packed = mechanism(q, k, v, is_causal=is_causal, cu_seqlens=torch.tensor(offsets, dtype=dtype))
        for a, b in pairwise(offsets):
            if a == b:
                continue
            alone = mechanism(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=is_causal)
            kappa = condition(case, mechanism, q[:, :, a:b], k[:, :, a:b], is_causal=is_causal).unsqueeze(-1)
            assert_close(packed[:, :, a:b] / kappa, alone.double() / kappa, 1e-5, f"sequence {a}:{b}")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_batch_mate_never_matters(case: Case, is_causal: bool) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 600, 24, 50, torch.float32, is_causal, "plain"))
    together = mechanism(q, k, v, is_causal=is_causal)
    wild = [torch.cat([x[:1], x[1:] * 100], 0) for x in (q, k, v)]
    kappa = condition(case, mechanism, q[:1], k[:1], is_causal=is_causal).unsqueeze(-1)
    assert_close(mechanism(*wild, is_causal=is_causal)[:1] / kappa, together[:1].double() / kappa, 1e-6, "output")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_with_nothing_to_attend_to_gives_zeros(case: Case, is_causal: bool) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 40, 24, 50, torch.float32, is_causal, "plain"))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0] = False
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = mechanism(*inputs, is_causal=is_causal, key_padding_mask=mask)
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()
    if is_causal:  # more queries than keys: the first queries precede every key
        out = mechanism(q, k[:, :, 30:], v[:, :, 30:], is_causal=True)
        assert (out[:, :, :30] == 0).all()


@pytest.mark.parametrize("case", EXACTLY_CAUSAL_CASES, ids=str)
def test_parallel_equals_streamed_in_pieces_and_token_by_token(case: Case) -> None:
    mechanism = case.make(24, 50)
    q, k, v, arguments = draw(Cell(case, 300, 24, 50, torch.float32, True, "padded"))
    mask = arguments["key_padding_mask"]
    whole = mechanism(q, k, v, is_causal=True, key_padding_mask=mask)
    kappa = condition(case, mechanism, q, k, is_causal=True, key_padding_mask=mask).unsqueeze(-1).clamp_max(1e12)
    tolerance = 1e-5 if case.positive else 1e-4
    for cuts in ([0, 300], [0, 1, 2, 65, 129, 300], [0, 130, 260, 300], list(range(301))):
        state, pieces = None, []
        for a, b in pairwise(cuts):
            piece, state = mechanism(
                *(x[:, :, a:b] for x in (q, k, v)),
                is_causal=True,
                key_padding_mask=mask[:, a:b],
                state=state,
                return_state=True,
            )
            pieces.append(piece)
        assert_close(torch.cat(pieces, 2) / kappa, whole.double() / kappa, tolerance, f"{len(cuts) - 1} pieces")


@pytest.mark.parametrize("case", EXACTLY_CAUSAL_CASES, ids=str)
def test_gradients_flow_through_the_state(case: Case) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 200, 24, 50, torch.float32, True, "plain"))
    upstream = torch.randn(2, 2, 200, 20, generator=torch.Generator().manual_seed(5))
    kappa = condition(case, mechanism, q, k, is_causal=True).unsqueeze(-1)
    upstream = upstream * (kappa < 30)

    def gradients(cuts: list[int]) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        state, pieces = None, []
        for a, b in pairwise(cuts):
            part = [x[:, :, a:b] for x in inputs]
            piece, state = mechanism(*part, is_causal=True, state=state, return_state=True)
            pieces.append(piece)
        return torch.autograd.grad(torch.cat(pieces, 2), inputs, upstream.float())

    tolerance = 3e-5 if case.positive else 3e-2
    for name, actual, expected in zip("qkv", gradients([0, 70, 71, 200]), gradients([0, 200]), strict=True):
        assert_close(actual, expected.double(), tolerance, f"gradient of {name}")


@pytest.mark.parametrize("case", EXACTLY_CAUSAL_CASES, ids=str)
def test_a_reordered_state_serves_the_reordered_batch(case: Case) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 50, 24, 50, torch.float32, True, "plain"))
    first = [x[:, :, :40] for x in (q, k, v)]
    _, state = mechanism(*first, is_causal=True, return_state=True)
    order = torch.tensor([1, 0, 1])
    last = [x[order, :, 40:] for x in (q, k, v)]
    direct = mechanism(*last, is_causal=True, state=state.reorder(order))
    whole = mechanism(*(x[order] for x in (q, k, v)), is_causal=True)[:, :, 40:]
    kappa = condition(case, mechanism, q[order], k[order], is_causal=True)[:, :, 40:].unsqueeze(-1)
    assert_close(direct / kappa, whole.double() / kappa, 1e-5 if case.positive else 1e-4, "output after reordering")


# Whose states other sequences can read, all of them: half of a split layer is a window.
SUMMED_CASES = [case for case in CASES if case.make(24, 50).shared_kinds and not case.name.startswith("split")]


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("case", SUMMED_CASES, ids=str)
def test_states_summed_in_any_order_are_all_their_keys(case: Case, is_causal: bool) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 120, 24, 50, torch.float32, True, "plain"))
    kappa = condition(case, mechanism, q, k, is_causal=is_causal)[:, :, 70:].unsqueeze(-1)
    upstream = torch.randn(2, 2, 50, 20, generator=torch.Generator().manual_seed(5)) * (kappa < 30)

    def read(parts: list[slice]) -> list[Tensor]:
        """Outputs and gradients of the last 50 queries, which see their own keys and the summed states of the parts."""
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        own = [x[:, :, 70:] for x in inputs]
        if not parts:
            out = mechanism(own[0], *inputs[1:], is_causal=is_causal)
        else:
            states = [mechanism(*(x[:, :, part] for x in inputs), return_state=True)[1] for part in parts]
            weights = torch.eye(2).repeat(1, len(parts))  # row r of the sum is of row r of each
            out = mechanism(*own, is_causal=is_causal, state=states[0].joined(states[1:]).mixed(weights))
        return [out / kappa, *torch.autograd.grad(out, inputs, upstream.float())]

    value, gradient = (1e-5, 3e-5) if case.positive else (3e-4, 3e-2)
    direct = read([])
    for parts in ([slice(0, 70)], [slice(0, 31), slice(31, 70)], [slice(31, 70), slice(0, 31)]):
        for name, found, expected in zip(("out", *"qkv"), read(parts), direct, strict=True):
            tolerance = value if name == "out" else gradient
            # Queries before the last 50 have read their part, and nobody asks what they saw.
            assert_close(found, expected.double(), tolerance, f"{name} of {len(parts)} parts")


_PARTS = (slice(0, 80), slice(80, 120))


@pytest.mark.parametrize("case", [favor("relu", kernel="relu"), favor("softmax", kernel="softmax")], ids=str)
def test_states_are_summed_in_float32_whatever_autocast_says(case: Case) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 120, 24, 50, torch.float32, True, "plain"))
    _, state = mechanism(q, k, v, return_state=True)
    plain = state.mixed(torch.ones(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = state.mixed(torch.ones(1, 2))
    for one, other in zip(plain.tensors(), under_autocast.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [case for case in SUMMED_CASES if case.has_features], ids=str)
def test_a_state_taken_out_of_a_sum_leaves_the_others(case: Case) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 120, 24, 50, torch.float32, True, "plain"))
    states = [mechanism(*(x[:, :, part] for x in (q, k, v)), return_state=True)[1] for part in _PARTS]
    both = states[0].joined(states[1:]).mixed(torch.eye(2).repeat(1, 2))
    rest = both.joined(states[1:]).mixed(torch.cat([torch.eye(2), -torch.eye(2)], 1))
    nothing = q[:, :, :0]
    first = mechanism(q, nothing, nothing[..., :20], state=states[0])
    kappa = condition(case, mechanism, q, k[:, :, _PARTS[0]]).unsqueeze(-1)
    assert_close(
        mechanism(q, nothing, nothing[..., :20], state=rest) / kappa, first.double() / kappa, 2e-4, "what is left"
    )


# At a scale s the exponents reach s^2 sqrt(D): float32 rounds them to about 1e-4 at 20.
EXTREMES = [(torch.float32, 20.0, 2e-3), (torch.bfloat16, 8.0, 2e-2), (torch.float16, 8.0, 4e-3)]


@pytest.mark.parametrize(("dtype", "scale", "tolerance"), EXTREMES, ids=["float32x20", "bfloat16x8", "float16x8"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", POSITIVE_CASES, ids=str)
def test_extreme_inputs_give_the_oracles_answer(
    case: Case, is_causal: bool, dtype: torch.dtype, scale: float, tolerance: float
) -> None:
    mechanism = case.make(64, 256)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 400, 64, generator=generator) for _ in range(3))
    inputs = [x.to(dtype).requires_grad_() for x in (q * scale, k * scale, v)]
    out = mechanism(*inputs, is_causal=is_causal)
    expected = case.oracle(mechanism, *(x.detach() for x in inputs), is_causal=is_causal)
    assert_close(out, expected, tolerance, "output")
    assert not ((out == 0) & (expected.abs() > 1e-4)).any()
    for gradient in torch.autograd.grad(out.mean(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_gradients_at_extreme_inputs_equal_the_oracles(kernel: str, is_causal: bool) -> None:
    features = FavorFeatures(64, 128, kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(1, 2, 300, 64, generator=generator) * scale for scale in (20.0, 20.0, 1.0)]
    upstream = torch.randn(1, 2, 300, 64, generator=generator)
    found = []
    for backend, dtype in (("chunked", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in data]
        out = favor_attention(*inputs, features, is_causal=is_causal, backend=backend)
        found.append(torch.autograd.grad(out, inputs, upstream.to(dtype)))
    for name, actual, expected in zip("qkv", *found, strict=True):
        assert_close(actual, expected, 2e-3, f"gradient of {name}", floor=0.01)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_a_million_tokens_give_the_oracles_answer(kernel: str, is_causal: bool) -> None:
    length, rows = 1_000_000, torch.tensor([0, 1, 127, 128, 4097, 300_001, 999_999])
    features = FavorFeatures(16, 32, kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 16, generator=generator).requires_grad_() for _ in range(3))
    out = favor_attention(q, k, v, features, is_causal=is_causal)
    with torch.no_grad():
        phi_q, phi_k = features(q.double())[0, 0, rows], features(k.double())[0, 0]
        weights = phi_q @ phi_k.T
        if is_causal:
            weights *= torch.arange(length) <= rows[:, None]
        expected = weights @ v.double()[0, 0] / weights.sum(-1, keepdim=True)
    assert_close(out.detach()[0, 0, rows], expected, 1e-4, "output")
    for gradient in torch.autograd.grad(out.mean(), (q, k, v)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_call_gives_the_same_bits_and_leaves_the_mechanism_alone(case: Case, is_causal: bool) -> None:
    mechanism = case.make(24, 50)
    before = {name: tensor.clone() for name, tensor in mechanism.state_dict().items()}
    q, k, v, _ = draw(Cell(case, 400, 24, 50, torch.float32, is_causal, "plain"))
    torch.manual_seed(1)
    first = mechanism(q, k, v, is_causal=is_causal)
    mechanism.eval()
    torch.manual_seed(2)
    assert torch.equal(first, mechanism(q, k, v, is_causal=is_causal))
    assert all(torch.equal(tensor, before[name]) for name, tensor in mechanism.state_dict().items())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_whole_gives_the_same_answer(case: Case, is_causal: bool) -> None:
    # The C++ compiler that inductor needs may be missing; the graph is traced whole either way.
    inductor = shutil.which("g++") is not None and case.name in ("favor-softmax", "favor-relu")
    torch.compiler.reset()
    mechanism = case.make(24, 50)
    inputs = [x.requires_grad_() for x in draw(Cell(case, 300, 24, 50, torch.float32, is_causal, "plain"))[:3]]
    run = torch.compile(
        lambda q, k, v: mechanism(q * 1.5, k, v, is_causal=is_causal).tanh(),
        fullgraph=True,
        backend="inductor" if inductor else "aot_eager",
    )
    out, expected = run(*inputs), mechanism(inputs[0] * 1.5, *inputs[1:], is_causal=is_causal).tanh()
    tolerance = 1e-5 if case.positive else 1e-3
    assert_close(out, expected.detach().double(), tolerance, "output")
    for actual, wanted in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert_close(actual, wanted.double(), tolerance * (1 if case.positive else 100), "gradient")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_changes_nothing_but_the_inputs_type(case: Case) -> None:
    mechanism = case.make(24, 50)
    q, k, v, _ = draw(Cell(case, 300, 24, 50, torch.float32, False, "plain"))
    plain = mechanism(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if not isinstance(mechanism, FavorAttention):  # SDPA itself follows autocast
            plain = mechanism(q, k, v)
        assert torch.equal(mechanism(q, k, v), plain)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(case: Case, is_causal: bool) -> None:
    mechanism = case.make(24, 50)
    inputs = [x.requires_grad_() for x in draw(Cell(case, 300, 24, 50, torch.float32, is_causal, "plain"))[:3]]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mechanism(q, k, v, is_causal=is_causal)

    stored = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    again = torch.autograd.grad(checkpoint(run, *inputs, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(stored, again, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "relu", torch.nn.functional.softplus])
def test_gradients_pass_numerical_differentiation_in_float64(kernel: Any, is_causal: bool) -> None:
    features = FavorFeatures(4, 6, kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 11, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = torch.tensor([[True] * 3 + [False] + [True] * 7])

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, state = favor_attention(
            q, k, v, features, is_causal=is_causal, key_padding_mask=mask, return_state=True, backend="chunked"
        )
        last, after = favor_attention(q, k, v, features, is_causal=is_causal, state=state, return_state=True)
        return out, last, after.numerator * after.log_scale.exp().unsqueeze(-1)

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_the_operators_keep_torchs_contract(kernel: str, is_causal: bool) -> None:
    features = FavorFeatures(8, 6, kernel=kernel)
    q, k, v = (torch.randn(2, 2, 5, 8).requires_grad_() for _ in range(3))
    state = [torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6), torch.full((2, 2, 6), -torch.inf)]
    rows = features.rows(q, k, 0.35, is_causal=is_causal)
    arguments = (q, k, v, *rows, *state, None, None, kernel, is_causal, False, False, "chunked")
    torch.library.opcheck(torch.ops.performers.favor, arguments)


def test_mechanisms_have_one_interface() -> None:
    for case in CASES:
        mechanism = case.make(24, 50)
        assert isinstance(mechanism, nn.Module)
        assert isinstance(mechanism.redraws_by_default, bool)
        assert isinstance(mechanism.has_fixed_state, bool)
        mechanism.redraw_(torch.Generator().manual_seed(0))
