"""One sequence over several processes gives what one process gives: values, gradients, padding, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from performers.attention import FavorFeatures, favor_attention
from performers.attention.parallel import SequenceGroup, ring_attention_bytes, sharded_favor_attention
from performers.errors import RunError, UnsupportedError

# Lengths of the stretches; sequences that begin and end inside of one, at its border, and lie over two or all of them.
STRETCHES = {1: [37], 2: [20, 17], 3: [11, 0, 26], 4: [9, 10, 8, 10]}
PACKED = ([0, 37], [0, 3, 20, 20, 31, 37], [0, 9, 19, 27, 37], [0, 2, 30, 37], [0, 18, 36, 37])


def draw(dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, 37, size, generator=generator, dtype=dtype) for size in (16, 16, 8, 8)]


def _cases() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for kernel in ("softmax", "relu", "softmax-trig"):
        for is_causal in (False, True):
            cases.append({"kernel": kernel, "is_causal": is_causal, "batch": 2})
            cases.append({"kernel": kernel, "is_causal": is_causal, "batch": 2, "masked": True})
            cases += [{"kernel": kernel, "is_causal": is_causal, "offsets": offsets} for offsets in PACKED]
    return cases


def _arguments(case: dict[str, Any]) -> tuple[FavorFeatures, dict[str, Any]]:
    arguments: dict[str, Any] = {"is_causal": case["is_causal"]}
    if case.get("masked"):
        mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[1] = False  # nothing to attend to anywhere
        arguments["key_padding_mask"] = mask
    if "offsets" in case:
        arguments["cu_seqlens"] = torch.tensor(case["offsets"])
    return FavorFeatures(16, 32, case["kernel"]), arguments


def _gradients(out: Tensor, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def _on_each(rank: int, size: int, rendezvous: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    group, found = SequenceGroup(), []
    start = sum(STRETCHES[size][:rank])
    at = slice(start, start + STRETCHES[size][rank])
    for case in _cases():
        features, arguments = _arguments(case)
        *inputs, d_out = (x[:, :, at] for x in draw(torch.float64, case.get("batch", 1)))
        inputs = [x.clone().requires_grad_() for x in inputs]
        if "key_padding_mask" in arguments:
            arguments["key_padding_mask"] = arguments["key_padding_mask"][:, at]
        out = sharded_favor_attention(*inputs, features, group, **arguments)
        found.append(_gradients(out, inputs, d_out))
    sent = group.bytes_sent
    group.check_agreement({"the projection": FavorFeatures(16, 32, seed=0).projection})
    disagreement = ""
    try:
        same, other = FavorFeatures(16, 32, seed=0).projection, FavorFeatures(16, 32, seed=rank).projection
        group.check_agreement({"what is the same": same, "the projection": other})
    except RunError as error:
        disagreement = str(error)
    torch.save({"found": found, "disagreement": disagreement, "sent": sent}, f"{results}-{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))])
def test_any_number_of_processes_gives_the_values_and_gradients_of_one(size: int, tmp_path: Path) -> None:
    mp.spawn(_on_each, (size, str(tmp_path / "rendezvous"), str(tmp_path / "results")), nprocs=size)
    results = [torch.load(f"{tmp_path / 'results'}-{rank}") for rank in range(size)]
    for number, case in enumerate(_cases()):
        features, arguments = _arguments(case)
        *inputs, d_out = draw(torch.float64, case.get("batch", 1))
        inputs = [x.requires_grad_() for x in inputs]
        expected = _gradients(favor_attention(*inputs, features, **arguments), inputs, d_out)
        for position, wanted in enumerate(expected):
            actual = torch.cat([result["found"][number][position] for result in results], 2)
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, c=case: f"{c}: {text}")
    for result in results:
        assert (size == 1) == (not result["disagreement"])
        assert result["disagreement"].startswith("the projection differs between the processes" if size > 1 else "")


def _sent_on_each(rank: int, size: int, rendezvous: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    features, sent = FavorFeatures(16, 32), []
    for is_causal in (False, True):
        for length in (8, 64):
            group = SequenceGroup()
            q, k, v = (torch.randn(1, 2, length, 16).requires_grad_() for _ in range(3))
            sharded_favor_attention(q, k, v, features, group, is_causal=is_causal).sum().backward()
            sent.append(group.bytes_sent)
    torch.save(sent, f"{results}-{rank}")
    dist.destroy_process_group()


def test_what_is_sent_does_not_grow_with_the_length(tmp_path: Path) -> None:
    mp.spawn(_sent_on_each, (2, str(tmp_path / "rendezvous"), str(tmp_path / "results")), nprocs=2)
    for rank in range(2):
        bidirectional, longer, causal, longer_causal = torch.load(f"{tmp_path / 'results'}-{rank}")
        assert bidirectional == longer > 0
        assert causal == longer_causal
        # The scales forward, the sums forward and their gradients backward, as an all-reduce over two sends them.
        assert bidirectional == 4 * 2 * 32 * (1 + 2 * 17)
    assert ring_attention_bytes(2048, 2, 16, 2, 4) == 2 * ring_attention_bytes(1024, 2, 16, 2, 4)


def test_features_without_a_fixed_state_are_refused() -> None:
    q = torch.randn(1, 1, 4, 16)
    for features in (FavorFeatures(16, 32, compatibility="published"), FavorFeatures(16, 32, "softmax-sharp")):
        with pytest.raises(UnsupportedError, match="cannot be computed on several processes"):
            sharded_favor_attention(q, q, q, features, SequenceGroup())
