"""Shared by the tests of `.pth` files: our own file of a dense model, its content to be changed, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.names import params_of, to_torch
from jax_huginn.interop.pth import read_pth, write_pth
from tests.support import random_model, small_config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dense():
    return random_model(small_config(moe={"experts": 0}))


@pytest.fixture(scope="module")
def ours(dense, tmp_path_factory) -> Path:
    """Our own file of `dense`."""
    path = tmp_path_factory.mktemp("ours") / "ours.pth"
    write_pth(dense, path)
    return path


@pytest.fixture
def content(ours) -> dict[str, Any]:
    """What it holds, to be changed."""
    return torch.load(ours, weights_only=True)


def assert_holds(path: Path, model) -> None:
    tensors = read_pth(path).tensors
    for name, tensor in to_torch(params_of(model)):
        np.testing.assert_array_equal(tensors[name].read(), tensor, err_msg=name)


def read_all(path: Path) -> None:
    for tensor in read_pth(path).tensors.values():
        tensor.read()


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as error:
        read_all(path)
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    return message
