"""A run's settings: the typed sections (``schema``) and how they are read, merged and described (``loading``).

Imports ``common``. In: TOML files, presets and command-line words. Out: a frozen, validated ``Config``.
"""
