"""What `performers benchmark conversion` is asked to measure; nothing of torch is loaded for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performers.benchmarks.conversion_models import PACKAGES
from performers.errors import InputError

# All positive estimates of the softmax kernel.
KERNELS = (
    "softmax",
    "softmax-hyperbolic",
    "softmax-reg",
    "softmax-optimal",
    "softmax-sharp",
    "softmax-prototypes",
)
PARTS = ("quality", "layers", "speed", "distillation")


@dataclass(frozen=True)
class ConversionSettings:
    """What `measure_conversion` measures.

    Attributes:
        models: names in `PACKAGES`.
        parts: some of `PARTS`: quality straight after conversion by kernel and M; how many layers a bound on the error leaves,
            and their quality; speed of ESM-2; quality after distillation, beside the floors.
        kernels: of FAVOR; the last one is that of the parts after the first.
        num_features: numbers of features of a token, M (rows of the projection, or half of that for hyperbolic ones).
        chosen_features: M of what is timed and distilled.
        bound: on the relative error of the last hidden states, as in layers="auto:0.05".
        antibodies: a FASTA file of antibody variable domains, or a table (.tsv, .gz too) of SCOPe domains: identifier, class,
            sequence; of the table the antibody chains of class b.1.1.1 are taken. None leaves AntiBERTy out.
        texts: a text file for MiniLM with a text in every line; None for Python's reference manual.
        fit_to: sequences that kernels are fitted to.
        judge_on: other sequences that everything is judged on.
        lengths: in tokens, at which ESM-2 is timed.
        steps, batch_size: of a distillation.
        evaluate_every: steps between the points of its curve.
        learning_rate, layers_learning_rate: of its two stages; None for the defaults of `performers distil`.
        dtype: "float32", or "bfloat16" for autocast, of a distillation; students are judged in float32.
        floor_window: what each token of the student without global attention sees: |i - j| < this, so 1 for itself alone.
        cache: the folder for downloads; None for `performers` in the user's cache folder.
        device: as in `choose_device`, "auto" resolved.
        threads: CPU threads; None for as many as there are cores.
        seed: of everything random.
    """

    models: Sequence[str] = ("antiberty", "minilm", "esm2")
    parts: Sequence[str] = PARTS
    kernels: Sequence[str] = KERNELS
    num_features: Sequence[int] = (64, 256, 1024)
    chosen_features: int = 256
    bound: float = 0.05
    antibodies: str | None = None
    texts: str | None = None
    fit_to: int = 64
    judge_on: int = 48
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16_384)
    steps: int = 1000
    batch_size: int = 16
    evaluate_every: int = 125
    learning_rate: float | None = None
    layers_learning_rate: float | None = None
    dtype: str = "float32"
    floor_window: int = 1
    cache: str | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    @classmethod
    def of_size(cls, quick: bool, **given: Any) -> ConversionSettings:
        """The full or the quick settings, with what was given in their place.

        Raises:
            InputError: a name or a number that is not in order.
        """
        from performers.attention import FavorFeatures

        defaults: dict[str, Any] = {}
        if quick:
            defaults = {"kernels": ("softmax", "softmax-sharp"), "num_features": (32,), "chosen_features": 32}
            defaults |= {"fit_to": 4, "judge_on": 4, "lengths": (256, 512)}
            defaults |= {"steps": 8, "batch_size": 2, "evaluate_every": 4}
        settings = cls(**defaults | {key: value for key, value in given.items() if value is not None})
        for option, names, known in (("model", settings.models, tuple(PACKAGES)), ("part", settings.parts, PARTS)):
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise InputError(
                    f"--{option} {','.join(unknown) or 'none'}: expected some of {', '.join(known)}, with commas."
                )
        if not settings.kernels:
            raise InputError(f"--kernel none: expected some of {', '.join(KERNELS)}, with commas.")
        for kernel in settings.kernels:
            FavorFeatures(1, 1, kernel)
        for option, values in (("--num-features", settings.num_features), ("--length", settings.lengths)):
            if any(value < 2 for value in values):
                raise InputError(f"{option} {min(values)}: expected numbers of at least 2.")
        for option, path in (("--antibodies", settings.antibodies), ("--texts", settings.texts)):
            if path is not None and not Path(path).is_file():
                raise InputError(f"{option} {path}: there is no such file.")
        if settings.steps % settings.evaluate_every:
            raise InputError(
                f"--evaluate-every {settings.evaluate_every}: expected a divisor of --steps, {settings.steps}."
            )
        return settings
