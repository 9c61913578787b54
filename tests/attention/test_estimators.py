"""What theory says of the features: unbiased kernels, their variances, and what orthogonality gains."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from performers.attention import FavorFeatures, exact_attention, favor_attention
from performers.errors import InputError

DRAWS = 4000


def estimates(x: Tensor, y: Tensor, num_features: int, kernel: str, projection: str, draws: int = DRAWS) -> Tensor:
    """phi(x).phi(y) of `draws` independent projections; x and y are used as they are, scale 1."""
    features = FavorFeatures(x.shape[-1], num_features, kernel=kernel, projection=projection)
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(draws):
        features.redraw_(generator)
        found.append((features(x.double(), 1.0) * features(y.double(), 1.0)).sum(-1))
    return torch.stack(found)


def pair(norm: float, angle: float, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Two vectors of one norm at an angle, in a direction that is no axis."""
    generator = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(dim, 2, generator=generator, dtype=torch.float64))
    return norm * basis[:, 0], norm * (math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 1])


PAIRS = [(0.5, 0.3), (0.9, 1.2), (0.9, 2.8)]  # |x + y|^2 <= 4


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
@pytest.mark.parametrize("kernel", ["softmax", "softmax-hyperbolic"])
@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_softmax_features_estimate_the_kernel_without_bias(
    norm: float, angle: float, kernel: str, projection: str
) -> None:
    x, y = pair(norm, angle)
    found = estimates(x, y, 16, kernel, projection)
    standard_error = found.std() / DRAWS**0.5
    assert abs(found.mean() - torch.exp(x @ y)) < 4 * standard_error


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


@pytest.mark.parametrize("kernel", ["softmax", "softmax-hyperbolic"])
@pytest.mark.parametrize(("norm", "angle"), PAIRS)
def test_variance_of_iid_softmax_features_is_lemma_2s(norm: float, angle: float, kernel: str) -> None:
    x, y = pair(norm, angle)
    num_features = 8
    squares = (estimates(x, y, num_features, kernel, "iid", 20_000) - torch.exp(x @ y)).square()
    z = (x + y).square().sum()
    expected = torch.exp(z) * torch.exp(2 * x @ y) * (1 - torch.exp(-z)) / num_features  # 2009.14794, Lemma 2
    if kernel == "softmax-hyperbolic":
        expected *= (1 - torch.exp(-z)) / 2
    assert abs(squares.mean() - expected) < 4 * squares.std() / len(squares) ** 0.5


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel": "sofmax"}, "kernel='sofmax'"),
        ({"kernel": 3}, "kernel=3"),
        ({"projection": "orthonormal"}, "projection='orthonormal'"),
        ({"num_features": 0}, "num_features=0"),
        ({"num_features": 2.0}, "num_features=2.0"),
        ({"precision": "exact"}, "precision='exact'"),
    ],
)
def test_a_wrong_argument_of_the_features_is_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        FavorFeatures(8, **{"num_features": 16, **arguments})  # type: ignore[arg-type]
