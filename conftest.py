"""Shared by tests/ and parity_tests/. Importing tests.support enables float64 and shuts off the network."""

from collections.abc import Callable

import pytest

from jax_huginn.config.schema import Config
from tests.support import small_config


@pytest.fixture
def make_config() -> Callable[..., Config]:
    return small_config
