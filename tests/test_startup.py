"""What is set up before a run, and what a start without a device says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Page faults of asking eight times for 64 MB, after the first time.
COUNT_FAULTS = """
import resource
import numpy as np
from jax_huginn.training.startup import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
np.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    np.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    # NumPy's huge pages would hide how many small ones there are.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"}
    line = [sys.executable, "-c", COUNT_FAULTS.format(keep=keep)]
    return int(subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout)


def test_what_is_freed_is_there_again_without_page_faults():
    assert faults(keep=True) < faults(keep=False) / 10


@pytest.mark.parametrize("platform", ["nothing", "cuda"])
def test_a_platform_that_is_not_here_is_one_line(tmp_path, platform):
    command = [sys.executable, str(ROOT / "train_jax.py"), "--config", str(ROOT / "configs/moe.py"), "--run_dir", "run"]
    environment = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"JAX_PLATFORMS={platform} names what is not here" in result.stderr
    assert not (tmp_path / "run").exists()
