"""Every error that performers raises on purpose.

```
PerformersError
├── InputError (ValueError)            what a person can put right; the command line exits with 2
│   ├── FastaError                     a sequence file: which file, which record, which residue, what was expected
│   ├── CorpusError                    a corpus folder that is damaged, of another version, or not a corpus
│   ├── ConfigError                    a configuration: which key, which value, what was expected
│   ├── CheckpointError                a checkpoint or model folder that is damaged, incomplete or unsafe
│   ├── OutputError                    an output path that is in use or cannot be written
│   └── MissingExtraError (ImportError)  an optional dependency, with the pip command that installs it
├── RunError (RuntimeError)            the run itself failed; the command line exits with 1
│   ├── NonFiniteError                 a loss or a gradient that is not a finite number, and at which step
│   └── DiskFullError                  what could not be written, and how much room it needed
└── UnsupportedError (NotImplementedError)  something that a mechanism cannot express; never ignored in silence; exits with 2
```

Messages are complete sentences in the user's words: they are printed as they are, without a traceback.
"""

from __future__ import annotations


class PerformersError(Exception):
    """The root of the tree above."""


class InputError(PerformersError, ValueError):
    """An argument, a file or a folder is not what it has to be."""


class FastaError(InputError):
    """A sequence file cannot be read as proteins."""


class CorpusError(InputError):
    """A corpus folder is damaged, of another version, or not a corpus."""


class ConfigError(InputError):
    """A configuration has an unknown key, a wrong type or values that contradict each other."""


class CheckpointError(InputError):
    """A checkpoint or model folder is damaged, incomplete or unsafe to open."""


class OutputError(InputError):
    """An output path is already in use or cannot be written."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency is not installed.

    Arguments:
        package: the name of the module that is missing.
        extra: the extra of performers that installs it.
        purpose: what it is needed for, as the object of "is needed for".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is needed for {purpose}: pip install 'performers[{extra}]'")


class RunError(PerformersError, RuntimeError):
    """A run failed although its inputs were in order."""


class NonFiniteError(RunError):
    """A loss or a gradient is not a finite number."""


class DiskFullError(RunError):
    """A file could not be written for want of room."""


class UnsupportedError(PerformersError, NotImplementedError):
    """A mechanism or a model cannot express what was asked of it."""
