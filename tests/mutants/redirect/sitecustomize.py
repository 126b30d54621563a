"""Makes a Python process import the project from the tree that SMPO_MUTANT_TREE names, not from where it is installed.

Its folder is on the PYTHONPATH of mutated test runs, so this reaches the processes that tests start; not those that a
test gives another PYTHONPATH.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

TREE = Path(os.environ["SMPO_MUTANT_TREE"])
FOLDERS = {"smpo_fast": TREE / "smpo_fast", "smpo_fast.kernels": TREE / "kernels"}


class TreeFinder:
    """Finds the two folders whose place in the package is not that on disk, or is elsewhere too."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        folder = FOLDERS.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


sys.meta_path.insert(0, TreeFinder)  # type: ignore[arg-type]
