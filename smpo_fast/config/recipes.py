"""The recipes and DeepSpeed files that ship with the package, by name: the folder configs/ of the repository.

``--config sdxl_smpo`` means ``configs/sdxl_smpo.toml``, in a checkout as in an installed package.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
FOLDER = next((f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "configs") if f.is_dir()), _PACKAGE / "recipes")


def names(suffix: str) -> list[str]:
    """The names of the shipped files with a suffix: '.toml' for settings, '.json' for DeepSpeed."""
    return sorted(file.stem for file in FOLDER.glob(f"*{suffix}"))


def located(file: Path, suffix: str) -> Path:
    """The shipped file that a bare name means; any other path, and a file of that name, as it is."""
    shipped = FOLDER / f"{file.name}{suffix}"
    is_name = len(file.parts) == 1 and not file.suffix
    return shipped if is_name and not file.exists() and shipped.is_file() else file
