"""What a freed buffer costs the next step."""

import os
import subprocess
import sys

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
