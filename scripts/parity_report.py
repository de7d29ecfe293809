"""The parity claims as a table: what was compared, the largest error, its tolerance, and whether it held.

    python scripts/parity_report.py --device cpu --out docs/parity_cpu.md  # parity_tests, 2 to 3 minutes on two cores
    python scripts/parity_report.py --device gpu --out docs/parity_gpu.md  # where there is a GPU: its own set, a minute

`--device auto` is the GPU set where JAX finds a GPU; JAX_PLATFORMS=cpu with `--device gpu` is its dry run. Exits with 1
if a claim fails.
"""

import argparse
import inspect
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# A GPU's kernels are timed against each other while XLA compiles; results, not speed, are wanted here.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parity_table import BOUND, Claim, beside, table

from jax_huginn.config.cli import OneLineParser, run_verb
from parity_tests import support

ROOT = Path(__file__).resolve().parents[1]


# ---- On the CPU: parity_tests, test by test -----------------------------------------------------------------------


class Collector:
    """A pytest plugin: every test function is a claim, with the errors that its cases left in `support.LARGEST`."""

    def __init__(self) -> None:
        self.claims: dict[str, Claim] = {}
        self.errors: dict[str, dict[str, tuple[float, str]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        name = item.nodeid.split("[")[0]
        assert item.module is not None
        section = (inspect.getdoc(item.module) or item.module.__name__).splitlines()[0]
        text = item.function.__name__.removeprefix("test_").replace("_", " ")
        claim = self.claims.setdefault(name, Claim(text, section))
        claim.cases += 1
        claim.failures += 1  # taken back below
        before = dict(support.LARGEST)
        support.LARGEST.clear()
        try:
            result = yield
            claim.failures -= 1
            return result
        finally:
            largest = self.errors.setdefault(name, {})
            keep_larger(largest, support.LARGEST)
            keep_larger(support.LARGEST, before)

    def result(self) -> list[Claim]:
        for name, claim in self.claims.items():
            claim.errors = in_words(self.errors[name])
        return list(self.claims.values())


def keep_larger(largest: dict[str, tuple[float, str]], more: dict[str, tuple[float, str]]) -> None:
    for row, error in more.items():
        largest[row] = max(largest.get(row, error), error)


TOLERANCES = {"values": support.VALUES, "gradients": support.GRADIENTS}  # of rows "values, float64"; else LOSS_CURVE


def in_words(errors: dict[str, tuple[float, str]]) -> dict[str, tuple[str, str]]:
    """The rows of `support.LARGEST`, those of JAX and of Torch put side by side."""
    words = {}
    for row, (error, where) in errors.items():
        first, *middle, last = row.split(", ")
        if first == "to float64":
            if last == "JAX":
                theirs = errors[row.removesuffix("JAX") + "Torch"][0]
                bound = "shown only" if middle[-1] == "log_ppl" else BOUND
                words["distance to float64, " + ", ".join(middle)] = (beside(error, theirs), bound)
        elif first.startswith("rerouted"):
            words[row] = (f"{error:.0f} {where}", "3 %, 1.5 x Torch's + 1 %")
        else:
            words[row] = (f"{error:.1e}", f"{TOLERANCES.get(first, support.LOSS_CURVE)[last]:.0e}")
    return words


def run_tests() -> list[Claim]:
    collector = Collector()
    status = pytest.main([str(ROOT / "parity_tests"), "-q", "-p", "no:cacheprovider"], plugins=[collector])
    claims = collector.result()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        claims.append(Claim(f"the tests run (pytest: {pytest.ExitCode(status).name})", "Run", 1, 1))
    return claims


# ---- Report -------------------------------------------------------------------------------------------------------


def facts_of_this_run(device: str, seconds: float) -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
    return {
        "device": device,
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages),
        "commit": commit(),
        "time": f"{seconds:.0f} s",
    }


def commit() -> str:
    """Short hash of the checkout, or $COMMIT where the files came without their history; else `unknown`."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (", with uncommitted changes" if git("status", "--short") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file; printed in any case")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    options = parser.parse_args()
    found: Any = jax.devices()[0]
    device = options.device if options.device != "auto" else jax.default_backend()
    start = time.perf_counter()
    if device == "gpu":
        import parity_gpu  # beside this script

        claims, torch_device = parity_gpu.measure()
        title, where = "Parity on a GPU", f"JAX on {found.device_kind} ({found.platform}), Torch on {torch_device}"
    else:
        claims = run_tests()
        title, where = "Parity on the CPU", cpu_name()
    text = table(claims, title, facts_of_this_run(where, time.perf_counter() - start))
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    return int(any(claim.failures for claim in claims) or not claims)


if __name__ == "__main__":
    run_verb(lambda: sys.exit(main()))
