"""The reference pages that are generated from the declarations of settings."""

from __future__ import annotations

from smpo_fast.config.loading import toml_value
from smpo_fast.config.schema import Config


def settings_page() -> str:
    """All settings with type, default and meaning, as the Markdown of docs/settings.md."""
    lines = []
    for section, field in Config.model_fields.items():
        lines += [
            f"## `[{section}]`",
            "",
            f"{field.annotation.__doc__}",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            lines.append(f"| `{key}` | `{toml_value(inner.default)}` | {inner.description} |".replace("\n", " "))
        lines.append("")
    return "\n".join(lines)
