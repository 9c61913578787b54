"""The recipes: each is a configuration that parses, a model of the size that it states, and commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from performers import PerformerConfig
from performers.cli import app
from performers.models.bundled import bundled_names, describe
from performers.training.configuration import PretrainConfig, read_config
from performers.training.language_modelling import new_model

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"), key=lambda path: path.stem)


def stated(recipe: Path, what: str) -> int:
    """A number that the recipe's head states."""
    found = re.search(rf"^# {what}: ([\d,]+)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{recipe.name}: {what}"
    return int(found[1].replace(",", ""))


def beginning(recipe: Path) -> Path:
    """The recipe of the model that this one begins with; itself if it begins with nothing."""
    run = re.fullmatch(r"runs/([\w-]+)/model", read_config(recipe).get("init_from") or f"runs/{recipe.stem}/model")
    assert run is not None, recipe.name
    return recipe.with_stem(run[1])


def parsed(recipe: Path) -> PretrainConfig:
    return PretrainConfig.parse({**read_config(recipe), "output": "run"})


def test_there_are_recipes_for_both_parts_of_each_bundled_model_and_one_for_a_bigger_one() -> None:
    names = ["protein-20m", "protein-causal", "protein-causal-related", "protein-masked", "protein-masked-related"]
    assert [path.stem for path in RECIPES] == names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_makes_a_model_of_the_size_it_states_and_reads_the_tokens_it_states(recipe: Path) -> None:
    config = parsed(recipe)
    with torch.random.fork_rng():
        model = new_model(parsed(beginning(recipe)))
    assert sum(parameter.numel() for parameter in model.parameters()) == stated(recipe, "Parameters")
    assert config.steps * config.batch_size * config.context == stated(recipe, "Tokens")
    assert len({parameter.dtype for parameter in model.parameters()}) == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_commands_at_its_top_exist_and_name_it(recipe: Path) -> None:
    lines = [
        line.removeprefix("#   ") for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")
    ]
    known = {flag for option in get_command(app).commands["pretrain"].params for flag in option.opts}  # pyright: ignore
    assert lines
    for line in lines:
        words = shlex.split(line)
        after = words[words.index("pretrain") + 1 :]
        assert {word for word in after if word.startswith("-")} <= known
        assert after[after.index("--config") + 1] == f"recipes/{recipe.name}"


def test_a_bundled_model_has_the_architecture_of_its_recipe() -> None:
    for name in bundled_names():
        recipe = next(path for path in RECIPES if path.stem == describe(name).folder.name)
        with torch.random.fork_rng():
            expected: dict[str, Any] = new_model(parsed(recipe)).config.to_dict()
        found = PerformerConfig.from_pretrained(name).to_dict()
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "attention", "attention_kwargs"):
            assert found[key] == expected[key], f"{name}: {key}"
