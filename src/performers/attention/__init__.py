"""Attention mechanisms as pure PyTorch functions, shaped like `scaled_dot_product_attention`.

Nothing here knows of proteins or of Hugging Face. `MECHANISMS` is the seam for models: a module class per mechanism, made from
a head size, a seed and the mechanism's own keyword arguments, and called with queries, keys and values.
"""

from performers.attention.exact import ExactAttention, ExactState, exact_attention
from performers.attention.favor import FavorAttention, FavorState, favor_attention
from performers.attention.features import FavorFeatures, UncalibratedWarning
from performers.attention.reformer import ReformerAttention, reformer_attention
from performers.attention.sparse import SparseAttention, sparse_attention, sparse_pattern
from performers.attention.visibility import visible_keys

MECHANISMS = {
    "favor": FavorAttention,
    "exact": ExactAttention,
    "reformer": ReformerAttention,
    "sparse": SparseAttention,
}

__all__ = [
    "MECHANISMS",
    "ExactAttention",
    "ExactState",
    "FavorAttention",
    "FavorFeatures",
    "FavorState",
    "ReformerAttention",
    "SparseAttention",
    "UncalibratedWarning",
    "exact_attention",
    "favor_attention",
    "reformer_attention",
    "sparse_attention",
    "sparse_pattern",
    "visible_keys",
]
