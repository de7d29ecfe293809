"""Nothing of a `.pth` file runs when it is read, whatever was pickled into it."""

import collections
import os
import pickle
import subprocess
import sys
import types
import zipfile
from functools import partial
from typing import Any

import pytest
import torch

from jax_huginn.interop.pth import PREFIX, read_pth
from tests.pth_support import assert_holds, refusal

pytest_plugins = "tests.pth_support"  # its fixtures


class Reduces:
    """Unpickled as `function(*args)`, then given `state`, elements and entries."""

    def __init__(self, function, *args, **then):
        self.reduced = (function, args, then.get("state"), then.get("elements"), then.get("entries"))

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        raise AssertionError("pickle wants the first of a reduction to be callable")


def evil_objects(proof: str) -> dict[str, Any]:
    return {
        "os.mkdir": Reduces(os.mkdir, proof),
        "os.system": Reduces(os.system, f"mkdir {proof}"),
        "exec": Reduces(exec, f"import os; os.mkdir({proof!r})"),
        "eval": Reduces(eval, f"__import__('os').mkdir({proof!r})"),
        "Popen": Reduces(subprocess.Popen, ["mkdir", proof]),
        "nested": Reduces(list, [Reduces(partial, os.mkdir, proof)]),
        "called twice": Reduces(Reduces(partial, os.mkdir), proof),
        "state": Reduces(types.SimpleNamespace, state=Reduces(os.mkdir, proof)),
        "elements": Reduces(collections.deque, elements=iter([Reduces(os.mkdir, proof)])),
        "entries": Reduces(collections.OrderedDict, entries=iter([("key", Reduces(os.mkdir, proof))])),
        "torch.load": Reduces(torch.load, proof),
        "tensor": Reduces(torch._utils._rebuild_tensor_v2, Reduces(os.mkdir, proof), 0, (1,), (1,), False, None),  # pyright: ignore
    }


@pytest.mark.parametrize("kind", evil_objects("."))
def test_a_planted_pickle_runs_nothing(dense, content, tmp_path, kind):
    """Beside the weights it is left alone; in their place it is refused."""
    proof = tmp_path / "proof"
    torch.save({**content, "optimizer": evil_objects(str(proof))[kind]}, tmp_path / "evil.pth")
    assert_holds(tmp_path / "evil.pth", dense)
    content["model"][PREFIX + "transformer.ln_f.weight"] = evil_objects(str(proof))[kind]
    torch.save(content, tmp_path / "evil.pth")
    assert "transformer.ln_f.weight is not a tensor" in refusal(tmp_path / "evil.pth")
    for place in ("model", "model_config"):
        torch.save({**content, place: evil_objects(str(proof))[kind]}, tmp_path / "evil.pth")
        refusal(tmp_path / "evil.pth")
    assert not proof.exists()
    # The plants are live: an ordinary unpickler runs them.
    if kind in ("os.mkdir", "exec", "state"):
        pickle.loads(pickle.dumps(evil_objects(str(proof))[kind]))
        assert proof.exists()


def test_no_module_that_a_file_names_is_imported(content, tmp_path, monkeypatch):
    (tmp_path / "mined.py").write_text("import os\nclass Mine: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mined  # pyright: ignore[reportMissingImports]

    torch.save({**content, "loader": mined.Mine()}, tmp_path / "mined.pth")
    monkeypatch.delitem(sys.modules, "mined")
    read_pth(tmp_path / "mined.pth")
    assert "mined" not in sys.modules


def test_opcodes_that_assemble_objects_by_hand_reach_nothing(tmp_path):
    """Pickles that no pickler writes: state and entries given to a class itself, an instance of a module's function."""
    proof = tmp_path / "proof"
    for program in (
        b"cbuiltins\nexec\n(S'open(%r, \"w\").close()'\ntR.",
        b"cbuiltins\nobject\n(dS'x'\nS%r\nsb.",
        b"cbuiltins\ndict\nS'x'\nS%r\ns.",
        b"cbuiltins\nlist\n(S%r\ne.",
        b"(S'open(%r, \"w\").close()'\nibuiltins\nexec\n.",
    ):
        with zipfile.ZipFile(tmp_path / "hand.pth", "w") as archive:
            archive.writestr("hand/data.pkl", program.replace(b"%r", repr(str(proof)).encode()))
        refusal(tmp_path / "hand.pth")
    assert not proof.exists()
    pickle.loads(program.replace(b"%r", repr(str(proof)).encode()))
    assert proof.exists()  # the last one is live elsewhere


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pth")
    assert "TorchScript" in refusal(tmp_path / "program.pth")


@pytest.mark.parametrize("view", [((10**6,), (1,), 0), ((32,), (10**6,), 0), ((32,), (1,), 10**6), ((32,), (-1,), 40)])
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(content, tmp_path, view):
    shape, strides, offset = view
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(64).untyped_storage(), dtype=torch.float32, _internal=True
    )
    content["model"][PREFIX + "transformer.ln_f.weight"] = Reduces(
        torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, collections.OrderedDict()
    )  # pyright: ignore
    torch.save(content, tmp_path / "out.pth")
    assert "ln_f.weight is not a tensor, or reaches out of the file" in refusal(tmp_path / "out.pth")
