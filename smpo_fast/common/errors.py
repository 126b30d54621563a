"""The exceptions of the package: everything that a user can correct is a ``UserError``.

The programs catch ``UserError`` in one place and print it as one line; any other exception is a bug of ours.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can correct. The message says what was found, where, and what to do."""


class ConfigError(UserError):
    """The settings: an unknown key, a wrong value, an impossible combination, a file that cannot be read."""


class DataError(UserError):
    """Preference pairs, scores or a cache: missing, damaged, or made for other settings."""


class ModelError(UserError):
    """Networks or their weights: missing, incomplete, or of a kind that is not supported."""


class CheckpointError(UserError):
    """Checkpoints that cannot be continued, and the reasons."""


class EnvironmentProblem(UserError):
    """The machine: a missing package, a full or read-only disk, no locks, too few file descriptors."""
