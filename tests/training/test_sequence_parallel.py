"""A model whose tokens lie on several processes computes what it computes of all of them: positions, dropout, loss, gradients."""

from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
import ranks
import torch

from performers.attention import SequenceGroup, SequenceShard
from performers.errors import InputError, UnsupportedError
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

CASES: list[dict[str, Any]] = [
    *(
        {"is_causal": is_causal, "kernel": kernel, **tokens}
        for is_causal in (False, True)
        for kernel in ("relu", "softmax")
        for tokens in ({"rows": 2}, {"rows": 2, "padded": True}, {"rows": 1})
    ),
    {"is_causal": True, "kernel": "relu", "rows": 2, "architecture": {"reversible": True}},
    {"is_causal": False, "kernel": "relu", "rows": 1, "architecture": {"reversible": True}},
    {"is_causal": False, "kernel": "softmax", "rows": 2, "checkpointing": True},
    {"is_causal": True, "kernel": "softmax", "rows": 1, "checkpointing": True},
    {"is_causal": False, "kernel": "relu", "rows": 2, "architecture": {"chunk_size_feed_forward": 5}},
]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_values_and_gradients_are_those_of_one_process(size: int, context: ForkServerContext) -> None:
    assert ranks.statuses(ranks.launch(context, ranks.compare_with_the_whole, size, CASES)) == [0] * size


def test_heads_of_two_kernels_may_lie_on_several_processes_and_of_a_window_may_not() -> None:
    group = SequenceGroup()
    ids = torch.randint(4, 24, (1, 12))
    two = {"first": "favor", "second": "favor", "first_kwargs": {"kernel": "softmax"}}
    model = PerformerForMaskedLM(PerformerConfig.preset("tiny", attention="split", attention_kwargs=two)).eval()
    torch.testing.assert_close(model(ids, sequence=group.shard(12)).logits, model(ids).logits)
    model = PerformerForMaskedLM(PerformerConfig.preset("tiny", attention="split"))
    with pytest.raises(UnsupportedError, match="split: attention to tokens that lie on several processes"):
        model(ids, sequence=group.shard(12))


def test_what_does_not_go_with_tokens_on_several_processes_is_refused() -> None:
    group, ids = SequenceGroup(), torch.randint(4, 24, (1, 12))
    model = PerformerForCausalLM(PerformerConfig.preset("tiny"))
    with pytest.raises(UnsupportedError, match="read at once, without a context, a cache or a state"):
        model(ids, sequence=group.shard(12), use_cache=True)
    with pytest.raises(InputError, match="The input has 12 tokens: expected the 11 of this process"):
        model(ids, sequence=group.shard(11))
    with pytest.raises(InputError, match="0 tokens over 1 processes"):
        group.shard(0)
    with pytest.raises(InputError, match="cu_seqlens must rise from 0 to the length 12"):
        model(ids, sequence=SequenceShard(group, ((0, 12),)), cu_seqlens=torch.tensor([0, 5, 11]))
