"""Fused operators, imported as ``smpo_fast.kernels``.

With the repository's root on the path this folder is also found as ``kernels``, which is the name of a package of
Hugging Face that diffusers, transformers and bitsandbytes look for. Imported by that name it makes way for that
package; where that is not installed, it says so, as if this folder were not there.
"""

__version__ = "0.0.0"  # below every release of theirs, so that a probe that reads it leaves this folder alone

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _HERE = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec(__name__, [place for place in sys.path if Path(place or ".").resolve() != _HERE])
    if _spec is not None and _spec.loader is not None:  # a folder without __init__ has no loader
        _theirs = sys.modules[__name__] = module_from_spec(_spec)
        _spec.loader.exec_module(_theirs)

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(f"No module named '{__name__}'", name=__name__)
