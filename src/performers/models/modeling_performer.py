"""The Performer: a Transformer in which attention is a plug.

Token ids (or embeddings) come in, hidden states, logits and losses go out. A layer is the usual pre-norm one: rotary positions,
attention, a GELU feed-forward block. What attention computes is not known here: each layer has one of
`performers.attention.MECHANISMS`, by name, and asks it for outputs and, when decoding, for a state to carry on from.

Memory is linear in the length L with a small constant: nothing of size L x L or L x M (random features) is ever kept. Where a
sequence is long, whole layers run a chunk of tokens at a time and are recomputed in the backward pass (see `chunking`), so that
nothing else of length L is kept than a layer's input, nor are the inner vectors of a feed-forward block or the logits. A
reversible model does not keep the layers' inputs either (see `reversible`).
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from performers.attention import MECHANISMS, Mechanism, SequenceShard
from performers.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from performers.models.bundled import located, take_names
from performers.models.chunking import run_in_chunks
from performers.models.configuration_performer import PerformerConfig
from performers.models.context import PerformerContext
from performers.models.reversible import Call, Streams, Tape, run_reversibly
from performers.randomness import derive_seed

IGNORED = -100  # Hugging Face's label of a token that does not count
TOKENS_TURNED = 512  # at a time by the rotary positions
TOKENS_DRAWN = 512  # whose dropout comes from one seed: a chunk of a sequence draws no more than it needs


class PerformerCache(Cache):
    """What a causal Performer remembers of the tokens before: one attention state per layer, as `generate` carries it along.

    A FAVOR state has the same size whatever the number of tokens; an exact one holds every key and value.

    Attributes:
        states: the state of each layer's mechanism, None before the first token.
        num_tokens: how many tokens the states have seen, padding included.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])  # Hugging Face's cache layers hold keys and values; ours hold states
        self.states: list[Any] = [None] * num_layers
        self.num_tokens = 0

    @classmethod
    def after(cls, context: PerformerContext, rows: int = 1) -> Self:
        """The cache of `rows` sequences that see a context and have not begun: what `generate` takes as `past_key_values`."""
        cache = cls(len(context.states))
        cache.states = list(context.for_rows(rows).states)
        return cache

    def check_packed(self) -> None:
        """Refuse packed sequences, which could not be told apart by the next tokens."""
        raise InputError("A cache goes on with one sequence per batch row: it cannot be combined with cu_seqlens.")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens have been seen."""
        return self.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: any number of tokens fits."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows of the batch, as beam search asks."""
        self.states = [None if state is None else state.reorder(beam_idx) for state in self.states]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not needed: `generate` repeats a prompt before it is read."""
        raise UnsupportedError("A Performer's state cannot be repeated: repeat the prompt instead.")

    def reset(self) -> None:
        """Forget everything."""
        self.states = [None] * len(self.states)
        self.num_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: what a state has summed up cannot be taken out again."""
        raise UnsupportedError(
            "A Performer's state cannot be rolled back, so assisted generation is not possible with it."
        )

    @property
    def is_croppable(self) -> bool:
        """Never."""
        return False

    def __len__(self) -> int:
        return len(self.states)


class _OneReading(PerformerCache):
    """The states of a forward pass that begins from a context or leaves one behind, and does not go on: bidirectional, too."""

    def check_packed(self) -> None:
        """Nothing follows, so packed sequences may have a state each."""


def map_chunks(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> list[Tensor]:
    """The results of `function` on consecutive pieces of at most `size` tokens along dimension 1.

    Where there is more than one piece, the backward pass recomputes each of them, so that only `tensors` and the results are
    kept. A `size` of 0 means one piece.
    """
    if not 0 < size < tensors[0].shape[1]:
        return [function(*tensors)]
    pieces = zip(*(tensor.split(size, dim=1) for tensor in tensors), strict=True)
    if not torch.is_grad_enabled():
        return [function(*piece) for piece in pieces]
    return [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]


@torch.library.custom_op("performers::keyed_dropout", mutates_args=())
def keyed_dropout(
    hidden: Tensor, keys: Tensor, probability: float, layer: int, site: str, start: int, length: int
) -> Tensor:
    """Dropout as a pure function of keys: the same key drops the same elements in any batch, process, chunk or replay.

    The backward pass draws the mask again instead of keeping it.

    Arguments:
        hidden: of shape (B, C, d): C tokens of each of B rows.
        keys: integers of shape (R,). The tokens of the B rows are R spans of equal length, one after the other, a key each.
        probability: of an element to be dropped, to the nearest 1/65536; the others are divided by 1 - probability.
        layer, site: where in the model this is; each place draws on its own.
        start, length: the C tokens are those from `start` on of rows of `length` tokens.
    """
    rows, tokens, width = hidden.shape
    dropped = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not hidden.numel():
        return dropped
    limit = min(round(probability * 65536), 65535)
    scale = 65536 / (65536 - limit)
    span, numbers = rows * length // len(keys), keys.tolist()
    generator = torch.Generator(hidden.device)
    # Sixteen bits an element, four elements a draw.
    draws = torch.empty(-(-min(span, TOKENS_DRAWN) * width // 4), dtype=torch.int64, device=hidden.device)
    for row in range(rows):
        done = 0
        while done < tokens:
            key, offset = divmod(row * length + start + done, span)
            block, skipped = divmod(offset, TOKENS_DRAWN)
            count = min(tokens - done, span - offset, TOKENS_DRAWN - skipped)
            generator.manual_seed(derive_seed(numbers[key], "dropout", layer, site, block))
            bits = draws[: -(-(skipped + count) * width // 4)].random_(-(2**63), None, generator=generator)
            lanes = bits.view(torch.int16)[skipped * width : (skipped + count) * width]
            kept = lanes.ge_(limit - 32768).view(count, width).to(hidden.dtype)
            piece = dropped[row, done : done + count]
            torch.mul(hidden[row, done : done + count], scale, out=piece).mul_(kept)
            done += count
    return dropped


@keyed_dropout.register_fake
def _(hidden: Tensor, keys: Tensor, probability: float, layer: int, site: str, start: int, length: int) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _save_keys(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, keys, *ctx.place = inputs
    ctx.save_for_backward(keys)


def _drop_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
    return keyed_dropout(gradient, *ctx.saved_tensors, *ctx.place), None, None, None, None, None, None


keyed_dropout.register_autograd(_drop_gradient, setup_context=_save_keys)


class DropoutKeys(NamedTuple):
    """The keys of a batch, and which of its tokens are at hand: those from `start` on of rows of `length` tokens."""

    keys: Tensor
    start: int
    length: int


class PerformerDropout(nn.Module):
    """Dropout of one place in the model: by keys where there are any, by torch's global generator otherwise."""

    def __init__(self, probability: float, site: str, layer_idx: int = 0) -> None:
        super().__init__()
        self.p, self.site, self.layer_idx = probability, site, layer_idx

    def forward(self, hidden: Tensor, dropout_keys: DropoutKeys | None) -> Tensor:
        """`hidden` of shape (B, L, d), with elements dropped in training."""
        if not self.training or self.p == 0:
            return hidden
        if dropout_keys is None:
            return F.dropout(hidden, self.p)
        keys, start, length = dropout_keys
        return keyed_dropout(hidden, keys, self.p, self.layer_idx, self.site, start, length)


class PerformerRotary(nn.Module):
    """Rotary positions (RoFormer, 2104.09864, equation 34): queries and keys turn by angles proportional to their position.

    A position of a million times a frequency has lost the turn within float32's 24 bits; the angles are computed in float64.
    """

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, in float32 and of shape (B, 1, L, D / 2), of positions of shape (B, L)."""
        dtype = torch.float32 if position_ids.device.type == "mps" else torch.float64
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=dtype) / self.head_dim
        angles = position_ids[:, None, :, None] * self.theta**-exponents
        return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys of shape (B, H, L, D), turned in the planes (i, i + D / 2)."""
    cos, sin = rotary
    if torch.compiler.is_compiling():  # which fuses the formula itself
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    turned = _Rotation.apply(x, cos, sin)
    assert isinstance(turned, Tensor)
    return turned


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient turns back; a piece that stays in cache at a time, in the memory layout of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    out, half = torch.empty_like(x), x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, cos.dtype)
    for start in range(0, x.shape[2], TOKENS_TURNED):
        rows = slice(start, start + TOKENS_TURNED)
        first, second = x[:, :, rows].to(wide).chunk(2, dim=-1)
        c, s = cos[:, :, rows], sin[:, :, rows]
        out[:, :, rows, :half] = (first * c).addcmul_(second, s, value=-sign)
        out[:, :, rows, half:] = (second * c).addcmul_(first, s, value=sign)
    return out


def rounded(hidden: Tensor) -> Tensor:
    """`hidden` in the type that autocast computes products in: once, where several take it."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


class ResidualLinear(nn.Linear):
    """A linear map back into the residual stream, initialised so small that the sum over all layers keeps its size."""


def attend_packed(
    mechanism: Mechanism,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    state: Any,
    return_state: bool,
    **arguments: Any,
) -> Any:
    """A mechanism's outputs for packed sequences, each of which has a state of its own: sequence i is row i of the states."""
    outs: list[Tensor] = []
    states: list[Any] = []
    offsets: list[int] = cu_seqlens.tolist()
    before = [None] * (len(offsets) - 1) if state is None else state.rows()
    for past, (start, stop) in zip(before, pairwise(offsets), strict=True):
        q, v = query[:, :, start:stop], value[:, :, start:stop]
        k = q if key is query else key[:, :, start:stop]
        out = mechanism(q, k, v, state=past, return_state=return_state, **arguments)
        outs.append(out[0] if return_state else out)
        if return_state:
            states.append(out[1])
    out = torch.cat(outs, dim=2)
    return (out, states[0].joined(states[1:])) if return_state else out


class PerformerAttention(nn.Module):
    """Multi-head self-attention by the mechanism that the configuration names for this layer."""

    def __init__(self, config: PerformerConfig, layer_idx: int, is_causal: bool) -> None:
        super().__init__()
        self.num_heads, self.is_causal = config.num_attention_heads, is_causal
        self.seed = derive_seed(config.seed, "projection", layer_idx)
        name = config.mechanisms[layer_idx]
        self.mechanism = MECHANISMS[name](head_dim=config.head_dim, seed=self.seed, **config.kwargs_of(name))
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = None if self.mechanism.shares_query_and_key else nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = ResidualLinear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: Any,
        return_state: bool,
        sequence: SequenceShard | None = None,
    ) -> tuple[Tensor, Any]:
        """The outputs, of shape (B, L, d), and the state after the last token, if asked for."""
        hidden = rounded(hidden)
        query = rotate(self._heads(self.q_proj, hidden), rotary)
        has_states = state is not None or return_state
        attend: Any = (
            partial(attend_packed, self.mechanism) if has_states and cu_seqlens is not None else self.mechanism
        )
        out = attend(
            query,
            query if self.k_proj is None else rotate(self._heads(self.k_proj, hidden), rotary),
            self._heads(self.v_proj, hidden),
            is_causal=self.is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
            sequence=sequence,
        )
        out, state = out if return_state else (out, None)
        return self.out_proj(out.transpose(1, 2).flatten(2)), state

    @property
    def has_fixed_state(self) -> bool:
        """Whether a sequence can be read chunk by chunk through a state of fixed size."""
        return self.mechanism.has_fixed_causal_state if self.is_causal else self.mechanism.has_fixed_state

    def absorb(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], key_padding_mask: Tensor | None, state: Any) -> Any:
        """The state after these tokens, given the one before."""
        assert self.k_proj is not None
        hidden = rounded(hidden)
        k, v = rotate(self._heads(self.k_proj, hidden), rotary), self._heads(self.v_proj, hidden)
        _, state = self.mechanism(k[:, :, :0], k, v, key_padding_mask=key_padding_mask, state=state, return_state=True)
        return state

    def read(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], state: Any) -> Tensor:
        """What these tokens read from a state that holds all that they see."""
        q = rotate(self._heads(self.q_proj, hidden), rotary)
        out = self.mechanism(q, q[:, :, :0], q[:, :, :0], state=state)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, project: nn.Module, hidden: Tensor) -> Tensor:
        """Queries, keys or values (B, H, L, D)."""
        return project(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class PerformerFeedForward(nn.Module):
    """Layer norm, up to intermediate_size, GELU, and back, by chunks of tokens."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.in_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.out_proj = ResidualLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """A tensor of the shape of `hidden`, (B, L, d)."""
        chunks = map_chunks(lambda x: self.out_proj(F.gelu(self.in_proj(self.norm(x)))), self.chunk_size, hidden)
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


class PerformerLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: PerformerConfig, layer_idx: int, is_causal: bool) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.chunk_size = config.chunk_size_layer
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PerformerAttention(config, layer_idx, is_causal)
        self.attention_dropout = PerformerDropout(config.hidden_dropout_prob, "attention", layer_idx)
        self.feed_forward = PerformerFeedForward(config)
        self.feed_forward_dropout = PerformerDropout(config.hidden_dropout_prob, "feed_forward", layer_idx)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: PerformerCache | None = None,
        dropout_keys: DropoutKeys | None = None,
        sequence: SequenceShard | None = None,
    ) -> Tensor:
        """The residual stream after this layer, (B, L, d); the layer's state in the cache, if there is one, is moved on."""
        if past_key_values is not None:
            past = past_key_values.states[self.layer_idx]
            hidden, past_key_values.states[self.layer_idx] = self.advance(
                hidden, rotary, key_padding_mask, dropout_keys, cu_seqlens, past, return_state=True
            )
            return hidden
        return self.whole(hidden, rotary, key_padding_mask, cu_seqlens, dropout_keys, sequence)

    def whole(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        dropout_keys: DropoutKeys | None,
        sequence: SequenceShard | None,
    ) -> Tensor:
        """What `advance` puts out for sequences that have no state to go on from; long ones a chunk at a time."""
        if cu_seqlens is None and sequence is None and self.runs_in_chunks(hidden.shape[1]):
            return run_in_chunks(self, hidden, rotary, key_padding_mask, dropout_keys)
        return self.advance(hidden, rotary, key_padding_mask, dropout_keys, cu_seqlens, sequence=sequence)[0]

    def runs_in_chunks(self, length: int) -> bool:
        """Whether a sequence of so many tokens goes through this layer a chunk at a time."""
        return (
            0 < self.chunk_size < length
            and self.attention.has_fixed_state
            and not torch.compiler.is_compiling()  # a graph would hold every chunk
        )

    def advance(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_padding_mask: Tensor | None,
        dropout_keys: DropoutKeys | None,
        cu_seqlens: Tensor | None = None,
        state: Any = None,
        return_state: bool = False,
        sequence: SequenceShard | None = None,
    ) -> tuple[Tensor, Any]:
        """The residual stream after this layer, and the state after these tokens, if asked for."""
        normed = self.attention_norm(hidden)
        attended, state = self.attention(normed, rotary, key_padding_mask, cu_seqlens, state, return_state, sequence)
        return self._output(hidden, attended, dropout_keys), state

    def absorb(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], key_padding_mask: Tensor | None, state: Any) -> Any:
        """The state of a bidirectional layer after these tokens, given the one before."""
        return self.attention.absorb(self.attention_norm(hidden), rotary, key_padding_mask, state)

    def read(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], state: Any, dropout_keys: DropoutKeys | None
    ) -> Tensor:
        """The residual stream after a bidirectional layer, given the state after all tokens."""
        return self._output(hidden, self.attention.read(self.attention_norm(hidden), rotary, state), dropout_keys)

    def fed_forward(self, hidden: Tensor, dropout_keys: DropoutKeys | None) -> Tensor:
        """What the feed-forward block adds to the residual stream."""
        return self.feed_forward_dropout(self.feed_forward(hidden), dropout_keys)

    def _output(self, hidden: Tensor, attended: Tensor, dropout_keys: DropoutKeys | None) -> Tensor:
        hidden = hidden + self.attention_dropout(attended, dropout_keys)
        return hidden + self.fed_forward(hidden, dropout_keys)


class ReversibleLayer(PerformerLayer):
    """The same blocks between two streams, x1 + attention(norm(x2)) and x2 + feed_forward(norm(y1)): see `reversible`.

    What `advance` and `read` give, whole or in chunks, is what attention adds to the first stream.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        streams: Streams,
        rotary: tuple[Tensor, Tensor],
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: PerformerCache | None = None,
        dropout_keys: DropoutKeys | None = None,
        sequence: SequenceShard | None = None,
    ) -> Streams:
        """The streams after this layer; the layer's state in the cache, if there is one, is moved on."""
        x1, x2 = streams.first, streams.second
        if streams.tape is not None:
            return run_reversibly(Call(self, rotary, key_padding_mask, cu_seqlens, dropout_keys, sequence), streams)
        if past_key_values is not None:
            past = past_key_values.states[self.layer_idx]
            attended, past_key_values.states[self.layer_idx] = self.advance(
                x2.to(self.dtype), rotary, key_padding_mask, dropout_keys, cu_seqlens, past, return_state=True
            )
        else:
            attended = self.attended(x2, rotary, key_padding_mask, cu_seqlens, dropout_keys, sequence)
        y1 = x1 + attended
        return streams.after(y1, x2 + self.fed_forward(y1, dropout_keys))

    def attended(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        dropout_keys: DropoutKeys | None,
        sequence: SequenceShard | None,
    ) -> Tensor:
        """What attention adds to the first stream, given the second."""
        return self.whole(hidden.to(self.dtype), rotary, key_padding_mask, cu_seqlens, dropout_keys, sequence)

    def fed_forward(self, hidden: Tensor, dropout_keys: DropoutKeys | None) -> Tensor:
        """What the feed-forward block adds to the second stream, given the first."""
        return super().fed_forward(hidden.to(self.dtype), dropout_keys)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights; the streams are wider where it is of 16 bits."""
        return self.attention_norm.weight.dtype

    def _output(self, hidden: Tensor, attended: Tensor, dropout_keys: DropoutKeys | None) -> Tensor:
        return self.attention_dropout(attended, dropout_keys)


class PerformerPreTrainedModel(PreTrainedModel):
    """What all Performers share: how they are initialised, saved and loaded, and how their random features are redrawn."""

    config: PerformerConfig
    base_model_prefix = "performer"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Hugging Face's Trainer passes num_items_in_batch
    _no_split_modules = ["PerformerLayer", "ReversibleLayer"]  # noqa: RUF012 (Hugging Face's types)
    _keep_in_fp32_modules_strict = ["mechanism"]  # noqa: RUF012 (rounded projections are not orthogonal)

    def __init__(self, config: PerformerConfig, **kwargs: Any) -> None:
        config.validate_architecture()
        if config._attn_implementation not in (None, "eager"):
            raise ConfigError(
                f"attn_implementation={config._attn_implementation!r}: the attention of a Performer is chosen by its "
                f"configuration, attention={config.attention!r}."
            )
        super().__init__(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Hugging Face's, and by the name of a bundled model; from safetensors alone: a pickle runs code when it is opened.

        Raises:
            InputError: there is no bundled model of that name.
            CheckpointError: the folder's weights are a pickle or damaged.
        """
        pretrained_model_name_or_path = located(pretrained_model_name_or_path)
        if pretrained_model_name_or_path is not None:
            _refuse_pickles(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, "use_safetensors": True})
        except SafetensorError as error:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: the weights are not a valid safetensors file ({error})."
            ) from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualLinear):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            initialization.normal_(module.weight, std=std)

    def initialize_weights(self) -> None:
        """Initialise what the checkpoint, if there is one, did not have; random features as in a new model, from their seed."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, PerformerAttention):
                loaded = [getattr(buffer, "_is_hf_initialized", False) for buffer in module.mechanism.buffers()]
                if not all(loaded):
                    module.mechanism.redraw_(torch.Generator().manual_seed(module.seed))

    @property
    def redraws_by_default(self) -> bool:
        """Whether training gains from redrawing the random features of any layer."""
        return any(
            module.mechanism.redraws_by_default for module in self.modules() if isinstance(module, PerformerAttention)
        )

    @property
    def has_fixed_states(self) -> bool:
        """Whether every layer's attention state has a fixed size, so that sequences can be read chunk by chunk."""
        return all(module.has_fixed_state for module in self.modules() if isinstance(module, PerformerAttention))

    @property
    def cannot_shard_sequences(self) -> tuple[str, ...]:
        """The mechanisms of layers whose tokens cannot lie on several processes."""
        layers = [module for module in self.modules() if isinstance(module, PerformerLayer)]
        names = [self.config.mechanisms[x.layer_idx] for x in layers if not x.attention.mechanism.shards_sequences]
        return tuple(dict.fromkeys(names))

    def redraw_features_(self, seed: int, step: int) -> None:
        """Draw the random features of every layer anew, in place, as a pure function of (seed, step, layer)."""
        for module in self.modules():
            if isinstance(module, PerformerLayer):
                generator = torch.Generator().manual_seed(derive_seed(seed, "redraw", step, module.layer_idx))
                module.attention.mechanism.redraw_(generator)


def _refuse_pickles(folder: Path) -> None:
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt")]
    if pickles and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{pickles[0]}: a pickle can run code when it is opened, so it is not. Convert it where you trust it: "
            f"safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')."
        )


class PerformerModel(PerformerPreTrainedModel):
    """Embeddings, layers and a final norm: token ids in, a vector per token out.

    Arguments:
        config: the shape of the model.
        is_causal: whether a token sees only what comes before it. It is an argument of the class, never of the configuration:
            `PerformerForCausalLM` is causal, everything else is not, and a causal checkpoint's base model is loaded with
            `PerformerModel.from_pretrained(folder, is_causal=True)`.
    """

    def __init__(self, config: PerformerConfig, is_causal: bool = False) -> None:
        super().__init__(config)
        self.is_causal = is_causal
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_dropout = PerformerDropout(config.hidden_dropout_prob, "embeddings")
        self.rotary = PerformerRotary(config)
        layer = ReversibleLayer if config.reversible else PerformerLayer
        self.layers = nn.ModuleList(layer(config, i, is_causal) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: PerformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        dropout_keys: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        context: PerformerContext | None = None,
        sequence: SequenceShard | None = None,
    ) -> BaseModelOutputWithPast:
        """The hidden states of a batch of B rows of L tokens, or of packed sequences in one row.

        Arguments:
            input_ids: token ids (B, L), or else `inputs_embeds` (B, L, d).
            attention_mask: (B, L), 1 for a token and 0 for padding, on whichever side; with `past_key_values`, (B, tokens seen
                before + L).
            position_ids: (B, L). Without them positions count the tokens that are not padding, in each packed sequence anew.
                They turn queries and keys and separate nothing.
            cu_seqlens: (N + 1,) offsets of N sequences packed into one row, which do not see each other.
            past_key_values: the state to go on from; it is moved on in place. Causal models only.
            use_cache: whether to return a state where none is given.
            dropout_keys: (R,) integers. The B x L tokens are R equal spans, and each drops elements as a pure function of its
                key; with `past_key_values` one key per row, for all of its tokens. Without them torch's global generator is
                used.
            output_hidden_states: whether to return the embeddings and every layer's output, the last one after the final norm.
            context: what other proteins left behind (`read_context`), which every token sees besides its own sequence: one row
                for all sequences, or one for each. A causal model's cache begins from it.
            sequence: the tokens are this process's stretch of rows that lie on several (`SequenceGroup.shard`): all arguments
                of shape (B, L) are those of the stretch, `cu_seqlens` and `dropout_keys` those of the whole. All processes of
                the group call this, and differentiate it, together.

        Raises:
            InputError: arguments that contradict each other.
            UnsupportedError: what no Performer can do: attention maps, masks of more than two dimensions; or what a layer's
                attention cannot.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise UnsupportedError(
                "output_attentions: a Performer never forms attention weights, so it cannot return them."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Give either input_ids or inputs_embeds.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if context is not None:
            past_key_values = self._begun(context, hidden, cu_seqlens, past_key_values, bool(use_cache))
        if use_cache and past_key_values is None:
            past_key_values = PerformerCache(self.config.num_hidden_layers)
        if sequence is not None:
            self._check_sharded(sequence, hidden, past_key_values)
        start, whole = (0, hidden.shape[1]) if sequence is None else (sequence.start, sequence.length)
        if isinstance(past_key_values, PerformerCache) and cu_seqlens is not None:
            past_key_values.check_packed()
        seen = 0 if past_key_values is None else self._tokens_seen(past_key_values)
        _check_inputs(hidden, seen, whole, attention_mask, position_ids, cu_seqlens, dropout_keys)
        layers: Any = self.layers
        in_chunks = past_key_values is None and cu_seqlens is None and sequence is None
        in_chunks = in_chunks and any(layer.runs_in_chunks(hidden.shape[1]) for layer in layers)
        tape = self._tape() if past_key_values is None else None
        if dropout_keys is None and self.training and (in_chunks or tape is not None):
            dropout_keys = torch.randint(2**62, (1,))  # what is replayed drops the same then
        dropout = None if dropout_keys is None else DropoutKeys(dropout_keys, seen + start, seen + whole)
        key_padding_mask = None if attention_mask is None else attention_mask[:, seen:].bool()
        rotary = self.rotary(
            _positions(hidden, seen, attention_mask, cu_seqlens, sequence) if position_ids is None else position_ids
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        hidden = self.embed_dropout(hidden, dropout)
        dtype = hidden.dtype
        stream: Any = hidden
        if self.config.reversible:
            stream = Streams.of(hidden, tape)
        elif in_chunks:
            stream = rounded(hidden)  # every layer keeps its input
        all_hidden: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if output_hidden_states:
                all_hidden += (stream.merged().to(dtype) if self.config.reversible else stream,)
            stream = layer(
                stream,
                rotary,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
                past_key_values=past_key_values,
                dropout_keys=dropout,
                sequence=sequence,
            )
        hidden = self.norm(stream.merged().to(dtype) if self.config.reversible else stream)
        if past_key_values is not None:
            past_key_values.num_tokens += hidden.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=None if isinstance(past_key_values, _OneReading) else past_key_values,
            hidden_states=(*all_hidden, hidden) if output_hidden_states else None,
        )

    def read_context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> PerformerContext:
        """What each sequence, read alone, leaves behind for others: a context with a row for each. Differentiable.

        Arguments: as `forward` takes them; with `cu_seqlens` a sequence is a packed one, otherwise a row of the batch.

        Raises:
            UnsupportedError: no layer has attention that can leave its sequence.
        """
        layers: Any = self.layers
        if not any(layer.attention.mechanism.shared_kinds for layer in layers):
            raise UnsupportedError(
                f"attention={self.config.attention!r}: no layer can read another protein's state; expected favor or exact "
                "attention in some layer."
            )
        cache = _OneReading(self.config.num_hidden_layers)
        self(input_ids, attention_mask, position_ids, cu_seqlens, past_key_values=cache, dropout_keys=dropout_keys)
        states = tuple(
            layer.attention.mechanism.shareable(state) for layer, state in zip(layers, cache.states, strict=True)
        )
        return PerformerContext(states, len(input_ids) if cu_seqlens is None else len(cu_seqlens) - 1)

    def _begun(
        self,
        context: PerformerContext,
        hidden: Tensor,
        cu_seqlens: Tensor | None,
        past_key_values: PerformerCache | None,
        use_cache: bool,
    ) -> PerformerCache:
        """The cache of sequences that see a context and have not begun."""
        if past_key_values is not None:
            raise InputError("Give either context or past_key_values, which begins from one (`PerformerCache.after`).")
        if len(context.states) != self.config.num_hidden_layers:
            raise InputError(
                f"The context has states for {len(context.states)} layers, and the model has {self.config.num_hidden_layers}."
            )
        kind = PerformerCache if self.is_causal and use_cache else _OneReading
        return kind.after(context, len(hidden) if cu_seqlens is None else len(cu_seqlens) - 1)

    def _check_sharded(self, sequence: SequenceShard, hidden: Tensor, past_key_values: PerformerCache | None) -> None:
        if past_key_values is not None:
            raise UnsupportedError(
                "sequence: tokens that lie on several processes are read at once, without a context, a cache or a state."
            )
        if self.cannot_shard_sequences:
            raise UnsupportedError(
                f"{', '.join(self.cannot_shard_sequences)}: attention to tokens that lie on several processes takes a mechanism "
                "that sums them up, such as favor, in every layer."
            )
        if hidden.shape[1] != sequence.stop - sequence.start:
            raise InputError(
                f"The input has {hidden.shape[1]} tokens: expected the {sequence.stop - sequence.start} of this process."
            )

    def _tape(self) -> Tape | None:
        """The tape of reversible layers that keep nothing: where there is a backward pass, and not in a compiled graph."""
        if not self.config.reversible or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            raise UnsupportedError(
                "gradient checkpointing: reversible layers keep nothing that it could save; switch one of them off."
            )
        return {}

    def _tokens_seen(self, cache: Cache) -> int:
        if not self.is_causal and not isinstance(cache, _OneReading):
            raise UnsupportedError("past_key_values, use_cache: only a causal Performer can go on from a state.")
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            raise UnsupportedError("past_key_values, use_cache: gradient checkpointing would move the state on twice.")
        if not isinstance(cache, PerformerCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}: expected a PerformerCache.")
        return cache.num_tokens


def _check_inputs(
    hidden: Tensor,
    seen: int,
    whole: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_keys: Tensor | None,
) -> None:
    rows, length = hidden.shape[:2]
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise UnsupportedError(
                f"attention_mask has {attention_mask.ndim} dimensions: a Performer takes a padding mask of two, "
                f"(batch, length), and cu_seqlens for packed sequences."
            )
        if attention_mask.shape != (rows, seen + length):
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: expected {(rows, seen + length)}, for {seen} tokens "
                f"seen before and {length} now."
            )
    if position_ids is not None and cu_seqlens is None and not torch.compiler.is_compiling():
        restarts = position_ids[:, 1:] < position_ids[:, :-1]
        if attention_mask is not None:
            real = attention_mask[:, seen:].bool()
            restarts = restarts & real[:, 1:] & real[:, :-1]
        if restarts.any():
            # So Hugging Face tells packed sequences apart; here they would see each other.
            raise InputError("position_ids start again within a row: cu_seqlens is what keeps packed sequences apart.")
    if dropout_keys is not None and seen and dropout_keys.shape != (rows,):
        raise InputError(
            f"dropout_keys has shape {tuple(dropout_keys.shape)}: with past_key_values expected {(rows,)}, a key for each row."
        )
    if dropout_keys is not None and (
        dropout_keys.ndim != 1 or not len(dropout_keys) or rows * whole % len(dropout_keys)
    ):
        raise InputError(
            f"dropout_keys has shape {tuple(dropout_keys.shape)}: expected a row of keys whose number divides the "
            f"{rows * whole} tokens of the batch."
        )


def _positions(
    hidden: Tensor,
    seen: int,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence: SequenceShard | None,
) -> Tensor:
    """Positions, (B or 1, L), that count tokens from 0 where a sequence begins; padding is not counted."""
    if attention_mask is not None:
        counted = attention_mask.long().cumsum(1)
        if sequence is not None:
            counted = counted + sequence.summed_before(attention_mask.long().sum(1))[:, None]
        return (counted - 1).clamp(min=0)[:, seen:]
    first = seen if sequence is None else sequence.start
    positions = torch.arange(first, first + hidden.shape[1], device=hidden.device)
    if cu_seqlens is not None:
        starts = cu_seqlens.to(positions)
        positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
    return positions[None]


class PerformerLanguageModel(PerformerPreTrainedModel):
    """A `PerformerModel` with an output layer over the vocabulary and a cross-entropy loss."""

    is_causal: ClassVar[bool]
    _tied_weights_keys = {"lm_head.weight": "performer.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.performer = PerformerModel(config, is_causal=self.is_causal)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        context_ids: Tensor | None = None,
        relatives: Tensor | None = None,
        sequence: SequenceShard | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and, given labels, the loss.

        Arguments:
            input_ids, attention_mask, position_ids, cu_seqlens, inputs: as `PerformerModel.forward` takes them.
            labels: (B, L) token ids, -100 where no token counts. A causal model predicts each label from the tokens before it
                (the labels are those of the inputs, not shifted); a masked one at its own position.
            num_items_in_batch: what to divide the summed loss by; the number of labels that count when None.
            logits_to_keep: compute logits for this many last tokens, or these positions, only; 0 for all.
            context_ids: (B, L) the same sequences as others see them, with nothing masked.
            relatives: (N, N), with `context_ids`; sequence i is read with a context of the sequences j, each read alone and
                counted relatives[i, j] times.
            sequence: as `PerformerModel.forward` takes it. The loss is then this process's part of the sum, and by default it is
                divided by the labels of all.

        Returns:
            `loss`, a scalar in float32, zero if no label counts, and `logits` (B, L, vocab_size). In training with labels the
            logits are None: only the loss is needed then, and they are never formed as a whole.
        """
        if (context_ids is None) != (relatives is None):
            raise InputError("context_ids and relatives belong together: what is read, and by whom.")
        if context_ids is not None and relatives is not None:
            read = self.performer.read_context(
                context_ids, attention_mask, position_ids, cu_seqlens, inputs.get("dropout_keys")
            )
            inputs["context"] = read.mixed(relatives)
        outputs = self.performer(
            input_ids, attention_mask, position_ids, cu_seqlens, return_dict=True, sequence=sequence, **inputs
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            if self.is_causal:
                start = 0 if sequence is None else sequence.start
                if cu_seqlens is not None:  # nothing comes before the first token of a sequence
                    places = torch.arange(start, start + labels.shape[1], device=labels.device)
                    labels = labels.masked_fill(torch.isin(places, cu_seqlens.to(labels.device)), IGNORED)
                following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
                labels = following if sequence is None else sequence.one_ahead(labels, IGNORED)
            if sequence is not None and num_items_in_batch is None:
                num_items_in_batch = sequence.group.sum_((labels != IGNORED).sum()).clamp(min=1)
            loss = self.cross_entropy(hidden, labels, num_items_in_batch)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def cross_entropy(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        """The summed cross-entropy of (B, L) labels given the hidden states (B, L, d) that predict them, over `num_items`.

        Unlike the labels of `forward`, these stand where they are predicted: a causal model's are one token ahead of the input.
        """

        def summed(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = self.lm_head(hidden).float()
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)

        losses = map_chunks(summed, self.config.chunk_size_feed_forward, hidden, labels.to(hidden.device))
        if num_items is None:
            num_items = (labels != IGNORED).sum().clamp(min=1).to(hidden.device)
        return torch.stack(losses).sum() / num_items


class PerformerForMaskedLM(PerformerLanguageModel):
    """A bidirectional Performer that predicts masked residues."""

    is_causal = False


class PerformerForCausalLM(PerformerLanguageModel, GenerationMixin):
    """A causal Performer that predicts the next residue, and generates with a state of constant size."""

    is_causal = True
    _is_stateful = True  # a state cannot be rolled back

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves it to `forward` to make the cache


class PerformerForSequenceClassification(PerformerPreTrainedModel):
    """A label or a number per protein, from the mean of its tokens' vectors."""

    accepts_loss_kwargs = False  # Hugging Face's loss for this task is a mean over the batch

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.performer = PerformerModel(config)
        self.dropout = PerformerDropout(config.hidden_dropout_prob, "classifier")
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels) and, given labels, the loss for `config.problem_type`, as Hugging Face defines it.

        Arguments:
            input_ids, attention_mask, position_ids, inputs: as `PerformerModel.forward` takes them.
            labels: (B,) classes, (B,) or (B, num_labels) numbers, or (B, num_labels) zeros and ones.
        """
        if inputs.get("cu_seqlens") is not None:
            raise UnsupportedError("cu_seqlens: sequence classification takes one protein per row.")
        outputs = self.performer(input_ids, attention_mask, position_ids, return_dict=True, **inputs)
        hidden = outputs.last_hidden_state
        weights = (
            torch.ones(hidden.shape[:2], device=hidden.device) if attention_mask is None else attention_mask.float()
        )
        mean = torch.einsum("bl,bld->bd", weights, hidden.float()) / weights.sum(1, keepdim=True).clamp(min=1)
        pooled, keys = mean.to(hidden.dtype), inputs.get("dropout_keys")
        spans = len(pooled) if keys is None else len(keys)
        dropped = self.dropout(pooled.view(spans, 1, -1), None if keys is None else DropoutKeys(keys, 0, 1))
        logits = self.classifier(dropped.view(pooled.shape))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class PerformerForTokenClassification(PerformerPreTrainedModel):
    """A label per residue."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.performer = PerformerModel(config)
        self.dropout = PerformerDropout(config.hidden_dropout_prob, "classifier")
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> TokenClassifierOutput:
        """Logits (B, L, num_labels) and, given labels, the cross-entropy.

        Arguments:
            input_ids, attention_mask, position_ids, cu_seqlens, inputs: as `PerformerModel.forward` takes them.
            labels: (B, L) classes, -100 where no token counts.
            num_items_in_batch: what to divide the summed loss by; the number of labels that count when None.
        """
        outputs = self.performer(input_ids, attention_mask, position_ids, cu_seqlens, return_dict=True, **inputs)
        hidden, keys = outputs.last_hidden_state, inputs.get("dropout_keys")
        logits = self.classifier(self.dropout(hidden, None if keys is None else DropoutKeys(keys, 0, hidden.shape[1])))
        loss = None
        if labels is not None:
            if num_items_in_batch is None:
                num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


_AUTO_CLASSES: dict[Any, type[PerformerPreTrainedModel]] = {
    AutoModel: PerformerModel,
    AutoModelForMaskedLM: PerformerForMaskedLM,
    AutoModelForCausalLM: PerformerForCausalLM,
    AutoModelForSequenceClassification: PerformerForSequenceClassification,
    AutoModelForTokenClassification: PerformerForTokenClassification,
}
for _auto, _performer in _AUTO_CLASSES.items():
    _auto.register(PerformerConfig, _performer, exist_ok=True)
    take_names(_auto)
