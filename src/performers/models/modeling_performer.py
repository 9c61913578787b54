"""The Performer: a Transformer in which attention is a plug.

Token ids (or embeddings) come in, hidden states, logits and losses go out. A layer is the usual pre-norm one: rotary positions,
attention, a GELU feed-forward block. What attention computes is not known here: each layer has one of
`performers.attention.MECHANISMS`, by name, and asks it for outputs and, when decoding, for a state to carry on from.

Memory is linear in the length L with a small constant: nothing of size L x L, L x M (random features), L x intermediate_size
or, in training, L x vocab_size is kept for the backward pass. The long ones among these are recomputed, a chunk of tokens at a
time.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
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

from performers.attention import MECHANISMS
from performers.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from performers.models.configuration_performer import PerformerConfig
from performers.randomness import derive_seed

IGNORED = -100  # Hugging Face's label of a token that does not count


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
def keyed_dropout(hidden: Tensor, keys: Tensor, probability: float, layer: int, site: str) -> Tensor:
    """Dropout as a pure function of keys: the same key drops the same elements in any batch, process or replay.

    The backward pass draws the mask again instead of keeping it.

    Arguments:
        hidden: of shape (B, L, d).
        keys: integers of shape (R,). The B x L tokens are R spans of equal length, one after the other, a key each.
        probability: of an element to be dropped; the others are divided by 1 - probability.
        layer, site: where in the model this is; each place draws on its own.
    """
    spans = hidden.reshape(len(keys), -1)
    dropped = torch.empty_like(spans)
    generator = torch.Generator(hidden.device)
    for key, span, out in zip(keys.tolist(), spans, dropped, strict=True):
        generator.manual_seed(derive_seed(key, "dropout", layer, site))
        out.bernoulli_(1 - probability, generator=generator).mul_(span).div_(1 - probability)
    return dropped.view(hidden.shape)


@keyed_dropout.register_fake
def _(hidden: Tensor, keys: Tensor, probability: float, layer: int, site: str) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _save_keys(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, keys, *ctx.place = inputs
    ctx.save_for_backward(keys)


def _drop_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    return keyed_dropout(gradient, *ctx.saved_tensors, *ctx.place), None, None, None, None


keyed_dropout.register_autograd(_drop_gradient, setup_context=_save_keys)


class PerformerDropout(nn.Module):
    """Dropout of one place in the model: by keys where there are any, by torch's global generator otherwise."""

    def __init__(self, probability: float, site: str, layer_idx: int = 0) -> None:
        super().__init__()
        self.p, self.site, self.layer_idx = probability, site, layer_idx

    def forward(self, hidden: Tensor, keys: Tensor | None) -> Tensor:
        """`hidden` of shape (B, L, d), with elements dropped in training."""
        if not self.training or self.p == 0:
            return hidden
        if keys is None:
            return F.dropout(hidden, self.p)
        return keyed_dropout(hidden, keys, self.p, self.layer_idx, self.site)


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
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class ResidualLinear(nn.Linear):
    """A linear map back into the residual stream, initialised so small that the sum over all layers keeps its size."""


class PerformerAttention(nn.Module):
    """Multi-head self-attention by the mechanism that the configuration names for this layer."""

    def __init__(self, config: PerformerConfig, layer_idx: int, is_causal: bool) -> None:
        super().__init__()
        self.num_heads, self.is_causal = config.num_attention_heads, is_causal
        self.seed = derive_seed(config.seed, "projection", layer_idx)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = ResidualLinear(config.hidden_size, config.hidden_size)
        name = config.mechanisms[layer_idx]
        self.mechanism = MECHANISMS[name](head_dim=config.head_dim, seed=self.seed, **config.kwargs_of(name))

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: Any,
        return_state: bool,
    ) -> tuple[Tensor, Any]:
        """The outputs, of shape (B, L, d), and the state after the last token, if asked for."""
        q, k, v = (
            project(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.mechanism(
            rotate(q, rotary),
            rotate(k, rotary),
            v,
            is_causal=self.is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
        )
        out, state = out if return_state else (out, None)
        return self.out_proj(out.transpose(1, 2).flatten(2)), state


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
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after this layer, (B, L, d); the layer's state in the cache, if there is one, is moved on."""
        attended, state = self.attention(
            self.attention_norm(hidden),
            rotary,
            key_padding_mask,
            cu_seqlens,
            state=None if past_key_values is None else past_key_values.states[self.layer_idx],
            return_state=past_key_values is not None,
        )
        if past_key_values is not None:
            past_key_values.states[self.layer_idx] = state
        hidden = hidden + self.attention_dropout(attended, dropout_keys)
        return hidden + self.feed_forward_dropout(self.feed_forward(hidden), dropout_keys)


class PerformerPreTrainedModel(PreTrainedModel):
    """What all Performers share: how they are initialised, saved and loaded, and how their random features are redrawn."""

    config: PerformerConfig
    base_model_prefix = "performer"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Hugging Face's Trainer passes num_items_in_batch
    _no_split_modules = ["PerformerLayer"]  # noqa: RUF012 (Hugging Face's types)
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
        """As Hugging Face's, but from safetensors alone: a pickle runs code when it is opened.

        Raises:
            CheckpointError: the folder's weights are a pickle or damaged.
        """
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
        self.layers = nn.ModuleList(PerformerLayer(config, i, is_causal) for i in range(config.num_hidden_layers))
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
                key. Without them torch's global generator is used.
            output_hidden_states: whether to return the embeddings and every layer's output, the last one after the final norm.

        Raises:
            InputError: arguments that contradict each other.
            UnsupportedError: what no Performer can do: attention maps, masks of more than two dimensions.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise UnsupportedError(
                "output_attentions: a Performer never forms attention weights, so it cannot return them."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Give either input_ids or inputs_embeds.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = PerformerCache(self.config.num_hidden_layers)
        seen = 0 if past_key_values is None else self._tokens_seen(past_key_values)
        _check_inputs(hidden, seen, attention_mask, position_ids, cu_seqlens, dropout_keys)
        key_padding_mask = None if attention_mask is None else attention_mask[:, seen:].bool()
        rotary = self.rotary(
            _positions(hidden, seen, attention_mask, cu_seqlens) if position_ids is None else position_ids
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        hidden = self.embed_dropout(hidden, dropout_keys)
        all_hidden: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if output_hidden_states:
                all_hidden += (hidden,)
            hidden = layer(
                hidden,
                rotary,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
                past_key_values=past_key_values,
                dropout_keys=dropout_keys,
            )
        hidden = self.norm(hidden)
        if past_key_values is not None:
            past_key_values.num_tokens += hidden.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden, hidden) if output_hidden_states else None,
        )

    def _tokens_seen(self, cache: Cache) -> int:
        if not self.is_causal:
            raise UnsupportedError("past_key_values, use_cache: only a causal Performer can go on from a state.")
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            raise UnsupportedError("past_key_values, use_cache: gradient checkpointing would move the state on twice.")
        if not isinstance(cache, PerformerCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}: expected a PerformerCache.")
        return cache.num_tokens


def _check_inputs(
    hidden: Tensor,
    seen: int,
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
    if dropout_keys is not None and (
        dropout_keys.ndim != 1 or not len(dropout_keys) or rows * length % len(dropout_keys)
    ):
        raise InputError(
            f"dropout_keys has shape {tuple(dropout_keys.shape)}: expected a row of keys whose number divides the "
            f"{rows * length} tokens of the batch."
        )


def _positions(hidden: Tensor, seen: int, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions, (B or 1, L), that count tokens from 0 where a sequence begins; padding is not counted."""
    if attention_mask is not None:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
    positions = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)
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
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and, given labels, the loss.

        Arguments:
            input_ids, attention_mask, position_ids, cu_seqlens, inputs: as `PerformerModel.forward` takes them.
            labels: (B, L) token ids, -100 where no token counts. A causal model predicts each label from the tokens before it
                (the labels are those of the inputs, not shifted); a masked one at its own position.
            num_items_in_batch: what to divide the summed loss by; the number of labels that count when None.
            logits_to_keep: compute logits for this many last tokens, or these positions, only; 0 for all.

        Returns:
            `loss`, a scalar in float32, zero if no label counts, and `logits` (B, L, vocab_size). In training with labels the
            logits are None: only the loss is needed then, and they are never formed as a whole.
        """
        outputs = self.performer(input_ids, attention_mask, position_ids, cu_seqlens, return_dict=True, **inputs)
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            if self.is_causal:
                if cu_seqlens is not None:  # nothing comes before the first token of a sequence
                    first = torch.isin(
                        torch.arange(labels.shape[1], device=labels.device), cu_seqlens.to(labels.device)
                    )
                    labels = labels.masked_fill(first, IGNORED)
                labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            loss = self._cross_entropy(hidden, labels, num_items_in_batch)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
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
        logits = self.classifier(self.dropout(mean.to(hidden.dtype), inputs.get("dropout_keys")))
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
        logits = self.classifier(self.dropout(outputs.last_hidden_state, inputs.get("dropout_keys")))
        loss = None
        if labels is not None:
            if num_items_in_batch is None:
                num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


AutoModel.register(PerformerConfig, PerformerModel, exist_ok=True)
AutoModelForMaskedLM.register(PerformerConfig, PerformerForMaskedLM, exist_ok=True)
AutoModelForCausalLM.register(PerformerConfig, PerformerForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(PerformerConfig, PerformerForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(PerformerConfig, PerformerForTokenClassification, exist_ok=True)
