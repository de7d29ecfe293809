"""Shared by tests/ and parity_tests/. Importing tests.support enables float64 and shuts off the network."""

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

# The workers of pytest-xdist and the processes that tests start compile many of the same programs: one folder, named
# in the environment before any of them imports JAX, lets each program be compiled once.
CACHE = "JAX_COMPILATION_CACHE_DIR"
_own_cache: str | None = None
if CACHE not in os.environ:
    _own_cache = os.environ[CACHE] = tempfile.mkdtemp(prefix="jax_huginn_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Nearly all of the suite's time goes into compiling small programs; LLVM's optimisation of them is half of it.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):
    # Its newer generator of machine code is a third of the rest. jaxlib 0.11.2 no longer has this flag, and XLA aborts
    # when it meets an unknown one.
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()

pytest.register_assert_rewrite("tests.pth_support")  # test modules import it before they name it as a plugin

from jax_huginn.config.schema import Config  # noqa: E402
from tests.support import small_config  # noqa: E402


def pytest_unconfigure() -> None:
    if _own_cache is not None:
        shutil.rmtree(Path(_own_cache), ignore_errors=True)


@pytest.fixture
def make_config() -> Callable[..., Config]:
    return small_config
