"""What theory says of the features: unbiased kernels, their variances, and what orthogonality gains."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from performers.attention import FavorFeatures, exact_attention, favor_attention
from performers.attention.features import UncalibratedWarning, kernel_of
from performers.attention.projections import hadamard_transform
from performers.attention.proposals import Moments, fit
from performers.attention.published import published_attention
from performers.errors import InputError, UnsupportedError

DRAWS = 4000
FITTED = ["softmax-optimal", "softmax-sharp", "softmax-prototypes"]
PROJECTIONS = ["orthogonal", "iid", "hadamard", "givens"]
# A row of a Hadamard projection is N(0, I) only nearly: its entries are sums of signs, and at D = 8 the kernel is off by this.
BIAS = {"hadamard": 0.02}


def estimates(
    x: Tensor, y: Tensor, num_features: int, kernel: str, projection: str, draws: int = DRAWS, calibrate: bool = False
) -> Tensor:
    """phi(x).phi(y) of `draws` independent projections; x and y are used as they are, scale 1.

    Blocks of D rows are independent of each other, so the rows of one projection make many of M = num_features.
    """
    assert num_features % x.shape[-1] == 0
    features = FavorFeatures(x.shape[-1], num_features * draws, kernel, projection, seed=7)
    if calibrate:
        features.calibrate_(*tokens(x, y), scale=1.0)
    products = features(x.double(), 1.0, side="query") * features(y.double(), 1.0, side="key")
    return products.flatten().view(-1, draws, num_features).sum((0, 2)) * draws


def tokens(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Queries around x and keys around y, (1, 1, L, D), that vary more in some coordinates than in others."""
    generator = torch.Generator().manual_seed(11)
    spread = torch.linspace(0.1, 0.5, x.shape[-1])
    q, k = (torch.randn(1, 1, 200, x.shape[-1], generator=generator) for _ in range(2))
    return x.float() + q * spread, y.float() + k * spread.flip(0)


def pair(norm: float, angle: float, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Two vectors of one norm at an angle, in a direction that is no axis."""
    generator = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(dim, 2, generator=generator, dtype=torch.float64))
    return norm * basis[:, 0], norm * (math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 1])


PAIRS = [(0.5, 0.3), (0.9, 1.2), (0.9, 2.8)]  # |x + y|^2 <= 4


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(
    "kernel", ["softmax", "softmax-hyperbolic", "softmax-trig", "softmax-optimal", "softmax-sharp"]
)
@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_softmax_features_estimate_the_kernel_without_bias(
    norm: float, angle: float, kernel: str, projection: str
) -> None:
    x, y = pair(norm, angle)
    found = estimates(x, y, 16, kernel, projection, calibrate=kernel_of(kernel).fitted is not None)
    standard_error, exact = found.std() / DRAWS**0.5, torch.exp(x @ y)
    assert abs(found.mean() - exact) < 4 * standard_error + BIAS.get(projection, 0.0) * exact


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_rows_lean_towards_no_axis(projection: str) -> None:
    """Trained models have outlier coordinates. Rotations that are too few leave rows near the axes they started from."""
    for dim in (16, 64):
        features = FavorFeatures(dim, 2**15, projection=projection, seed=5)
        for axis in (0, dim - 1):
            x = torch.zeros(dim, dtype=torch.float64)
            x[axis] = 0.9
            found = features(x, 1.0).square() * features.size
            standard_error, exact = found.std() / len(found) ** 0.5, torch.exp(x @ x)
            assert abs(found.mean() - exact) < 4 * standard_error + BIAS.get(projection, 0.0) * exact


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_relu_features_estimate_the_arc_cosine_kernel_without_bias(norm: float, angle: float, projection: str) -> None:
    x, y = pair(norm, angle)
    found = estimates(x, y, 16, "relu", projection)
    # Cho and Saul 2009, degree one; f(u) = relu(u) + epsilon adds epsilon (E relu(w.x) + E relu(w.y)) + epsilon^2.
    arc_cosine = norm**2 / (2 * math.pi) * (math.sin(angle) + (math.pi - angle) * math.cos(angle))
    epsilon = 1e-3
    expected = arc_cosine + epsilon * 2 * norm / math.sqrt(2 * math.pi) + epsilon**2
    assert abs(found.mean() - expected) < 4 * found.std() / DRAWS**0.5


def _expectation(kernel: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """E f(w.x) f(w.y) for w ~ N(0, I), from the closed form."""
    squares, product = (x @ x + y @ y) / 2, x @ y
    if kernel == "exp":
        return torch.exp(squares + product)
    if kernel == "cos":
        return torch.exp(-squares) * torch.cosh(product)
    if kernel == "identity":
        return product
    angle = torch.arccos(product / (x.norm() * y.norm()))
    if kernel == "abs":
        return 2 / math.pi * x.norm() * y.norm() * (torch.sin(angle) + (math.pi / 2 - angle) * torch.cos(angle))
    raise AssertionError(kernel)


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
@pytest.mark.parametrize("kernel", ["exp", "cos", "identity", "abs"])
@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_generalised_features_estimate_their_closed_forms_without_bias(
    norm: float, angle: float, kernel: str, projection: str
) -> None:
    x, y = pair(norm, angle)
    found = estimates(x, y, 16, kernel, projection)
    assert abs(found.mean() - _expectation(kernel, x, y)) < 4 * found.std() / DRAWS**0.5


@pytest.mark.parametrize(
    ("kernel", "function"),
    [
        ("sigmoid", torch.sigmoid),
        ("tanh", torch.tanh),
        ("gelu", torch.nn.functional.gelu),
        ("elu", lambda u: torch.nn.functional.elu(u) + 1),
    ],
)
def test_named_kernels_are_their_functions(kernel: str, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 8)
    named, given = FavorFeatures(8, 16, kernel=kernel), FavorFeatures(8, 16, kernel=function)
    assert torch.equal(named(x), given(x))


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
def test_regularised_rows_have_one_norm_and_a_smaller_kernel_than_softmax(projection: str) -> None:
    features = FavorFeatures(8, 20, kernel="softmax-reg", projection=projection)
    torch.testing.assert_close(features.projection.norm(dim=1), torch.full((20,), 8**0.5))
    for norm, angle in PAIRS:
        x, y = pair(norm, angle)
        found = estimates(x, y, 16, "softmax-reg", projection)
        # 2009.14794, Theorem 1: SMREG <= SM, and close to it; E exp(sqrt(d) w.z) over the sphere is a Bessel function.
        z = (x + y).norm() * 8**0.5
        terms = [(z / 2) ** (2 * n) * math.gamma(4) / (math.factorial(n) * math.gamma(n + 4)) for n in range(30)]
        expected = torch.exp(-(x @ x + y @ y) / 2) * torch.stack(terms).sum()
        assert expected < torch.exp(x @ y)
        assert abs(found.mean() - expected) < 4 * found.std() / DRAWS**0.5


@pytest.mark.parametrize("kernel", ["softmax", "softmax-hyperbolic", "softmax-trig"])
@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_variance_of_iid_softmax_features_is_lemma_2s(norm: float, angle: float, kernel: str) -> None:
    x, y = pair(norm, angle)
    num_features = 8
    squares = (estimates(x, y, num_features, kernel, "iid", 20_000) - torch.exp(x @ y)).square()
    z = (x + y).square().sum()
    expected = torch.exp(z) * torch.exp(2 * x @ y) * (1 - torch.exp(-z)) / num_features  # 2009.14794, Lemma 2
    if kernel == "softmax-hyperbolic":
        expected *= (1 - torch.exp(-z)) / 2
    if kernel == "softmax-trig":
        apart = (x - y).square().sum()
        expected = torch.exp(z) * torch.exp(-2 * x @ y) * (1 - torch.exp(-apart)).square() / (2 * num_features)
    assert abs(squares.mean() - expected) < 4 * squares.std() / len(squares) ** 0.5


@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_variance_of_iid_optimal_features_is_the_closed_form(norm: float, angle: float) -> None:
    x, y = pair(norm, angle)
    num_features, dim = 8, 8
    squares = (estimates(x, y, num_features, "softmax-optimal", "iid", 20_000, True) - torch.exp(x @ y)).square()
    features = FavorFeatures(dim, num_features, "softmax-optimal").calibrate_(*tokens(x, y), scale=1.0)
    s = features.proposal_factor[0, 0, 0].double() ** 2  # 1 - 4 A
    z = (x + y).square().sum()
    # 2205.15317: E (phi phi)^2 = (1 - 4 A)^d (1 - 8 A)^(-d/2) exp(2 (1 - 4 A) / (1 - 8 A) |x + y|^2 - |x|^2 - |y|^2)
    second = s**dim * (2 * s - 1) ** (-dim / 2) * torch.exp(2 * s / (2 * s - 1) * z - x @ x - y @ y)
    expected = (second - torch.exp(2 * x @ y)) / num_features
    assert abs(squares.mean() - expected) < 4 * squares.std() / len(squares) ** 0.5


@pytest.mark.parametrize("kernel", ["softmax-trig", "softmax-hyperbolic", "softmax-optimal", "softmax-sharp"])
@pytest.mark.parametrize("projection", ["orthogonal", "hadamard", "givens"])
@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_no_orthogonal_projection_is_worse_than_independent_rows(
    norm: float, angle: float, projection: str, kernel: str
) -> None:
    x, y = pair(norm, angle)
    calibrate = kernel_of(kernel).fitted is not None
    iid, orthogonal = (
        (estimates(x, y, 8, kernel, name, calibrate=calibrate) - torch.exp(x @ y)).square()
        for name in ("iid", projection)
    )
    standard_error = (iid.var() / DRAWS + orthogonal.var() / DRAWS).sqrt()
    assert orthogonal.mean() < iid.mean() + 4 * standard_error


@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_orthogonal_features_are_no_worse_than_theorem_2_says(norm: float, angle: float) -> None:
    x, y = pair(norm, angle)
    num_features, dim = 8, 8
    kernel = torch.exp(x @ y)
    iid = (estimates(x, y, num_features, "softmax", "iid") - kernel).square()
    orthogonal = (estimates(x, y, num_features, "softmax", "orthogonal") - kernel).square()
    gain = kernel - torch.exp(-(x.square().sum() + y.square().sum()) / 2)
    bound = iid.mean() - 2 * (num_features - 1) / (num_features * (dim + 2)) * gain**2  # 2009.14794, Theorem 2
    standard_error = (iid.var() / DRAWS + orthogonal.var() / DRAWS).sqrt()
    assert orthogonal.mean() < bound + 4 * standard_error


def test_orthogonal_rows_are_orthogonal_in_each_block_and_chi_distributed() -> None:
    norms = []
    generator = torch.Generator().manual_seed(0)
    features = FavorFeatures(16, 40)
    for _ in range(200):
        features.redraw_(generator)
        rows = features.projection.double()
        for block in (rows[:16], rows[16:32], rows[32:]):
            unit = block / block.norm(dim=1, keepdim=True)
            assert torch.allclose(unit @ unit.T, torch.eye(len(block), dtype=torch.float64), atol=1e-5)
        norms.append(rows.square().sum(1))
    squares = torch.cat(norms)  # chi-squared with 16 degrees of freedom: mean 16, variance 32
    assert abs(squares.mean() - 16) < 4 * (32 / len(squares)) ** 0.5
    assert abs(squares.var() - 32) < 3


def test_orthogonal_directions_are_uniform_so_the_signs_of_qr_are_fixed() -> None:
    generator = torch.Generator().manual_seed(0)
    features = FavorFeatures(4, 4)
    traces = []
    for _ in range(4000):
        features.redraw_(generator)
        rows = features.projection.double()
        traces.append((rows / rows.norm(dim=1, keepdim=True)).diagonal().sum())
    # The trace of a Haar orthogonal matrix has mean zero; LAPACK's sign convention alone shifts it away from there.
    values = torch.stack(traces)
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_the_error_falls_with_the_number_of_features_at_every_length(kernel: str) -> None:
    for length in (64, 1024):
        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(1, 1, length, 16, generator=generator) for _ in range(3))
        q, k = q * 0.5, k * 0.5
        if kernel == "softmax":
            limit = exact_attention(q, k, v)
        else:
            limit = favor_attention(q, k, v, FavorFeatures(16, 2**16, kernel=kernel, seed=99))
        errors = []
        for num_features in (16, 64, 256, 1024):
            draws = [favor_attention(q, k, v, FavorFeatures(16, num_features, kernel, seed=s)) for s in range(16)]
            errors.append(torch.stack([(out - limit).square().mean() for out in draws]).mean().sqrt().item())
        for more, fewer in zip(errors[1:], errors, strict=False):
            assert more < 0.75 * fewer, (length, errors)  # theory: 0.5


def test_an_attention_output_is_a_ratio_and_close_to_softmax_with_many_features() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 16, generator=generator) * 0.5 for _ in range(3))
    out = favor_attention(q, k, v, FavorFeatures(16, 8192))
    expected = exact_attention(q, k, v)
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_redraw_is_a_pure_function_of_its_generator_and_nothing_else_changes_the_projection() -> None:
    features = FavorFeatures(8, 20, seed=5)
    assert torch.equal(features.projection, FavorFeatures(8, 20, seed=5).projection)
    before = features.projection.clone()
    features.train()(torch.randn(3, 8))
    features.eval()(torch.randn(3, 8))
    assert torch.equal(features.projection, before)
    features.redraw_(torch.Generator().manual_seed(5))
    assert torch.equal(features.projection, before)
    features.redraw_(torch.Generator().manual_seed(6))
    assert not torch.equal(features.projection, before)


def test_the_projection_is_saved_and_stays_float32() -> None:
    features = FavorFeatures(8, 20, seed=5)
    other = FavorFeatures(8, 20, seed=6)
    other.load_state_dict(features.state_dict())
    assert torch.equal(features.projection, other.projection)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(other.to(dtype).projection, features.projection)
    with torch.device("meta"):
        assert torch.equal(FavorFeatures(8, 20, seed=5).projection, features.projection)


def test_without_a_projection_every_coordinate_is_a_feature() -> None:
    features = FavorFeatures(8, 20, kernel="relu", projection=None)
    x = torch.randn(3, 8)
    assert features.num_features == 8
    assert torch.allclose(features(x, 1.0), (x.relu() + 1e-3) / 8**0.5)


# -- FAVOR++ and FAVOR# --


def _log_variance(s: Tensor, x: Tensor) -> Tensor:
    """Of one coordinate: the log of E phi^2 phi^2 / K^2 where 1 - 4 A is s and the mean square of q + k is x."""
    return s.log() - (2 * s - 1).log() / 2 + 2 * x * s / (2 * s - 1) - x


@pytest.mark.parametrize("kind", ["isotropic", "dense"])
def test_the_spread_of_the_rows_minimises_the_mean_log_variance(kind: str) -> None:
    for mean_square in (0.01, 0.3, 1.0, 5.0, 200.0):
        moments = Moments(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64) * mean_square / 2)
        found = fit(kind, moments, moments, 1.0).factor[0, 0] ** 2
        grid = torch.linspace(0.51, 3 + 2 * mean_square, 200_001, dtype=torch.float64)
        x = torch.tensor(mean_square, dtype=torch.float64)
        assert _log_variance(found, x) < _log_variance(grid, x).min() + (1e-9 if kind == "isotropic" else 5e-4)


def test_the_dense_spread_is_that_of_2302_00787_within_three_per_cent() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    covariance = mixing @ mixing.T / 8
    moments = Moments(torch.zeros(8, dtype=torch.float64), covariance)
    factor = fit("dense", moments, moments, 1.0).factor
    values, vectors = torch.linalg.eigh(2 * covariance)
    a = (1 - 2 * values - ((2 * values + 1) ** 2 + 8 * values).sqrt()) / 16
    published = vectors @ torch.diag(1 - 4 * a) @ vectors.T
    assert (factor @ factor.T - published).norm() < 0.03 * published.norm()


def reference_draw(kind: str, length: int = 512, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Unit-normal queries and keys at half scale; "anisotropic": unequal coordinates, and keys with a mean."""
    generator = torch.Generator().manual_seed(1)
    q, k = (0.5 * torch.randn(1, 1, length, dim, generator=generator) for _ in range(2))
    if kind == "anisotropic":
        spread = torch.linspace(1.0, -1.0, dim).exp()
        q, k = q * spread, k * spread + 0.5 * torch.randn(dim, generator=generator)
    return q, k


def attention_matrix(q: Tensor, k: Tensor, features: FavorFeatures | None, **arguments: object) -> Tensor:
    values = torch.eye(k.shape[-2]).expand(*k.shape[:2], -1, -1)
    if features is None:
        return exact_attention(q, k, values)
    return favor_attention(q, k, values, features, **arguments)  # type: ignore[arg-type]


def mean_error(kernel: str, q: Tensor, k: Tensor, draws: int = 10, num_features: int = 128) -> float:
    """Of the attention matrix, in the Frobenius norm, relative, over draws."""
    exact, errors = attention_matrix(q, k, None), []
    for seed in range(draws):
        features = FavorFeatures(q.shape[-1], num_features, kernel, seed=seed)
        if not features.is_calibrated:
            features.calibrate_(q, k)
        errors.append((attention_matrix(q, k, features) - exact).norm() / exact.norm())
    return torch.stack(errors).mean().item()


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("isotropic", "softmax-optimal"), ("isotropic", "softmax-sharp"), ("anisotropic", "softmax-sharp")],
)
def test_calibrated_features_beat_plain_ones_by_fifteen_per_cent_on_the_reference_draw(kind: str, kernel: str) -> None:
    q, k = reference_draw(kind)
    assert mean_error(kernel, q, k) < 0.85 * mean_error("softmax", q, k)


@pytest.mark.parametrize("kernel", FITTED)
def test_rows_and_forward_are_the_same_features(kernel: str) -> None:
    q, k = (x.double() for x in reference_draw("anisotropic", 60))
    features = FavorFeatures(16, 50, kernel).calibrate_(q, k)
    weights = features(q, side="query") @ features(k, side="key").mT
    attention = attention_matrix(q, k, features).double()
    torch.testing.assert_close(attention, weights / weights.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", FITTED)
def test_calibration_is_per_head_and_over_the_real_tokens_of_the_batch(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 40, 8, generator=generator) * torch.arange(1, 5)[:, None, None] for _ in range(2))
    features = FavorFeatures(8, 16, kernel).calibrate_(q, k)
    for head in range(4):
        alone = FavorFeatures(8, 16, kernel).calibrate_(q[:, head : head + 1], k[:, head : head + 1])
        for name, tensor in alone.named_buffers():
            if name != "projection":
                torch.testing.assert_close(features.get_buffer(name)[head : head + 1], tensor)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[:, :20] = False
    padding = torch.full((2, 4, 20, 8), 1e30)
    padded = FavorFeatures(8, 16, kernel).calibrate_(
        torch.cat([padding, q], 2), torch.cat([-padding, k], 2), key_padding_mask=mask
    )
    torch.testing.assert_close(dict(padded.named_buffers()), dict(features.named_buffers()))
    grouped = FavorFeatures(8, 16, kernel).calibrate_(q, k[:, :2])
    repeated = FavorFeatures(8, 16, kernel).calibrate_(q, k[:, [0, 0, 1, 1]])
    torch.testing.assert_close(dict(grouped.named_buffers()), dict(repeated.named_buffers()))


@pytest.mark.parametrize("kernel", FITTED)
def test_a_calibration_is_saved_copied_and_cast_and_survives_a_redraw(kernel: str) -> None:
    q, k = (x.expand(2, 3, -1, -1) for x in reference_draw("anisotropic", 50))
    features = FavorFeatures(16, 20, kernel).calibrate_(q, k)
    expected = attention_matrix(q, k, features, is_causal=True)
    for other in (
        FavorFeatures(16, 20, kernel, seed=1),
        FavorFeatures(16, 20, kernel, seed=1).calibrate_(q[:, :1], k[:, :1]),
        FavorFeatures(16, 20, kernel, seed=1, calibrated_heads=3),
    ):
        other.load_state_dict(features.state_dict())
        assert torch.equal(attention_matrix(q, k, other, is_causal=True), expected)
    for other in (copy.deepcopy(features), pickle.loads(pickle.dumps(features)), copy.deepcopy(features).bfloat16()):
        assert torch.equal(attention_matrix(q, k, other, is_causal=True), expected)
    other.load_state_dict(FavorFeatures(16, 20, kernel).state_dict())
    assert not other.is_calibrated
    before = {name: tensor.clone() for name, tensor in features.named_buffers() if name != "projection"}
    features.redraw_(torch.Generator().manual_seed(1))
    for name, tensor in before.items():
        assert torch.equal(features.get_buffer(name), tensor)
    with torch.device("meta"):
        waiting = FavorFeatures(16, 20, kernel, calibrated_heads=3)
    assert {tensor.device.type for tensor in waiting.buffers()} == {"cpu"}
    # Parameters that wait to be loaded are those of FAVOR+, or of no prototypes in particular.
    plain = FavorFeatures(16, 20, "exp" if kernel == "softmax-prototypes" else "softmax")
    if kernel == "softmax-prototypes":
        plain.projection.zero_()
    torch.testing.assert_close(attention_matrix(q, k, waiting), attention_matrix(q, k, plain))


@pytest.mark.parametrize("kernel", ["softmax-optimal", "softmax-sharp"])
def test_uncalibrated_features_are_fitted_to_each_sequence_and_head_alone(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 2, 70, 16, generator=generator) * 0.5 for _ in range(2))
    q, k = q * torch.arange(1, 4)[:, None, None, None], k + torch.randn(3, 2, 1, 16, generator=generator)
    features = FavorFeatures(16, 64, kernel)
    together = attention_matrix(q, k, features)
    for row in range(3):
        for head in range(2):
            one = (slice(row, row + 1), slice(head, head + 1))
            torch.testing.assert_close(attention_matrix(q[one], k[one], features), together[one], rtol=1e-4, atol=1e-5)
            itself = FavorFeatures(16, 64, kernel).calibrate_(q[one], k[one])
            torch.testing.assert_close(attention_matrix(q[one], k[one], itself), together[one], rtol=1e-3, atol=1e-4)
    mask = torch.ones(3, 100, dtype=torch.bool)
    mask[:, 50:80] = False
    padding = torch.full((3, 2, 30, 16), 1e3)
    padded = [torch.cat([x[:, :, :50], padding, x[:, :, 50:]], 2) for x in (q, k)]
    out = attention_matrix(*padded, features, key_padding_mask=mask)
    real = torch.cat([torch.arange(50), torch.arange(80, 100)])
    torch.testing.assert_close(out[:, :, real][..., real], together, rtol=1e-4, atol=1e-5)
    assert not out[..., 50:80].any()


@pytest.mark.parametrize("kernel", ["softmax-optimal", "softmax-sharp"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_fitting_to_few_equal_or_far_out_tokens_is_sound(kernel: str, length: int) -> None:
    q, k, v = (torch.randn(1, 1, length, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    features = FavorFeatures(8, 32, kernel)
    for a, b in ((q, k), (q, k[:, :, :1].expand_as(k)), (20 * q, 20 * k), (0 * q, 0 * k), (1e12 * q, 1e12 * k)):
        assert favor_attention(a, b, v, features).isfinite().all()
    nothing = torch.zeros(1, length, dtype=torch.bool)
    assert not favor_attention(q, k, v, features, key_padding_mask=nothing).any()
    far = features.rows(1e30 * q, 1e30 * k, 1.0, is_causal=False)  # the squares overflow: FAVOR+
    assert torch.equal(far.queries[0, 0], features.projection)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["softmax-optimal", "softmax-sharp"])
@pytest.mark.parametrize("projection", ["orthogonal", "hadamard"])
def test_fitting_and_structured_rows_compile_into_one_graph(kernel: str, projection: str) -> None:
    q, k = reference_draw("anisotropic", 40)
    features = FavorFeatures(16, 32, kernel, projection)

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return favor_attention(q, k, k, features, backend="chunked")

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(q, k), attend(q, k), rtol=1e-4, atol=1e-5)
    features.calibrate_(q, k)

    def causal(q: Tensor, k: Tensor) -> Tensor:
        return favor_attention(q, k, k, features, is_causal=True, backend="chunked")

    torch.testing.assert_close(torch.compile(causal, fullgraph=True)(q, k), causal(q, k), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["softmax-optimal", "softmax-sharp"])
def test_what_must_not_look_ahead_is_favor_plus_until_calibrated_and_says_so_once(kernel: str) -> None:
    q, k = reference_draw("anisotropic", 40)
    plain = FavorFeatures(16, 32)
    calls = (
        {"is_causal": True},
        {"return_state": True},
        {"cu_seqlens": torch.tensor([0, 15, 40])},
    )
    for arguments in calls:
        features = FavorFeatures(16, 32, kernel)
        with pytest.warns(UncalibratedWarning, match="calibrate_") as caught:
            twice = [favor_attention(q, k, k, features, **arguments) for _ in range(2)]  # type: ignore[call-overload]
        expected = favor_attention(q, k, k, plain, **arguments)  # type: ignore[call-overload]
        for out in twice:
            assert torch.equal(*((x[0] if isinstance(x, tuple) else x) for x in (out, expected)))
        assert len(caught) == 1
        features.calibrate_(q, k)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            favor_attention(q, k, k, FavorFeatures(16, 32, kernel))
            out = favor_attention(q, k, k, features, **arguments)  # type: ignore[call-overload]
        assert not torch.equal(*((x[0] if isinstance(x, tuple) else x) for x in (out, expected)))


def test_a_calibration_that_cannot_be_is_refused_in_words() -> None:
    q = torch.randn(1, 4, 10, 8)
    with pytest.raises(UnsupportedError, match="nothing to calibrate"):
        FavorFeatures(8, 16).calibrate_(q, q)
    features = FavorFeatures(8, 16, "softmax-sharp")
    for query, key, mask, words in (
        (q[0], q, None, "query has shape"),
        (q, q[..., :4], None, "key has shape"),
        (q, q[:, :3], None, "differ in batch or heads"),
        (q, q, torch.ones(1, 9, dtype=torch.bool), "key_padding_mask"),
        (q, q, torch.zeros(1, 10, dtype=torch.bool), "no token"),
        (q * math.inf, q, None, "not finite"),
    ):
        with pytest.raises(InputError, match=words):
            features.calibrate_(query, key, mask)
    assert not features.is_calibrated
    features.calibrate_(q, q)
    with pytest.raises(InputError, match="calibrated for 4 heads"):
        favor_attention(q[:, :2], q[:, :2], q[:, :2], features)


# -- Prototypes --


def kinds_of_tokens(generator: torch.Generator, kinds: int = 60, length: int = 400) -> tuple[Tensor, Tensor]:
    """Queries of some kinds, that vary a little, and keys with unequal coordinates: large, as in trained models."""
    kind = torch.randn(kinds, 32, generator=torch.Generator().manual_seed(5))
    q, k = (torch.randn(4, 2, length, 32, generator=generator) for _ in range(2))
    spread = torch.linspace(1.0, -1.0, 32).exp()
    return kind[torch.randint(kinds, (4, 2, length), generator=generator)] * 2 + q * 0.3, k * spread + 0.5


@pytest.mark.parametrize("is_causal", [False, True])
def test_prototypes_more_than_halve_the_error_of_favor_plus_on_sequences_that_they_have_not_seen(
    is_causal: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = FavorFeatures(32, 128, "softmax-prototypes").calibrate_(*kinds_of_tokens(generator))
    q, k = kinds_of_tokens(generator)
    v = torch.randn(4, 2, 400, 8, generator=generator)
    exact = exact_attention(q, k, v, is_causal=is_causal)
    plain, sharp = FavorFeatures(32, 128), FavorFeatures(32, 128, "softmax-sharp").calibrate_(q, k)
    error, of_plain, of_sharp = (
        ((favor_attention(q, k, v, chosen, is_causal=is_causal) - exact).norm() / exact.norm()).item()
        for chosen in (features, plain, sharp)
    )
    assert error < 0.5 * min(of_plain, of_sharp), (error, of_plain, of_sharp)


def test_more_prototypes_come_closer() -> None:
    generator = torch.Generator().manual_seed(0)
    seen, (q, k) = kinds_of_tokens(generator), kinds_of_tokens(generator)
    exact, errors = attention_matrix(q, k, None), []
    for num_features in (8, 24, 72):
        features = FavorFeatures(32, num_features, "softmax-prototypes").calibrate_(*seen)
        errors.append(((attention_matrix(q, k, features) - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.9 * errors[0], errors
    assert errors[2] < 0.9 * errors[1], errors


def test_as_many_prototypes_as_queries_are_exact_attention() -> None:
    q, k = reference_draw("anisotropic", 50)
    features = FavorFeatures(16, 64, "softmax-prototypes").calibrate_(4 * q, k)
    torch.testing.assert_close(
        attention_matrix(4 * q, k, features), attention_matrix(4 * q, k, None), rtol=1e-3, atol=1e-5
    )


def test_prototypes_are_a_pure_function_of_the_seed_and_the_tokens() -> None:
    q, k = reference_draw("anisotropic", 100)
    first, second, other = (
        attention_matrix(q, k, FavorFeatures(16, 20, "softmax-prototypes", seed=seed).calibrate_(q, k))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_clusters_of_more_tokens_than_are_looked_at_are_those_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("performers.attention.prototypes.MOST_TOKENS", 1000)
    generator = torch.Generator().manual_seed(0)
    features = FavorFeatures(32, 128, "softmax-prototypes").calibrate_(*kinds_of_tokens(generator))
    q, k = kinds_of_tokens(generator)
    exact = attention_matrix(q, k, None)
    assert (attention_matrix(q, k, features) - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_prototypes_of_few_equal_or_far_out_tokens_are_sound(length: int) -> None:
    q, k, v = (torch.randn(1, 1, length, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for a, b in (
        (q, k),
        (q[:, :, :1].expand_as(q), k),
        (q, k[:, :, :1].expand_as(k)),
        (20 * q, 20 * k),
        (0 * q, 0 * k),
    ):
        features = FavorFeatures(8, 32, "softmax-prototypes").calibrate_(a, b)
        torch.testing.assert_close(favor_attention(a, b, v, features), exact_attention(a, b, v), rtol=1e-2, atol=1e-3)


def test_prototypes_that_are_not_there_or_of_another_number_are_refused_in_words() -> None:
    q = torch.randn(1, 2, 10, 8)
    features = FavorFeatures(8, 16, "softmax-prototypes")
    for use in (lambda: favor_attention(q, q, q, features), lambda: features(q)):
        with pytest.raises(InputError, match=r"not calibrated: call features\.calibrate_"):
            use()
    with pytest.raises(RuntimeError, match="size mismatch"):
        features.load_state_dict(FavorFeatures(8, 20, "softmax-prototypes").calibrate_(q, q).state_dict())


# -- Projections --


def test_the_hadamard_transform_is_sylvesters_matrix() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    expected = torch.ones(1, 1)
    for size in (1, 2, 4, 8, 16):
        assert torch.equal(hadamard_transform(torch.eye(size)), expected)
        expected = torch.kron(two, expected)


@pytest.mark.parametrize(("head_dim", "num_features"), [(1, 3), (8, 20), (24, 50), (64, 256)])
@pytest.mark.parametrize("kernel", ["softmax", "softmax-reg"])
def test_the_fast_hadamard_projection_equals_its_matrix(head_dim: int, num_features: int, kernel: str) -> None:
    features = FavorFeatures(head_dim, num_features, kernel, "hadamard", seed=3)
    x = torch.randn(2, 7, head_dim, dtype=torch.float64)
    assert features.projection.shape == (num_features, head_dim)
    torch.testing.assert_close(features.project(x), x @ features.projection.double().T, rtol=1e-5, atol=1e-5)
    if kernel == "softmax-reg":
        torch.testing.assert_close(features.projection.norm(dim=1), torch.full((num_features,), head_dim**0.5))


@pytest.mark.parametrize("projection", ["hadamard", "givens"])
def test_structured_rows_are_orthogonal_in_each_block_and_chi_distributed(projection: str) -> None:
    rows = FavorFeatures(16, 16 * 500 + 5, projection=projection).projection.double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    blocks = unit[: 16 * 500].view(500, 16, 16)
    assert torch.allclose(blocks @ blocks.mT, torch.eye(16, dtype=torch.float64).expand(500, -1, -1), atol=1e-5)
    squares = rows.square().sum(1)
    assert abs(squares.mean() - 16) < 4 * (32 / len(squares)) ** 0.5
    assert abs(squares.var() - 32) < 3
    assert abs(unit.mean()) < 4 / unit.numel() ** 0.5


def test_hadamard_saves_its_signs_and_redraws_and_loads_them() -> None:
    features = FavorFeatures(24, 50, projection="hadamard", seed=5)
    assert set(features.state_dict()) == {"signs", "norms"}
    assert features.signs.shape == (2, 3, 32)
    assert torch.equal(features.projection, FavorFeatures(24, 50, projection="hadamard", seed=5).projection)
    other = FavorFeatures(24, 50, projection="hadamard", seed=6)
    assert not torch.equal(features.projection, other.projection)
    other.load_state_dict(features.state_dict())
    assert torch.equal(features.projection, other.projection)
    for changed in (copy.deepcopy(other), pickle.loads(pickle.dumps(other)), other.bfloat16()):
        assert torch.equal(changed.projection, features.projection)
    other.redraw_(torch.Generator().manual_seed(6))
    assert torch.equal(other.projection, FavorFeatures(24, 50, projection="hadamard", seed=6).projection)
    with torch.device("meta"):
        assert torch.equal(FavorFeatures(24, 50, projection="hadamard", seed=5).projection, features.projection)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_projection_is_a_pure_function_of_its_generator(projection: str) -> None:
    features = FavorFeatures(8, 20, projection=projection, seed=5)
    before = features.projection.clone()
    features.redraw_(torch.Generator().manual_seed(6))
    assert not torch.equal(features.projection, before)
    features.redraw_(torch.Generator().manual_seed(5))
    assert torch.equal(features.projection, before)


@pytest.mark.parametrize("kernel", ["softmax", "softmax-trig", "relu"])
def test_a_trainable_projection_learns_and_refuses_to_be_redrawn(kernel: str) -> None:
    q, k = reference_draw("isotropic", 50)
    target = attention_matrix(q, k, None)
    features = FavorFeatures(16, 20, kernel, trainable=True)
    assert [name for name, _ in features.named_parameters()] == ["projection"]
    assert torch.equal(features.projection, FavorFeatures(16, 20, kernel).projection)
    assert features.to(torch.bfloat16).projection.dtype == torch.float32
    gradients = []
    for backend in ("auto", "reference"):
        loss = (attention_matrix(q, k, features, backend=backend) - target).square().sum()
        gradients.append(torch.autograd.grad(loss, features.projection)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5 * gradients[1].abs().max().item())
    assert gradients[1].abs().max() > 0
    with pytest.raises(UnsupportedError, match="never redrawn"):
        features.redraw_(torch.Generator().manual_seed(0))


# -- The published formula --


def test_the_published_formula_is_the_authors_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16, generator=generator) for _ in range(3))
    features = FavorFeatures(16, 32, compatibility="published")
    for is_causal in (False, True):
        x, y = q / 16**0.25, k / 16**0.25
        u_q, u_k = x @ features.projection.T, y @ features.projection.T
        phi_q = torch.exp(u_q - x.square().sum(-1, keepdim=True) / 2 - u_q.amax(-1, keepdim=True)) + 1e-6
        phi_k = torch.exp(u_k - y.square().sum(-1, keepdim=True) / 2 - u_k.amax((-1, -2), keepdim=True)) + 1e-6
        weights = phi_q @ phi_k.mT / 32
        weights = weights.tril() if is_causal else weights
        sums = weights.sum(-1, keepdim=True)
        expected = weights @ v / (sums + 2e-6 * (sums <= 1e-6))
        out = published_attention(q, k, v, features, 0.25, is_causal, None)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (30, 70), (70, 30), (5, 0), (0, 5)])
@pytest.mark.parametrize("kernel", ["softmax", "softmax-trig", "relu", "exp", torch.nn.functional.softplus])
def test_published_causal_sums_are_those_of_the_quadratic_form(
    kernel: str | Callable[[Tensor], Tensor], queries: int, keys: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8, generator=generator) * 0.5 for length in (queries, keys, keys))
    mask = torch.rand(1, keys, generator=generator) > 0.3
    features = FavorFeatures(8, 16, kernel, compatibility="published")
    out = published_attention(q, k, v, features, 0.3, True, mask)
    values = torch.eye(keys).expand(1, 2, -1, -1)
    weights = published_attention(q, k, values, features, 0.3, False, mask)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    weights = weights * visible
    sums = weights.sum(-1, keepdim=True)
    expected = torch.where(visible.any(-1, keepdim=True) & (sums.abs() > 1e-9), weights / sums, 0.0) @ v
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=2e-4)


def test_the_published_formula_leaks_the_future_and_ours_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, 64, generator=generator) for _ in range(3))
    features = FavorFeatures(64, 256)
    future = k.clone()
    future[:, :, 128:] *= 1.5

    def published(key: Tensor) -> Tensor:
        return published_attention(q, key, v, features, 0.125, True, None)[:, :, :128]

    def ours(key: Tensor) -> Tensor:
        return favor_attention(q, key, v, features, is_causal=True)[:, :, :128]

    assert (published(future) - published(k)).norm() > 0.05 * published(k).norm()
    assert torch.equal(ours(future), ours(k))
    # And far-out tokens drown in epsilon: outputs sink to zero.
    alone = published_attention(4 * q, 4 * k, v, features, 0.125, False, None)
    assert alone.norm() < 0.01 * favor_attention(4 * q, 4 * k, v, features).norm()


def test_the_published_formula_is_differentiable() -> None:
    q, k, v = (torch.randn(1, 1, 20, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    features = FavorFeatures(4, 6, compatibility="published")
    for is_causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, v, causal=is_causal: published_attention(q, k, v, features, 0.5, causal, None), (q, k, v)
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel": "sofmax"}, "kernel='sofmax'"),
        ({"kernel": 3}, "kernel=3"),
        ({"projection": "orthonormal"}, "projection='orthonormal'"),
        ({"num_features": 0}, "num_features=0"),
        ({"num_features": 2.0}, "num_features=2.0"),
        ({"precision": "exact"}, "precision='exact'"),
        ({"projection": "hadamard", "trainable": True}, "made of signs: not trainable"),
        ({"projection": None, "trainable": True}, "nothing is projected: not trainable"),
        ({"kernel": "softmax-sharp", "trainable": True}, "softmax-sharp.*not trainable"),
        ({"compatibility": "official"}, "compatibility='official'"),
        ({"compatibility": "published", "kernel": "softmax-sharp"}, "no published code"),
        ({"calibrated_heads": 4}, "nothing to calibrate"),
        ({"kernel": "softmax-sharp", "calibrated_heads": -1}, "calibrated_heads=-1"),
    ],
)
def test_a_wrong_argument_of_the_features_is_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        FavorFeatures(8, **{"num_features": 16, **arguments})  # type: ignore[arg-type]
