"""The embedded world: a miniature SDXL, a pair table sampled from it, and a rule that scores its images.

`shapes` holds the world itself (captions and images), `reward` the rule, `build` makes everything below
`assets/` from scratch.  Importing this package imports nothing heavy.
"""

from pathlib import Path

PIPELINE = "pipeline"
PAIRS = "pairs.parquet"
UNET_V = "unet_v"


def assets() -> Path:
    """Folder with the shipped model and pair table."""
    return Path(__file__).parent / "assets"


def pipeline_path() -> Path:
    """Folder that `StableDiffusionXLPipeline.from_pretrained` loads."""
    return assets() / PIPELINE


def v_unet_path() -> Path:
    """Folder of a UNet for the same pipeline that predicts v, trained down to zero terminal SNR."""
    return assets() / UNET_V


def pairs_path() -> Path:
    """Pair table in Pick-a-Pic v2 columns, with two additional reward columns."""
    return assets() / PAIRS
