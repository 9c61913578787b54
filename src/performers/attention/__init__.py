"""Attention mechanisms as pure PyTorch functions, shaped like `scaled_dot_product_attention`.

Nothing here knows of proteins or of Hugging Face. `MECHANISMS` is the seam for models: a module class per mechanism, made from
a head size, a seed and the mechanism's own keyword arguments, and called with queries, keys and values.
"""

from performers.attention.exact import (
    ExactAttention,
    ExactState,
    MaterialisedAttention,
    exact_attention,
    materialised_attention,
)
from performers.attention.favor import FavorAttention, FavorState, favor_attention
from performers.attention.features import FavorFeatures, UncalibratedWarning
from performers.attention.local import LocalAttention, local_attention
from performers.attention.mechanism import Mechanism
from performers.attention.parallel import (
    SequenceGroup,
    SequenceShard,
    ring_attention_bytes,
    sharded_favor_attention,
)
from performers.attention.reformer import ReformerAttention, reformer_attention
from performers.attention.sparse import SparseAttention, sparse_attention, sparse_pattern
from performers.attention.split import SplitAttention, SplitState
from performers.attention.visibility import visible_keys

MECHANISMS: dict[str, type[Mechanism]] = {
    "favor": FavorAttention,
    "exact": ExactAttention,
    "exact-materialised": MaterialisedAttention,
    "reformer": ReformerAttention,
    "sparse": SparseAttention,
    "local": LocalAttention,
    "split": SplitAttention,
}

__all__ = [
    "MECHANISMS",
    "ExactAttention",
    "ExactState",
    "FavorAttention",
    "FavorFeatures",
    "FavorState",
    "LocalAttention",
    "MaterialisedAttention",
    "Mechanism",
    "ReformerAttention",
    "SequenceGroup",
    "SequenceShard",
    "SparseAttention",
    "SplitAttention",
    "SplitState",
    "UncalibratedWarning",
    "exact_attention",
    "favor_attention",
    "local_attention",
    "materialised_attention",
    "reformer_attention",
    "ring_attention_bytes",
    "sharded_favor_attention",
    "sparse_attention",
    "sparse_pattern",
    "visible_keys",
]
