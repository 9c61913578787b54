"""The families of Hugging Face models that convert, and those that are refused: tiny ones of each, and the page that lists them.

python tests/conversion/families.py        writes docs/conversion-coverage.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import performers
from performers.errors import UnsupportedError

PAGE = Path(__file__).parents[2] / "docs" / "conversion-coverage.md"

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PADDED = {**SMALL, "pad_token_id": 1}
LLAMA = {**SMALL, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 50}

# Families whose attention is replaced: class, configuration class, settings of a tiny one.
GO: dict[str, tuple[str, dict[str, Any]]] = {
    "EsmModel": ("EsmConfig", {**PADDED, "mask_token_id": 32, "position_embedding_type": "rotary"}),
    "EsmcModel": ("EsmcConfig", {**SMALL, "vocab_size": 64}),
    "BertModel": ("BertConfig", PADDED),
    "RobertaModel": ("RobertaConfig", PADDED),
    "ElectraModel": ("ElectraConfig", {**PADDED, "embedding_size": 16}),
    "AlbertModel": ("AlbertConfig", {**PADDED, "embedding_size": 16}),
    "DistilBertModel": (
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL),
    "OPTForCausalLM": (
        "OPTConfig",
        {**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "Qwen3ForCausalLM": ("Qwen3Config", {**LLAMA, "head_dim": 8}),
    "BioGptForCausalLM": ("BioGptConfig", PADDED),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "ViTModel": ("ViTConfig", VISION),
    "Dinov2Model": ("Dinov2Config", VISION),
    "CLIPTextModel": ("CLIPTextConfig", SMALL),
}
DECODERS = [name for name in GO if name.endswith(("CausalLM", "LMHeadModel"))]
# Families that are refused, and words of the reason.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "T5EncoderModel": (
        "T5Config",
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64},
        "additive position bias",
    ),
    "DebertaV2Model": ("DebertaV2Config", PADDED, "no AttentionInterface"),
    "RoFormerModel": ("RoFormerConfig", PADDED, "no AttentionInterface"),
    "MPNetModel": ("MPNetConfig", PADDED, "no AttentionInterface"),
    "BigBirdModel": ("BigBirdConfig", PADDED, "no AttentionInterface"),
    "LongformerModel": ("LongformerConfig", PADDED, "no AttentionInterface"),
    "ConvBertModel": ("ConvBertConfig", {**PADDED, "embedding_size": 32}, "no AttentionInterface"),
    "XLNetModel": (
        "XLNetConfig",
        {"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "no AttentionInterface",
    ),
    "BloomModel": (
        "BloomConfig",
        {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "no AttentionInterface",
    ),
    "GPTJModel": (
        "GPTJConfig",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        "no AttentionInterface",
    ),
    "FalconModel": (
        "FalconConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "no AttentionInterface",
    ),
    "MistralForCausalLM": ("MistralConfig", {**LLAMA, "sliding_window": 4}, "sliding window of 4"),
    "ModernBertModel": ("ModernBertConfig", {**PADDED, "local_attention": 8}, "sliding window"),
    "Gemma2ForCausalLM": ("Gemma2Config", {**LLAMA, "head_dim": 8}, "soft-capped"),
}


def build(name: str, config: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    # Tiny random weights make attention nearly uniform: sharper ones show a wrong wire.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def inputs_of(model: Any, length: int = 20, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    inputs = {"input_ids": torch.randint(4, 24, (2, length), generator=generator)}
    if padded:
        inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        inputs["attention_mask"][1, length - 7 :] = 0
    return inputs


@torch.no_grad()
def hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    return out if mask is None else out[mask.bool()]


def coverage_page() -> str:
    """The page of the documentation, from what happens when each family is converted."""
    converted = "\n".join(f"| {_family(GO[name][0])} | `{name}` | {_kind(name)} |" for name in GO)
    refused = "\n".join(f"| {_family(REFUSED[name][0])} | {_reason(name)} |" for name in REFUSED)
    return f"""\
# Which models convert

This page is written by the tests (`tests/conversion/families.py`), which convert a tiny random model of every family: exact
attention through our path equals the original to 1e-5, with and without padding, and FAVOR attention approaches it as features
are added. That proves the wiring. How close an estimate comes in a trained model is [measured](conversion.md), never assumed.

Every model that goes through Hugging Face's `AttentionInterface` converts in the same way, named here or not:
`performers.convert` runs it once, counts the attention layers that were called, and refuses a model of which one escaped.

## Converted

| family | tested with | attention |
|---|---|---|
{converted}

`nn.MultiheadAttention` converts too, alone, in `nn.TransformerEncoder`, and in `nn.TransformerDecoder`.

## Refused

Families whose attention linear attention cannot express, or that Hugging Face lets nobody replace; with the message of the error
(the numbers in it are those of the tiny model).

| family | why |
|---|---|
{refused}

Mistral, ModernBERT and Gemma-like models with windows convert if every input is shorter than the window; a longer one raises.
"""


def _family(config: str) -> str:
    return config.removesuffix("Config")


def _kind(name: str) -> str:
    if name.startswith("Bart"):
        return "bidirectional, causal and across"
    return "causal" if name in DECODERS or name == "CLIPTextModel" else "bidirectional"


def _reason(name: str) -> str:
    config, settings, _ = REFUSED[name]
    try:
        performers.convert(build(name, config, settings), "favor")
    except UnsupportedError as error:
        return str(error)
    raise AssertionError(f"{name} was converted")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(coverage_page(), encoding="utf-8")
