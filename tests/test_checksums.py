"""The checksum of an array: sensitive to every bit and its place, the same on every device and however sharded."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_huginn.checkpoints.checksums import checksum

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "int32", "uint8", "bool", "int64"])
def test_a_checksum_shows_every_flipped_bit_and_every_exchange(kind):
    dtype = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    array = np.random.default_rng(0).integers(0, 2, (3, 5, 2)).astype(dtype)
    expected = int(checksum(jnp.asarray(array)))
    assert int(checksum(array)) == expected, "host and device disagree"
    for byte in range(0, array.nbytes, 3):
        changed = array.copy()
        changed.view(np.uint8).reshape(-1)[byte] ^= 1
        assert int(checksum(changed)) != expected
    assert int(checksum(np.ascontiguousarray(array[::-1]))) != expected
    assert int(checksum(array.reshape(5, 3, 2))) == expected  # of the values in order: the shape is checked by Orbax


def test_a_checksum_is_what_its_docstring_says():
    """Written out in Python integers."""

    def mixed(bits: int, index: int) -> int:
        mask = 2**32 - 1
        value = bits ^ ((index * 0x9E3779B1 + 0x7F4A7C15) & mask)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            value = ((value ^ (value >> shift)) * factor) & mask
        return value

    array = np.random.default_rng(1).standard_normal((4, 7)).astype(np.float32)
    expected = sum(mixed(int(bits), index) for index, bits in enumerate(array.view(np.uint32).reshape(-1)))
    assert int(checksum(array)) == expected % 2**32


def test_a_checksum_is_the_same_however_an_array_is_sharded():
    program = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax_huginn.checkpoints.checksums import checksum
from tests.support import small_config
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
array = np.random.default_rng(0).standard_normal((8, 6, 4)).astype(np.float32)
sums = {int(checksum(jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))))
        for spec in ((), ("a",), ("b", None, "a"), (("a", "b"),))}
assert sums == {int(checksum(array))}, sums
"""
    environment = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | environment, cwd=ROOT, check=True)
