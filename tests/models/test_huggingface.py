"""Our folders in Hugging Face's hands: the Auto classes, pipelines and the Trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, Trainer, TrainingArguments, pipeline

from performers import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerModel,
    PerformerTokenizer,
)

from .conftest import INSULIN_B, PROTEINS, recompute_activations

Make = Callable[..., Any]
OPEN = """
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM,
                          AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer)
folder = sys.argv[1]
openers = (AutoConfig, AutoTokenizer, AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM,
           AutoModelForSequenceClassification, AutoModelForTokenClassification)
print([type(opener.from_pretrained(folder)).__name__ for opener in openers])
"""
ORDERS = {
    "performers first": "import sys, performers\n" + OPEN,
    "transformers first": "import sys, transformers, performers\n" + OPEN,
    "auto classes first": "import sys\nfrom transformers import AutoModel, AutoTokenizer\nimport performers\n" + OPEN,
    "our models first": "import sys\nfrom performers import PerformerModel, PerformerTokenizer\n" + OPEN,
}


def run(code: str, *arguments: Any) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "order", [name if name == "transformers first" else pytest.param(name, marks=pytest.mark.slow) for name in ORDERS]
)
def test_the_auto_classes_open_our_folders_in_any_order_of_imports(order: str, make: Make, tmp_path: Path) -> None:
    make(PerformerForMaskedLM).save_pretrained(tmp_path)
    PerformerTokenizer().save_pretrained(tmp_path)
    assert run(ORDERS[order], tmp_path).split("\n")[-2] == str(
        [
            "PerformerConfig",
            "PerformerTokenizer",
            "PerformerModel",
            "PerformerForMaskedLM",
            "PerformerForCausalLM",
            "PerformerForSequenceClassification",
            "PerformerForTokenClassification",
        ]
    )


def test_importing_either_package_does_not_import_the_models() -> None:
    report = "print('torch' in sys.modules, 'performers.models.modeling_performer' in sys.modules)"
    assert run(f"import sys, performers\n{report}").split() == ["False", "False"]
    assert run(f"import sys, performers, transformers\n{report}").split() == ["False", "False"]


def test_fill_mask_fills_in_residues(make: Make, tmp_path: Path) -> None:
    make(PerformerForMaskedLM).save_pretrained(tmp_path)
    PerformerTokenizer().save_pretrained(tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path))
    found = fill(INSULIN_B[:10] + "<mask>" + INSULIN_B[11:], top_k=3)
    assert len(found) == 3
    for guess in found:
        assert guess["sequence"] == INSULIN_B[:10] + guess["token_str"] + INSULIN_B[11:]
        assert 0 < guess["score"] < 1


def test_text_generation_continues_a_prompt(make: Make, tmp_path: Path) -> None:
    make(PerformerForCausalLM).save_pretrained(tmp_path)
    PerformerTokenizer(add_eos=False).save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    outputs = generate(PROTEINS, max_new_tokens=5, do_sample=False, eos_token_id=4, batch_size=3)
    for prompt, (output,) in zip(PROTEINS, outputs, strict=True):
        assert output["generated_text"].startswith(prompt)


def train(model: Any, rows: list[dict[str, Any]], collator: Any, folder: Path, **options: Any) -> list[float]:
    defaults = {"max_steps": 8, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1}
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **{**defaults, **options})
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("model_class", [PerformerForMaskedLM, PerformerForCausalLM])
def test_the_trainer_pretrains(model_class: type, make: Make, tokenizer: PerformerTokenizer, tmp_path: Path) -> None:
    model = make(model_class, initializer_range=0.02)
    recompute_activations(model)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=model_class is PerformerForMaskedLM, mlm_probability=0.5)
    rows = [{"input_ids": tokenizer(protein)["input_ids"]} for protein in PROTEINS]
    losses = train(model, rows, collator, tmp_path)
    assert losses[-1] < losses[0]
    saved = PerformerModel.from_pretrained(tmp_path / "checkpoint-8")
    assert torch.equal(saved.norm.weight, model.performer.norm.weight)


def test_the_trainers_accumulated_batches_are_one_batch(
    make: Make, tokenizer: PerformerTokenizer, tmp_path: Path
) -> None:
    rows = [{"input_ids": tokenizer(protein)["input_ids"]} for protein in PROTEINS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    whole = train(make(PerformerForCausalLM), rows, collator, tmp_path)
    one_by_one = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
    parts = train(make(PerformerForCausalLM), rows, collator, tmp_path, **one_by_one)
    assert parts == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("labels", [[0, 1, 1], [0.5, 1.5, -1.0]])
def test_the_trainer_fine_tunes_classifiers(
    labels: list[Any], make: Make, tokenizer: PerformerTokenizer, tmp_path: Path
) -> None:
    rows = [{**tokenizer(protein), "label": label} for protein, label in zip(PROTEINS, labels, strict=True)]
    model = make(PerformerForSequenceClassification, num_labels=2 if labels[0] == 0 else 1, initializer_range=0.02)
    losses = train(model, rows, DataCollatorWithPadding(tokenizer), tmp_path)
    assert losses[-1] < losses[0]


def test_a_configuration_names_its_class(make: Make, tmp_path: Path) -> None:
    make(PerformerForTokenClassification, num_labels=3).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("performer", ["PerformerForTokenClassification"])
    assert len(saved["id2label"]) == 3
