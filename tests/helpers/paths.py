"""Where the tests find the repository's files, and sample data that a user may lack."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SAMPLES = ROOT / "tests" / os.environ.get("SMPO_PAIRS", "../../shared/pairs")
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no sample pairs at {SAMPLES} (SMPO_PAIRS)")
