"""What Reformer and the Sparse Transformer promise beyond the laws that all mechanisms obey."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from mechanisms import reformer_oracle
from torch import Tensor

from performers import exact_attention, reformer_attention, sparse_attention, sparse_pattern
from performers.attention import ReformerAttention, SparseAttention
from performers.errors import InputError


def draw(length: int, heads: int = 2, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, length, dim, generator=generator) for _ in range(3))  # type: ignore[return-value]


def shared_attention(q: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Exact attention with keys q / |q|, to oneself only where there is nothing else."""
    length = q.shape[2]
    logits = q @ torch.nn.functional.normalize(q, dim=-1).mT * q.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.eye(length, dtype=torch.bool), -1e5)
    if is_causal:
        logits = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    return torch.softmax(logits, -1) @ v


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_hashes", [1, 3])
def test_one_chunk_for_all_keys_is_exact_shared_attention(is_causal: bool, num_hashes: int) -> None:
    q, _, v = (x.double() for x in draw(75))
    inputs = [q.requires_grad_(), v.requires_grad_()]
    out = reformer_attention(q, q, v, num_hashes=num_hashes, bucket_size=75, is_causal=is_causal)
    expected = shared_attention(q, v, is_causal)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_one_chunk_for_separate_keys_is_exact_attention() -> None:
    q, k, v = draw(75)
    torch.testing.assert_close(reformer_attention(q, k, v, bucket_size=100), exact_attention(q, k, v))


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_hashes", "length"), [(1, 97), (3, 300)])
def test_shared_queries_and_keys_obey_the_laws_of_padding_and_packing(
    num_hashes: int, length: int, is_causal: bool, layout: str
) -> None:
    mechanism = ReformerAttention(16, num_hashes=num_hashes, bucket_size=16)
    q, _, v = draw(length)
    arguments: dict[str, Tensor | bool] = {"is_causal": is_causal}
    if layout == "padded":
        mask = torch.rand(1, length, generator=torch.Generator().manual_seed(4)) > 0.3
        mask[:, :20] = False
        arguments["key_padding_mask"] = mask
    if layout == "packed":
        arguments["cu_seqlens"] = torch.tensor([0, 1, 1, 40, length])
    inputs, exact = [[x.to(dtype).requires_grad_() for x in (q, v)] for dtype in (torch.float32, torch.float64)]
    out = mechanism(inputs[0], inputs[0], inputs[1], **arguments)
    expected = reformer_oracle(mechanism, exact[0], exact[0], exact[1], **arguments)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, inputs, upstream)
    for actual, wanted in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_token_that_sees_nothing_else_attends_to_itself() -> None:
    q, _, v = draw(40)
    out = reformer_attention(q, q, v, bucket_size=8, is_causal=True)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])
    assert not torch.allclose(out[:, :, 1], v[:, :, 1])


def test_more_rounds_of_hashing_come_nearer_to_exact_attention() -> None:
    q, _, v = draw(1000, dim=32)
    q = q * 3
    expected = shared_attention(q, v, is_causal=False)
    errors = []
    for num_hashes in (1, 4, 16):
        draws = [reformer_attention(q, q, v, num_hashes=num_hashes, bucket_size=32, seed=s) for s in range(3)]
        errors.append(torch.stack([(out - expected).square().mean() for out in draws]).mean().item())
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2], errors


def test_hashing_finds_nearer_keys_than_chance() -> None:
    # Every token has one near twin far away in the sequence; rounds of hashing must find most of them.
    generator = torch.Generator().manual_seed(0)
    twins = torch.randn(1, 1, 512, 32, generator=generator)
    q = torch.cat([twins, twins + 0.1 * torch.randn(twins.shape, generator=generator)], 2)
    v = torch.arange(1024.0).view(1, 1, 1024, 1)
    found = reformer_attention(q, q, v, num_hashes=4, bucket_size=32, scale=20.0)[0, 0, :, 0]
    near = (found - v[0, 0, :, 0].roll(512)).abs() < 1
    assert near.float().mean() > 0.9


@pytest.mark.parametrize("length", [1, 2, 31, 97, 1000])
def test_any_length_goes_and_the_same_seed_gives_the_same_answer(length: int) -> None:
    q, _, v = draw(length)
    first = reformer_attention(q, q, v, num_hashes=2, bucket_size=16, seed=3, is_causal=True)
    assert first.isfinite().all()
    assert torch.equal(first, reformer_attention(q, q, v, num_hashes=2, bucket_size=16, seed=3, is_causal=True))
    if length > 90:
        assert not torch.equal(first, reformer_attention(q, q, v, num_hashes=2, bucket_size=16, seed=4, is_causal=True))


def test_many_buckets_are_hashed_in_two_factors() -> None:
    q, _, v = draw(2000)
    out = reformer_attention(q, q, v, num_hashes=2, bucket_size=4)
    assert out.isfinite().all()
    assert not torch.allclose(out, v)


def later_tokens_move_it(attend: Callable[[Tensor, Tensor], Tensor]) -> float:
    """How much of the first half's output other tokens in the second half change, as a share of its norm."""
    q, _, v = draw(1024, dim=32)
    other, _, other_v = draw(1024, dim=32, seed=1)
    before = attend(q, v)[:, :, :512]
    after = attend(torch.cat([q[:, :, :512], other[:, :, 512:]], 2), torch.cat([v[:, :, :512], other_v[:, :, 512:]], 2))
    return ((after[:, :, :512] - before).norm() / before.norm()).item()


def test_how_much_later_tokens_move_causal_hashing_is_known() -> None:
    """By a share of the output's norm, less so where more rounds show more keys, and not at all where one chunk holds all."""

    def moved(num_hashes: int, bucket_size: int) -> float:
        return later_tokens_move_it(
            lambda q, v: reformer_attention(q, q, v, num_hashes=num_hashes, bucket_size=bucket_size, is_causal=True)
        )

    assert 0.1 < moved(8, 64) < moved(1, 64) < 0.8
    assert moved(4, 1024) < 1e-6
    assert later_tokens_move_it(lambda q, v: exact_attention(q, q, v, is_causal=True)) < 1e-6


def test_causal_hashing_depends_on_later_tokens_which_is_its_nature() -> None:
    """The weights are causal; which earlier keys fill a query's chunks is not. The docstring of the module says so."""
    q, _, v = draw(512)
    before = reformer_attention(q, q, v, num_hashes=2, bucket_size=32, is_causal=True)[:, :, :256]
    changed_q, changed_v = q.clone(), v.clone()
    changed_v[:, :, 256:] *= 1000  # values of later tokens reach nothing
    assert torch.equal(
        reformer_attention(q, q, changed_v, num_hashes=2, bucket_size=32, is_causal=True)[:, :, :256], before
    )
    changed_q[:, :, 256:] = changed_q[:, :, 256:].roll(1, -1)  # but later queries move the borders of chunks
    after = reformer_attention(changed_q, changed_q, v, num_hashes=2, bucket_size=32, is_causal=True)[:, :, :256]
    assert not torch.allclose(after, before)


def test_a_state_hashes_anew_and_is_exact_where_one_chunk_holds_all_keys() -> None:
    q, _, v = draw(200)
    for bucket_size, exact in ((200, True), (16, False)):
        mechanism = ReformerAttention(16, num_hashes=2, bucket_size=bucket_size)
        state, pieces = None, []
        for rows in (slice(0, 90), slice(90, 91), slice(91, 200)):
            piece, state = mechanism(
                q[:, :, rows], q[:, :, rows], v[:, :, rows], is_causal=True, state=state, return_state=True
            )
            pieces.append(piece)
        streamed, whole = torch.cat(pieces, 2), mechanism(q, q, v, is_causal=True)
        assert torch.allclose(streamed, whole, atol=1e-5) is exact
        # the last piece has seen every key, and so the chunks of the whole
        torch.testing.assert_close(streamed[:, :, 91:], whole[:, :, 91:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize(("length", "stride"), [(1, None), (50, None), (333, None), (100, 7), (64, 8), (20, 64)])
def test_sparse_attention_is_exact_attention_under_its_pattern(
    length: int, stride: int | None, pattern: str, is_causal: bool
) -> None:
    inputs = [x.double().requires_grad_() for x in draw(length)]
    q, k, v = inputs
    visible = sparse_pattern(length, pattern, stride, is_causal)
    out = sparse_attention(q, k, v, pattern=pattern, stride=stride, is_causal=is_causal)
    logits = (q @ k.mT * 16**-0.5).masked_fill(~visible, -torch.inf)
    expected = torch.softmax(logits, -1) @ v
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_the_patterns_are_the_papers() -> None:
    # 1904.10509, section 4.2, written down for i = 9 and a stride of 4.
    strided = sparse_pattern(12, "strided", 4, is_causal=True)
    assert strided[9].nonzero()[:, 0].tolist() == [1, 5, 6, 7, 8, 9]
    fixed = sparse_pattern(12, "fixed", 4, is_causal=True, summary=1)
    assert fixed[9].nonzero()[:, 0].tolist() == [3, 7, 8, 9]
    assert sparse_pattern(12, "strided", 4)[5].nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert sparse_pattern(12, "fixed", 4, summary=1)[5].nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7, 11]


def released_fixed(length: int, stride: int, block: int, head: int) -> Tensor:
    """ "fixed" of the released code, of which every head has a stripe of one block: in blocks, then in positions."""
    i, j = torch.arange(length // block)[:, None], torch.arange(length // block)[None]
    per = stride // block
    blocks = ((j % per == per - 1 - head) | (j // per == i // per)) & (j <= i)
    return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1).tril()


def test_the_released_codes_patterns_are_others() -> None:
    """What the module's docstring says of openai/sparse_attention, attention.py."""
    i, j = torch.arange(96)[:, None], torch.arange(96)[None]
    released_strided = (j <= i) & ((i - j) % 16 == 0)

    def released_local(width: int) -> Tensor:
        return (j <= i) & (j + width > i)

    paper = sparse_pattern(96, "strided", 16, is_causal=True)
    assert torch.equal(paper, released_local(17) | released_strided)
    assert not torch.equal(paper, released_strided)
    # a set of its own makes one key less: the one at a distance of l is in the strided set
    assert torch.equal(paper, released_local(16) | released_strided)
    fixed = sparse_pattern(96, "fixed", 16, is_causal=True, summary=4)
    assert torch.equal(fixed, released_fixed(96, 16, 4, head=0))
    assert not torch.equal(fixed, released_fixed(96, 16, 4, head=1))


@pytest.mark.parametrize("length", [1, 5, 9, 50, 333])
def test_a_summary_fits_the_stride_that_follows_from_a_length(length: int) -> None:
    q, k, v = draw(length)
    visible = sparse_pattern(length, "fixed", None, summary=4)
    stride = round(length**0.5)
    assert torch.equal(visible, sparse_pattern(length, "fixed", stride, summary=min(4, stride)))
    expected = torch.softmax((q @ k.mT * 16**-0.5).masked_fill(~visible, -torch.inf), -1) @ v
    mechanism = SparseAttention(16, pattern="fixed", stride=None, summary=4)
    torch.testing.assert_close(mechanism(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_a_query_sees_about_the_square_root_of_the_keys() -> None:
    for pattern in ("strided", "fixed"):
        seen = [sparse_pattern(n, pattern, is_causal=True, summary=1).sum() / n for n in (256, 4096)]
        assert seen[1] < 4.5 * seen[0]  # 16 times the length


MEMORY = """
import torch, performers, performers.attention
from performers.memory import peak_memory
torch.manual_seed(0)
for length in (64, 32768):
    q, k, v = (torch.randn(1, 2, length, 32).requires_grad_() for _ in range(3))
    torch.autograd.grad({call}.sum(), (q, k, v))
    print(peak_memory())
"""


@pytest.mark.parametrize(
    "call",
    [
        "(performers.reformer_attention(q, q, v, is_causal=True) + performers.reformer_attention(q, k, v))",
        "performers.sparse_attention(q, k, v, is_causal=True)",
        "performers.sparse_attention(q, k, v, pattern='fixed')",
        "performers.attention.local_attention(q, k, v)",
    ],
    ids=["reformer", "strided", "fixed", "local"],
)
def test_no_matrix_of_length_by_length_is_ever_formed(call: str) -> None:
    code = MEMORY.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.splitlines()]
    # One bool per pair would take 1 GiB a head; inputs, outputs and gradients take 100 MiB.
    assert peaks[1] - peaks[0] < 600 * 2**20, peaks


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: sparse_attention(q, q, q, pattern="random"), "pattern='random'"),
        (lambda q: sparse_attention(q, q, q, stride=0), "stride=0"),
        (lambda q: SparseAttention(4, stride=None, summary=0), "summary=0"),
        (lambda q: sparse_attention(q, q, q, pattern="fixed", stride=4, summary=5), "summary=5"),
        (lambda q: sparse_attention(q, q, q, return_state=True), "give a stride"),
        (lambda q: reformer_attention(q, q, q, num_hashes=0), "num_hashes=0"),
        (lambda q: reformer_attention(q, q, q, bucket_size=2.5), "bucket_size=2.5"),
    ],
)
def test_a_wrong_argument_is_named(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(torch.randn(1, 1, 10, 4))  # type: ignore[operator]
