"""The linear head that fits features best: a matrix of features and their targets in, a layer out.

A head that begins where the untouched model serves best does not distort its features while the head is still wrong (linear
probing, then finetuning: Kumar et al. 2022, arXiv 2202.10054). Numbers are fitted by ridge regression in closed form, labels by
multinomial logistic regression, both on standardised features; the penalty is the one that suits the validation set best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
"""Of the mean squared weight of a standardised feature, against the mean loss of an example; the strongest first."""
_ITERATIONS = 100


@dataclass(frozen=True)
class Examples:
    """What a head is fitted to or chosen by.

    Attributes:
        features: (N, d), of any floating type.
        targets: (N,) numbers in floating point, or classes as int64.
    """

    features: Tensor
    targets: Tensor


class StandardisedLinear(nn.Module):
    """A linear layer of features that are standardised first, as they were before anything was learned.

    It is a linear layer of the features too (`folded`), but steps of one size suit all of its weights. Vectors of variants of one
    protein differ by little, and a step of the body that is small beside the vectors moves all of them by more than that, in the
    same direction. So the centre follows what a reference protein, read along, has moved by.

    Arguments:
        features: d.
        outputs: the number of outputs.

    Attributes:
        centre, scale: (d,), the mean and the standard deviation of the features.
        reference: (d,), the features that the reference protein had then.
        follows: whether the first row of the input is the reference protein as it is now.
        moved: what the centre has moved by since, where there is no such row.
    """

    centre: Tensor
    scale: Tensor
    reference: Tensor
    moved: Tensor | float

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, features))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("reference", torch.zeros(features))
        self.follows, self.moved = False, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., outputs), in float32 whatever autocast says."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            moved = x[0] - self.reference if self.follows else self.moved
            return F.linear((x - self.centre - moved) / self.scale, self.weight, self.bias)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The linear layer that does the same."""
        found = nn.Linear(self.weight.shape[1], self.weight.shape[0]).to(self.weight.device)
        weight = self.weight.double() / self.scale.double()
        found.weight.copy_(weight)
        found.bias.copy_(self.bias.double() - weight @ (self.centre + self.moved).double())
        return found


def fit_linear(train: Examples, validation: Examples, outputs: int) -> StandardisedLinear:
    """The head of the penalty whose loss on the validation set is lowest.

    Arguments:
        train, validation: at least one example each; where the targets are classes they are below `outputs`.
        outputs: 1 for numbers, otherwise the number of classes. A class without a training example gets no weights and
            a bias below all others.

    """
    features = train.features.double()
    centre, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1)
    features, held_out = (features - centre) / scale, (validation.features.double() - centre) / scale
    fit = _fit_numbers if train.targets.is_floating_point() else _fit_classes
    weight = features.new_zeros(outputs, features.shape[1])
    bias = features.new_zeros(outputs)
    best = (float("inf"), weight, bias)
    for penalty in PENALTIES:
        weight, bias = fit(features, train.targets, penalty, weight, bias)
        loss = float(_loss(F.linear(held_out, weight, bias), validation.targets))
        if loss < best[0]:
            best = loss, weight, bias
    layer = StandardisedLinear(features.shape[1], outputs)
    fitted = {"weight": best[1], "bias": best[2], "centre": centre, "scale": scale}
    layer.load_state_dict(fitted | {"reference": centre})
    return layer


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return F.mse_loss(outputs[:, 0], targets.double())
    return F.cross_entropy(outputs, targets)


def _fit_numbers(x: Tensor, y: Tensor, penalty: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression; x has mean zero, so the bias is the mean of the targets."""
    y = y.double()
    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ (y - y.mean()) / len(x))[None], y.mean()[None]


def _fit_classes(x: Tensor, y: Tensor, penalty: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression over the classes that have an example, from the solution of a stronger penalty."""
    present, y = torch.unique(y, return_inverse=True)
    parameters = [weight[present].requires_grad_(), bias[present].requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(F.linear(x, *parameters), y) + penalty / 2 * parameters[0].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted, level = (parameter.detach() for parameter in parameters)
    weight, bias = torch.zeros_like(weight), (level.min() - torch.tensor(len(x) + 1.0).log()).expand(len(bias)).clone()
    weight[present], bias[present] = fitted, level
    return weight, bias
