"""The exceptions of the package: every mistake that a user can correct is a ``UserError``."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake in the settings: the message names the key or file, what was found and what is right."""
