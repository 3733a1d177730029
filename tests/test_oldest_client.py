"""The same Hub tests with the oldest client that is supported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mats_hub

ROOT = Path(mats_hub.__file__).parents[1]
TESTS = ("test_hub.py", "test_faults.py", "test_streaming.py", "test_statistics_hub.py", "test_jobs.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_oldest_supported_client(tmp_path):
    oldest = re.search(r'"huggingface_hub>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    assert oldest
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*pip, "--no-deps", f"huggingface_hub=={oldest[1]}.0"], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    told = "import huggingface_hub; print(huggingface_hub.__version__)"
    version = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert version.stdout.strip() == f"{oldest[1]}.0"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
