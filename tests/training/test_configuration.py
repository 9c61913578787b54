from pathlib import Path

import pytest

from performers.errors import ConfigError
from performers.training import PretrainConfig
from performers.training.configuration import read_config

BASE = {"input": ["x.fasta"], "output": "run"}


def test_yaml_holds_every_key_and_reads_back_to_the_same_configuration(tmp_path: Path) -> None:
    config = PretrainConfig.parse(
        {**BASE, "attention": ["favor", "exact"], "learning_rate": 3e-4, "architecture": {"a": 1}}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert PretrainConfig.parse(read_config(tmp_path / "config.yaml")) == config


def test_whole_numbers_and_yaml_exponents_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "input: x.fasta\noutput: run\nlearning_rate: 1e-3\nclip: 1\nattention: favor, exact\n"
    )
    config = PretrainConfig.parse(read_config(tmp_path / "c.yaml"))
    assert (config.learning_rate, config.clip, config.attention) == (1e-3, 1.0, ["favor", "exact"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"contxt": 8}, "contxt is not a key of the configuration: did you mean context?"),
        ({"steps": "many"}, "steps='many': expected it to be a valid integer."),
        ({"steps": True}, "steps=True: expected it to be a valid integer."),
        ({"steps": 0}, "steps=0: expected it to be greater than or equal to 1."),
        ({"learning_rate": "fast"}, "learning_rate='fast': expected it to be a valid number."),
        ({"learning_rate": float("inf")}, "learning_rate=inf: expected it to be a finite number."),
        ({"objective": "gpt"}, "objective='gpt': expected it to be 'mlm' or 'clm'."),
        ({"steps": 5, "warmup_steps": 5}, "warmup_steps=5: expected fewer than steps=5."),
        ({"init_from": "m", "preset": "tiny"}, "preset and init_from exclude each other"),
        ({"init_from": "m", "architecture": {"a": 1}}, "architecture and init_from exclude each other"),
        ({"final_learning_rate": 1}, "final_learning_rate=1.0: expected at most learning_rate=0.001."),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_key_value_and_expectation(changes: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PretrainConfig.parse({**BASE, **changes})
    assert sentence in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"input is missing.*steps=0"):
        PretrainConfig.parse({"output": "run", "steps": 0})


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "expected YAML"), ("- 1\n", "expected a table"), ("1: 2\n", "expected a table")]
)
def test_a_file_that_is_no_table_of_keys_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "c.yaml")


def test_a_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_config(tmp_path / "none.yaml")


def test_the_learning_rate_warms_up_linearly_and_falls_along_half_a_cosine() -> None:
    config = PretrainConfig.parse(
        {**BASE, "steps": 110, "warmup_steps": 10, "learning_rate": 1.0, "final_learning_rate": 0.1}
    )
    rates = [config.learning_rate_at(step) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
