"""The first seconds of the program: mistakes are answered before anything heavy is imported; Ctrl-C at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import ROOT

SCRIPT = str(ROOT / "smpo_fast" / "train.py")


@pytest.mark.parametrize(
    ("words", "status"), [("'--help'", 0), ("'run.stepz=1'", 2), ("'--dryrun'", 2), ("'--print-config'", 0)]
)
def test_what_needs_no_network_imports_no_torch(words: str, status: int) -> None:
    code = (
        "import sys\nfrom smpo_fast import train\n"
        f"try: status = train.main([{words}])\nexcept SystemExit as end: status = end.code\n"
        "sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-2000:]


def test_ctrl_c_while_libraries_are_imported(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, SCRIPT, f"run.dir={tmp_path / 'run'}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while "libtorch" not in maps.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and out.strip() == "interrupted: start the same command again to continue", out
