"""`quick_checkpoint_eval`: a table and a results file, and one line with a non-zero exit for a mistake."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from eval_tasks.lm import HuginnLM
from eval_tasks.run import _json
from tests.evaluation_support import CONFIG, make_tokenizer
from torch_reference import MoEHuginnModel, save_checkpoint
from torch_reference.quick_checkpoint_eval import main

torch.set_num_threads(1)  # tensors this small lose tenfold to threads that wait for each other on a busy machine

SCRIPT = Path(__file__).resolve().parents[1] / "torch_reference" / "quick_checkpoint_eval.py"


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    """Progress bars are off where stderr is no terminal: by TQDM_DISABLE, which tqdm reads when it is imported, and
    other tests have imported it. `run_script` shows that the command itself writes none."""
    monkeypatch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("exported")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    save_checkpoint(MoEHuginnModel(CONFIG), folder / "model.pth")
    return SimpleNamespace(model=str(folder / "model.pth"), tokenizer=str(folder / "tokenizer"))


def arguments(files, *more: str, tasks: str = "stdlib_perplexity") -> list[str]:
    given = ["--checkpoint_name", files.model, "--tokenizer_path", files.tokenizer, "--tasks", tasks]
    return [*given, "--recurrence", "2", "--batch_size", "8", *more]


def without_reading(err: str) -> str:
    """What stderr says beside the lines about reading the model and lm-eval's index."""
    return "".join(line for line in err.splitlines(keepends=True) if not re.match(r"reading |read in \d", line))


def refusal(capsys, given: list[str]) -> str:
    assert main(given) == 2
    out, err = capsys.readouterr()
    err = without_reading(err)
    assert out == ""
    assert err.startswith("quick_checkpoint_eval: error: ")
    assert err.count("\n") == 1
    return err


def test_command_prints_the_table_and_writes_json(files, capsys, tmp_path):
    tasks = "stdlib_perplexity, stdlib_continuation"
    given = arguments(files, "--limit=3", "--output", str(tmp_path / "results.json"), "--log_samples", tasks=tasks)
    (tmp_path / "results.json").write_text('{"finished": false}')  # as of an evaluation that was killed
    assert main(given) == 0
    out, _ = capsys.readouterr()
    assert "|stdlib_perplexity|" in out
    assert "|stdlib_continuation|" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"]["recurrence"] == [2]
    assert results["failed"] == {}
    assert 0 <= results["results"]["2"]["stdlib_continuation"]["acc,none"] <= 1
    # About log2(264) bits a byte from an untrained model over as many tokens of a byte each.
    assert results["results"]["2"]["stdlib_perplexity"]["bits_per_byte,none"] == pytest.approx(8.04, abs=0.4)
    asked = results["n_samples"]["stdlib_continuation"]
    assert asked["original"] > 300
    assert asked["effective"] == 3
    assert sorted(os.listdir(tmp_path)) == ["results.json", "results.samples.jsonl"]
    samples = [json.loads(line) for line in (tmp_path / "results.samples.jsonl").read_text().splitlines()]
    assert [(each["task"], each["depth"], each["doc_id"]) for each in samples] == [
        (task, "2", number) for task in tasks.split(", ") for number in range(3)
    ]
    accuracy = [each["acc"] for each in samples if each["task"] == "stdlib_continuation"]
    assert sum(accuracy) / 3 == pytest.approx(results["results"]["2"]["stdlib_continuation"]["acc,none"])
    assert "results.json exists already" in refusal(capsys, given)


def test_dashes_work_as_underscores(files, capsys):
    given = [part.replace("_", "-") if part.startswith("--") else part for part in arguments(files, "--limit", "1")]
    assert main(given) == 0
    assert "stdlib_perplexity" in capsys.readouterr().out


def test_an_unexpected_fault_of_one_task_is_reported_and_the_others_run(files, capsys, tmp_path, monkeypatch):
    import eval_tasks.build

    monkeypatch.setattr(eval_tasks.build, "continuation_questions", lambda _: 1 / 0)
    tasks = "stdlib_continuation,stdlib_perplexity"
    assert main(arguments(files, "--limit=1", "--output", str(tmp_path / "r.json"), tasks=tasks)) == 1
    out, err = capsys.readouterr()
    assert "ZeroDivisionError" in err
    assert "|stdlib_perplexity|" in out
    assert list(json.loads((tmp_path / "r.json").read_text())["failed"]) == ["stdlib_continuation"]


def test_mistakes_seen_before_anything_is_loaded(files, capsys, tmp_path):
    (tmp_path / "taken.json").write_text("{}")
    for more, message in (
        (["--recurence", "3"], "unknown option --recurence; perhaps you meant --recurrence"),
        (["--zzzzzz"], "unknown option --zzzzzz\n"),
        (["--recurrence", "two"], "--recurrence two: not a whole number, nor several between commas"),
        (["--recurrence", "0"], "--recurrence 0 must be at least 1"),
        (["--batch_size", "-3"], "--batch_size -3 must be at least 1"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--num_fewshot", "-1"], "--num_fewshot -1 must be at least 0"),
        (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--checkpoint_name", str(tmp_path / "no.pth")], "no.pth: no such file or folder"),
        (["--tokenizer_path", str(tmp_path / "no")], "no: no such folder"),
        (["--output", str(tmp_path / "taken.json")], "taken.json exists already"),
        (["--output", str(tmp_path / "no" / "r.json")], "there is no folder"),
        (["--output", str(tmp_path / ("r" * 256))], "cannot be written: File name too long"),
        (["--output", "/proc/r.json"], "cannot be written"),
        (["--log_samples"], "--log_samples needs --output FILE"),
        (["--include_path", str(tmp_path / "no")], "no such folder"),
        (["--gen_kwargs", "[1]"], "not a JSON object"),
        (["--fewshot_as_multiturn"], "needs --apply_chat_template"),
        (["--apply_chat_template"], "the tokenizer has no chat template"),
    ):
        assert message in refusal(capsys, arguments(files, *more))
    assert "required: --checkpoint_name" in refusal(capsys, ["--tasks", "stdlib_perplexity", "--tokenizer_path", "x"])
    assert (tmp_path / "taken.json").read_text() == "{}"


def test_unknown_tasks_are_answered_with_the_ones_that_were_meant(files, capsys, monkeypatch):
    import lm_eval.tasks

    # Stands in for lm-eval's index of 14 000 names, which takes seconds to make.
    index = SimpleNamespace(all_tasks=["arc_easy", "hellaswag", "stdlib_perplexity"])
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: index)
    assert "unknown task arc_eazy; perhaps you meant arc_easy\n" in refusal(capsys, arguments(files, tasks="arc_eazy"))
    assert "unknown task 12345\n" in refusal(capsys, arguments(files, tasks="stdlib_perplexity,12345"))


def test_files_that_do_not_fit_are_refused(files, capsys, tmp_path):
    (tmp_path / "broken.pth").write_bytes(Path(files.model).read_bytes()[:5000])
    message = refusal(capsys, arguments(files, "--checkpoint_name", str(tmp_path / "broken.pth")))
    assert "cannot be loaded as a checkpoint" in message
    (tmp_path / "empty").mkdir()
    assert "no tokenizer" in refusal(capsys, arguments(files, "--tokenizer_path", str(tmp_path / "empty")))
    big = make_tokenizer()
    big.add_tokens([f"<extra_{i}>" for i in range(10)])
    big.save_pretrained(tmp_path / "big")
    message = refusal(capsys, arguments(files, "--tokenizer_path", str(tmp_path / "big")))
    assert "has 270 tokens, more than the model's 264" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without CUDA answers")
def test_cuda_is_refused_where_there_is_none(files, capsys):
    assert "PyTorch finds no CUDA device" in refusal(capsys, arguments(files, "--device", "cuda"))


def run_script(files, tmp_path: Path, tasks: str, *more: str) -> subprocess.CompletedProcess:
    """The script as from an uninstalled clone, with a Hub that nobody answers for."""
    offline = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hub"),
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**os.environ, **offline, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)  # the script must find out by itself
    command = [sys.executable, str(SCRIPT), *arguments(files, *more, tasks=tasks)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_script_reports_what_cannot_run_offline_and_runs_the_rest(files, tmp_path):
    tasks = "arc_easy,tinyMMLU,stdlib_perplexity"
    done = run_script(files, tmp_path, tasks, "--limit", "2", "--output", "results.json")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("reading lm-eval's index of tasks\nread in ")
    assert re.search(rf"^reading {re.escape(files.model)}\nread in [\d.]+ s$", done.stderr, re.MULTILINE)
    arc, tiny, scoring = without_reading(done.stderr).strip().splitlines()
    assert re.fullmatch(r"scoring \d+ requests", scoring)
    assert "arc_easy did not run: its dataset cannot be loaded: Couldn't reach 'allenai/ai2_arc'" in arc
    assert "OfflineModeIsEnabled" in arc  # found out once, not by retries that take 23 s a task
    assert "tinyMMLU did not run: it needs the package tinyBenchmarks: pip install git+https://github.com/" in tiny
    assert "|stdlib_perplexity|" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["failed"]) == ["arc_easy", "tinyMMLU"]
    assert list(results["results"]["2"]) == ["stdlib_perplexity"]


def test_several_depths_in_one_command_are_what_each_gives_alone(files, capsys, tmp_path):
    depths = ["--recurrence", "1,3", "--limit", "2"]
    assert main(arguments(files, *depths, "--output", str(tmp_path / "both.json"))) == 0
    out, _ = capsys.readouterr()
    assert "recurrence 1\n" in out
    assert "recurrence 3\n" in out
    both = json.loads((tmp_path / "both.json").read_text())["results"]
    assert list(both) == ["1", "3"]
    assert both["1"] != both["3"]
    assert main(arguments(files, "--recurrence=3", "--limit=2", "--output", str(tmp_path / "one.json"))) == 0
    assert json.loads((tmp_path / "one.json").read_text())["results"]["3"] == both["3"]


def test_a_results_file_of_the_longest_name_is_written(files, tmp_path):
    output = tmp_path / ("r" * 250)
    assert main(arguments(files, "--limit=1", "--output", str(output))) == 0
    assert json.loads(output.read_text())["failed"] == {}


def test_a_disk_that_fills_up_costs_the_results_file_alone(files, capsys, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    tasks = "stdlib_continuation,stdlib_perplexity"
    assert main(arguments(files, "--limit=1", "--output", str(tmp_path / "r.json"), tasks=tasks)) == 0
    out, err = capsys.readouterr()
    assert "|stdlib_continuation|" in out
    assert "|stdlib_perplexity|" in out
    assert err.count("r.json cannot be written: No space left on device\n") == 2
    assert os.listdir(tmp_path) == []


def test_numbers_that_json_does_not_have_are_null():
    assert _json({"a": [float("nan"), 1.5], "b": (float("-inf"),)}) == {"a": [None, 1.5], "b": [None]}


def test_patterns_name_tasks(files, capsys):
    assert main(arguments(files, "--limit=1", tasks="stdlib_*")) == 0
    out, _ = capsys.readouterr()
    assert "|stdlib_continuation|" in out
    assert "|stdlib_perplexity|" in out


def test_a_hugging_face_folder_and_its_tokenizer_are_read(files, capsys, tmp_path):
    folder = shutil.copytree(files.tokenizer, tmp_path / "hf")
    model = MoEHuginnModel(CONFIG)
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "moe_huginn", **CONFIG.to_model_config()}))
    given = ["--checkpoint_name", str(folder), "--tasks", "stdlib_perplexity", "--recurrence", "2", "--limit", "1"]
    assert main(given) == 0
    of_folder = capsys.readouterr().out
    assert main(arguments(files, "--limit", "1")) == 0
    assert capsys.readouterr().out == of_folder
    (folder / "tokenizer.json").unlink()
    assert "--tokenizer_path is needed" in refusal(capsys, given)


def test_ctrl_c_is_one_line(files, capsys, monkeypatch):
    monkeypatch.setattr(HuginnLM, "loglikelihood_rolling", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments(files, "--limit", "1")) == 130
    assert without_reading(capsys.readouterr().err) == "quick_checkpoint_eval: interrupted\n"


TASK = """
task: {name}
custom_dataset: !function {name}.dataset
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: text
metric_list: [{{metric: exact_match}}]
{more}
"""


@pytest.mark.parametrize(
    ("more", "dataset", "message"),
    [
        ("unsafe_code: true", "", "it runs code that the model writes: --confirm_run_unsafe_code gives the permission"),
        ("doc_to_image: text", "", "it shows pictures or sounds, and this model reads text alone"),
        ("", "import no_such_package", "it needs a package that is not installed: No module named 'no_such_package'"),
        ("", "raise KeyError('column')", "it cannot be loaded: KeyError: 'column'"),
    ],
)
def test_a_task_that_cannot_run_is_one_line_and_the_rest_runs(files, capsys, tmp_path, more, dataset, message):
    name = f"case_{abs(hash(message))}"
    (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, more=more))
    (tmp_path / f"{name}.py").write_text(
        f"def dataset(**_):\n    {dataset or 'pass'}\n    from datasets import Dataset, DatasetDict\n"
        "    return DatasetDict({'test': Dataset.from_list([{'text': 'a'}])})\n"
    )
    given = arguments(files, "--limit=1", "--include_path", str(tmp_path), tasks=f"{name},stdlib_perplexity")
    assert main(given) == 1
    out, err = capsys.readouterr()
    failed, scoring = without_reading(err).splitlines()
    assert failed == f"quick_checkpoint_eval: error: {name} did not run: {message}"
    assert re.fullmatch(r"scoring \d+ requests", scoring)
    assert "|stdlib_perplexity|" in out
    if "unsafe" in more:
        assert main([*given, "--confirm_run_unsafe_code"]) == 0
