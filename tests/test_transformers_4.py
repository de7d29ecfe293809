"""Exported folders open in Transformers 4.57 as they do in 5: `pytest -m transformers4`, which needs a package index.

Not in CI. Transformers 4 goes into a folder of its own, which precedes the installed one; there the tests of
tests/test_huggingface_folder.py run again.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = "4.57.6"
# Transformers' Trainer imports `datasets`, whose installed version wants a huggingface_hub that Transformers 4 refuses.
PACKAGES = (f"transformers=={VERSION}", "datasets<5")


@pytest.mark.transformers4
def test_every_test_of_exported_folders_passes_in_transformers_4(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "packages"), *PACKAGES]
    subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "packages"), str(ROOT)])}
    version = "import transformers; print(transformers.__version__)"
    found = subprocess.run([sys.executable, "-c", version], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == VERSION
    tests = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    tests.append("tests/test_huggingface_folder.py")
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "skipped" not in done.stdout
