"""The exceptions of the package: everything that a user can correct is a ``UserError``.

The programs catch ``UserError`` in one place and print its message; any other exception is a bug in this package.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can correct. The message says what was found, where, and what to do."""


class ConfigError(UserError):
    """Settings: an unknown key, a wrong value, an impossible combination, or a file that cannot be read."""


class DataError(UserError):
    """Preference pairs, scores or a cache: missing, damaged, or made with other settings."""


class ModelError(UserError):
    """Networks or their weights: missing, incomplete, or of an unsupported kind."""


class CheckpointError(UserError):
    """A checkpoint that a run cannot resume from."""


class EnvironmentProblem(UserError):
    """The machine: a missing package or GPU, a full or read-only disk, no file locks, no network."""
