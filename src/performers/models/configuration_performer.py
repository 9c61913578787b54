"""The shape of a Performer: every number that fixes a model's architecture, checked as it is set.

Keyword arguments or a `config.json` come in; a configuration whose values are known to fit together goes out. It knows which
attention mechanisms exist and which arguments they take, and nothing of what they compute.
"""

import inspect
from dataclasses import field, fields
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from performers.attention import MECHANISMS
from performers.data.alphabet import BOS, EOS, MASK, PAD, VOCAB_SIZE
from performers.errors import ConfigError
from performers.models.bundled import located, take_names

Count = Annotated[int, Field(gt=0)]
Token = Annotated[int, Field(ge=0)] | None
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]

# Where a Performer departs from the defaults of its mechanism: ReLU features are the paper's best on proteins.
DEFAULT_KWARGS: dict[str, dict[str, JsonValue]] = {
    "favor": {"kernel": "relu"},
    "split": {"first": "local", "second": "favor"},
}

_HALVES = ("first", "second")  # of a split

# Keys that Hugging Face itself writes into a config.json or passes to a configuration, besides some that start with "_".
GENERIC_KEYS = {
    "attn_implementation",
    "auto_map",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "tokenizer_class",
    "torch_dtype",
    "use_cache",
    *(f.name for f in fields(PreTrainedConfig)),
}


class PerformerConfig(PreTrainedConfig):
    """The configuration of a Performer.

    Arguments:
        vocab_size: number of token ids; the residue alphabet has 29.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`.
        num_hidden_layers: number of layers, each an attention and a feed-forward block.
        num_attention_heads: heads per layer; the size of a head, hidden_size / num_attention_heads, must be even (rotary
            positions turn pairs).
        intermediate_size: width inside the feed-forward block.
        attention: the mechanism of all layers, "favor", "exact", "exact-materialised", "reformer", "sparse", "local" or "split"
            (two of these, some heads each), or a list of one name per layer.
        attention_kwargs: arguments of the mechanism, as in {"kernel": "relu", "num_features": 256}; with several mechanisms a
            dictionary for each, as in {"favor": {"num_features": 256}, "exact": {}}. FAVOR's kernel is "relu" unless given.
        reversible: whether layers compute their inputs from their outputs in the backward pass, instead of keeping activations.
            Another architecture, with two residual streams, and as many weights.
        hidden_dropout_prob: probability to drop an element of the embeddings, of an attention output or of a feed-forward
            output. Attention weights do not exist here, so they are not dropped.
        rope_theta: base of the rotary wavelengths.
        layer_norm_eps: added to the variance in layer normalisation.
        initializer_range: standard deviation of the initial weights; projections back into the residual stream are
            initialised smaller by sqrt(2 * num_hidden_layers), as in GPT-2.
        tie_word_embeddings: whether the output layer of a language model is the embedding matrix.
        chunk_size_feed_forward: tokens of a sequence that go through a feed-forward block (or the output layer and its loss)
            at a time, each chunk being recomputed in the backward pass; bounds their memory. 0 for all at once.
        chunk_size_layer: tokens of a sequence that go through a whole layer at a time, each chunk being recomputed in the
            backward pass: for a longer sequence only the inputs of the layers are kept. 0 for all at once. Layers of exact
            attention, packed sequences and compiled models take all at once in any case.
        seed: of the random projections; layer i draws from derive_seed(seed, "projection", i).
        pad_token_id, bos_token_id, eos_token_id, mask_token_id: as in the residue alphabet.
        kwargs: the keys of every Hugging Face configuration, as `num_labels`, `id2label`, `problem_type` or `dtype`.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or range, or values that contradict each other.
    """

    model_type = "performer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Hugging Face adds lists to it)

    vocab_size: Count = VOCAB_SIZE
    hidden_size: Count = 512
    num_hidden_layers: Count = 6
    num_attention_heads: Count = 8
    intermediate_size: Count = 2048
    attention: str | list[str] = "favor"
    attention_kwargs: dict[str, JsonValue] = field(default_factory=dict)
    reversible: bool = False
    hidden_dropout_prob: Probability = 0.0
    rope_theta: Positive = 10_000.0
    layer_norm_eps: Positive = 1e-5
    initializer_range: Positive = 0.02
    tie_word_embeddings: bool = True
    chunk_size_feed_forward: Annotated[int, Field(ge=0)] = 16_384
    chunk_size_layer: Annotated[int, Field(ge=0)] = 16_384
    seed: int = 0
    pad_token_id: Token = PAD
    bos_token_id: Token = BOS
    eos_token_id: Token = EOS
    mask_token_id: Token = MASK

    def __setattr__(self, key: str, value: Any) -> None:
        if key in _CHECKS:
            try:
                value = _CHECKS[key].validate_python(value)
            except ValidationError as error:
                raise ConfigError(f"{key}={value!r}: {_expected(error)}.") from error
        super().__setattr__(key, value)

    def __post_init__(self, **kwargs: Any) -> None:
        for key, value in kwargs.items():
            if key not in GENERIC_KEYS and not key.startswith("_"):
                known = ", ".join(sorted(_CHECKS))
                raise ConfigError(f"{key}={value!r}: there is no such key; a Performer is configured by {known}.")
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **kwargs: Any) -> Any:
        """As Hugging Face's, and by the name of a bundled model."""
        return super().from_pretrained(located(pretrained_model_name_or_path), *arguments, **kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A configuration by name, one of `PRESETS`, with some of its values replaced."""
        if name not in PRESETS:
            raise ConfigError(f"preset={name!r}: expected one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_dim(self) -> int:
        """D, the size of a query or key of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def mechanisms(self) -> list[str]:
        """The attention mechanism of each layer."""
        return [self.attention] * self.num_hidden_layers if isinstance(self.attention, str) else self.attention

    def kwargs_of(self, mechanism: str) -> dict[str, Any]:
        """The arguments that the configuration gives to one of its mechanisms."""
        kwargs: dict[str, Any] = self.attention_kwargs
        return kwargs if len(set(self.mechanisms)) == 1 else kwargs[mechanism]

    def validate_architecture(self) -> None:
        """Check the values against each other and write out the defaults of `attention_kwargs`.

        A model does so once more, since a configuration can be changed after it was made.

        Raises:
            ConfigError: names the key, its value, and what was expected.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size}: expected a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"hidden_size={self.hidden_size} with num_attention_heads={self.num_attention_heads} makes heads of "
                f"{self.head_dim}: expected an even size, since rotary positions turn pairs of numbers."
            )
        if len(self.mechanisms) != self.num_hidden_layers:
            raise ConfigError(
                f"attention={self.attention!r}: expected one name for all layers, or num_hidden_layers="
                f"{self.num_hidden_layers} names, one per layer."
            )
        for name in self.mechanisms:
            if name not in MECHANISMS:
                raise ConfigError(f"attention={name!r}: expected one of {', '.join(MECHANISMS)}.")
        self._complete_attention_kwargs()
        for name in set(self.mechanisms):
            _check_kwargs(name, self.kwargs_of(name), self.num_attention_heads)

    def _complete_attention_kwargs(self) -> None:
        """Write the defaults out, so that a saved configuration keeps its meaning if they ever change."""
        given: dict[str, Any] = dict(self.attention_kwargs)
        names = sorted(set(self.mechanisms))
        if len(names) == 1:
            self.attention_kwargs = _completed(names[0], given)
        elif given.keys() <= set(names) and all(isinstance(kwargs, dict) for kwargs in given.values()):
            self.attention_kwargs = {name: _completed(name, given.get(name, {})) for name in names}
        else:
            raise ConfigError(
                f"attention_kwargs={given!r}: with several mechanisms expected a dictionary for each of {', '.join(names)}."
            )


def _completed(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a mechanism with its defaults, and those of the halves of a split."""
    kwargs: dict[str, Any] = {**DEFAULT_KWARGS.get(name, {}), **given}
    for half in _HALVES if name == "split" else ():
        nested = kwargs.get(f"{half}_kwargs")
        if isinstance(kwargs[half], str) and (nested is None or isinstance(nested, dict)):
            kwargs[f"{half}_kwargs"] = _completed(kwargs[half], nested or {})
    return kwargs


def _check_kwargs(name: str, kwargs: dict[str, Any], heads: int) -> None:
    accepted = set(inspect.signature(MECHANISMS[name]).parameters) - {"head_dim", "seed"}
    for key, value in kwargs.items():
        if key not in accepted:
            known = ", ".join(sorted(accepted)) or "none"
            raise ConfigError(
                f"attention_kwargs has {key}={value!r}: {name!r} attention has no such argument; expected {known}."
            )
    if name == "split":
        first = heads // 2 if kwargs.get("heads") is None else kwargs["heads"]
        if isinstance(first, bool) or not isinstance(first, int) or not 0 < first < heads:
            raise ConfigError(
                f"attention_kwargs has heads={kwargs.get('heads')!r}: with num_attention_heads={heads} a split leaves at least "
                f"one head to each mechanism."
            )
        for half, share in zip(_HALVES, (first, heads - first), strict=True):
            if not isinstance(kwargs[half], str) or kwargs[half] not in MECHANISMS:
                raise ConfigError(
                    f"attention_kwargs has {half}={kwargs[half]!r}: expected one of {', '.join(MECHANISMS)}."
                )
            nested = kwargs[f"{half}_kwargs"]
            if not isinstance(nested, dict):
                raise ConfigError(f"attention_kwargs has {half}_kwargs={nested!r}: expected a dictionary.")
            _check_kwargs(kwargs[half], nested, share)


def _expected(error: ValidationError) -> str:
    """What pydantic expected, each alternative of a union once, without its full stops and addresses."""
    messages = dict.fromkeys(detail["msg"].removeprefix("Input ") for detail in error.errors())
    return "it " + ", or it ".join(messages)


# What each key takes. Strict: text is no number and a bool no integer, but an integer is a float.
_CHECKS: dict[str, TypeAdapter[Any]] = {
    key: TypeAdapter(annotation, config=ConfigDict(strict=True))
    for key, annotation in inspect.get_annotations(PerformerConfig).items()
}

PRESETS: dict[str, dict[str, Any]] = {
    # 2009.14794, figure 1 and appendix D: the model of the cost measurements, and the protein model of the TrEMBL experiments.
    "paper-regular": {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "hidden_dropout_prob": 0.1,
    },
    "paper-trembl": {
        "hidden_size": 512,
        "num_hidden_layers": 36,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "hidden_dropout_prob": 0.1,
    },
    # Our own sizes, without dropout: about 1, 7 and 38 million parameters in heads of 64.
    "tiny": {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 512},
    "small": {"hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 5, "intermediate_size": 1280},
    "base": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
}

AutoConfig.register("performer", PerformerConfig, exist_ok=True)
take_names(AutoConfig)
