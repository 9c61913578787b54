"""PyTorch's own attention module made linear: `nn.MultiheadAttention`, alone or inside `nn.TransformerEncoder` and its like.

A module is converted by giving it another class (as `torch.nn.utils.parametrize` does): it stays the same object with the same
parameters under the same names, so optimizers, hooks and state_dicts know it as before. PyTorch's Transformer layers have a fast
path that goes past the attention module, straight to its weights; they do not take it with modules of this class.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from performers.attention import MECHANISMS
from performers.conversion.wiring import layer_numbers
from performers.errors import InputError, UnsupportedError
from performers.randomness import derive_seed

_log = logging.getLogger(__name__)

_MECHANISM = "_performers_mechanism"  # on a converted module: its mechanism, not registered as a submodule
_NESTED = "_performers_nested"  # on an nn.TransformerEncoder: whether it made nested tensors of padded ones


class LinearMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with one of our mechanisms in place of softmax attention; made by `performers.convert` only."""

    @property
    def _qkv_same_embed_dim(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        # What the fast path of nn.TransformerEncoderLayer asks before it goes past `forward`.
        return False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention`, with `need_weights=False`.

        Arguments:
            query, key, value: (L, B, E), (B, L, E) if `batch_first`, or (L, E).
            key_padding_mask: (B, Lk), bool with True for padding, or 0 and -inf.
            need_weights: has to be False.
            attn_mask: None or the causal mask.
            average_attn_weights: of no effect.
            is_causal: a query sees no later key.

        Returns:
            The output, shaped like the query, and None.

        Raises:
            UnsupportedError: weights, a mask that is not the causal one, or nested tensors.
        """
        if need_weights:
            raise UnsupportedError(
                "MultiheadAttention: need_weights=True, but linear attention never forms attention weights: call it with "
                "need_weights=False."
            )
        if query.is_nested or key.is_nested or value.is_nested:
            raise UnsupportedError(
                "MultiheadAttention: nested tensors cannot be used here: pad them, with key_padding_mask."
            )
        is_cross_attention = key is not query
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        causal = is_causal or attn_mask is not None
        if attn_mask is not None:
            _check_causal(attn_mask, query.shape[1], key.shape[1])
        mechanism = self.__dict__[_MECHANISM]
        if is_cross_attention and key_padding_mask is not None and mechanism.needs_one_sequence:
            raise UnsupportedError(
                f"MultiheadAttention: cross-attention to padded keys cannot be expressed by {type(mechanism).__name__}, which "
                "needs queries and keys of one sequence."
            )
        if next((tensor.device for tensor in mechanism.buffers()), query.device) != query.device:
            mechanism.to(query.device)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._projected(query, key, value))
        out = mechanism(q, k, v, is_causal=causal, key_padding_mask=_real(key_padding_mask))
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases, strict=True)]


def convert(model: nn.Module, attention: str, layers: list[int] | None, seed: int, arguments: dict[str, Any]) -> None:
    """Convert every `nn.MultiheadAttention` of a module, in place; "exact" puts PyTorch's back.

    Raises:
        InputError: there is none, or an argument is not valid.
        UnsupportedError: one of them has a feature that cannot be expressed.
    """
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if not modules:
        raise InputError(
            f"{type(model).__name__} is no model of Hugging Face, and there is no nn.MultiheadAttention in it."
        )
    if attention == "exact":
        _restore(model)
        return
    numbers = layer_numbers(layers, len(modules))
    mechanisms: dict[int, nn.Module] = {}
    for number, (name, module) in enumerate(modules):
        if numbers is not None and number not in numbers:
            continue
        if module.bias_k is not None or module.add_zero_attn:
            raise UnsupportedError(
                f"{name or type(model).__name__}: add_bias_kv and add_zero_attn are keys that belong to no token, which is not "
                f"supported."
            )
        seed_of_layer = derive_seed(seed, "projection", number, module.head_dim)
        mechanisms[number] = MECHANISMS[attention](head_dim=module.head_dim, seed=seed_of_layer, **arguments)
    # Nothing is changed before all of it is known to be in order.
    _restore(model)
    few = next((number for number, mechanism in mechanisms.items() if _has_few_features(mechanism)), None)
    exact = None if few is None else _on_random_vectors(modules[few][1], seed)
    dropped = False
    for number, mechanism in mechanisms.items():
        module = modules[number][1]
        dropped |= module.dropout > 0
        module.dropout = 0.0
        module.__dict__[_MECHANISM] = mechanism
        module.__class__ = LinearMultiheadAttention
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.__dict__[_NESTED] = encoder.use_nested_tensor
            encoder.use_nested_tensor = False
    if dropped:
        _log.warning(
            "%s: attention dropout is set to 0: linear attention has no weights to drop.", type(model).__name__
        )
    if few is not None and exact is not None:
        module, features = modules[few][1], cast("Any", mechanisms[few]).features
        error = (_on_random_vectors(module, seed) - exact).norm() / exact.norm()
        _log.warning(
            "%s: num_features=%d is less than the head size, %d: on random vectors the outputs of attention are off by %.0f %%.",
            type(model).__name__,
            features.num_features,
            features.head_dim,
            100 * error.item(),
        )


def _has_few_features(mechanism: nn.Module) -> bool:
    features = getattr(mechanism, "features", None)
    return features is not None and features.num_features < features.head_dim


@torch.no_grad()
def _on_random_vectors(module: nn.MultiheadAttention, seed: int) -> Tensor:
    """The module's outputs for 64 vectors, the same ones in every call, in evaluation mode."""
    weight = module.out_proj.weight
    generator = torch.Generator().manual_seed(derive_seed(seed, "random vectors"))
    query = torch.randn(64, module.embed_dim, generator=generator).to(weight)
    key, value = (
        query if size == module.embed_dim else torch.randn(64, size, generator=generator).to(weight)
        for size in (module.kdim, module.vdim)
    )
    was_training = module.training
    try:
        return module.eval()(query, key, value, need_weights=False)[0]
    finally:
        module.train(was_training)


def _restore(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LinearMultiheadAttention):
            del module.__dict__[_MECHANISM]
            module.__class__ = nn.MultiheadAttention  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, nn.TransformerEncoder) and _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)


def _real(padding: Tensor | None) -> Tensor | None:
    """True for a real token, of a mask that says the opposite.

    Raises:
        UnsupportedError: it adds something else than nothing or minus infinity.
    """
    if padding is None or padding.dtype == torch.bool:
        return None if padding is None else ~padding
    real = padding == 0
    if not bool((real | (padding == -torch.inf)).all()):
        raise UnsupportedError(
            "MultiheadAttention: key_padding_mask adds to the logits, which linear attention cannot express."
        )
    return real


def _check_causal(mask: Tensor, num_queries: int, num_keys: int) -> None:
    hidden = mask if mask.dtype == torch.bool else mask == -torch.inf
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=mask.device).triu(1)
    seen = mask.dtype == torch.bool or bool((hidden | (mask == 0)).all())
    if num_queries != num_keys or not seen or hidden.shape[-2:] != causal.shape or not bool((hidden == causal).all()):
        raise UnsupportedError(
            "MultiheadAttention: attn_mask is not the causal mask, and no other can be expressed by linear attention: give "
            "key_padding_mask for padding, or is_causal=True."
        )
