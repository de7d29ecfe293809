"""The checkpoint's scores are the model's log-probabilities, and a mistake gets one line and a non-zero exit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from torch_reference import MoEHuginnConfig, MoEHuginnModel, save_checkpoint
from torch_reference.generate import greedy
from torch_reference.harness import HuginnLM, UnsupportedRequestError
from torch_reference.quick_checkpoint_eval import main

torch.set_num_threads(1)  # tensors this small lose tenfold to threads that wait for each other on a busy machine

SCRIPT = Path(__file__).resolve().parents[1] / "torch_reference" / "quick_checkpoint_eval.py"
BOS, EOS = 0, 1
CONFIG = MoEHuginnConfig(
    n_embd=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=48,
    padded_vocab_size=264,
    block_size=64,
    n_layers_in_prelude=1,
    n_layers_in_recurrent_block=1,
    n_layers_in_coda=1,
    mean_recurrence=4,
    mean_backprop_depth=2,
    num_experts=4,
    moe_k=2,
    moe_intermediate_size=16,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one merge that a question's end may fall into."""
    alphabet = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "()"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [("(", ")")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model() -> MoEHuginnModel:
    model = MoEHuginnModel(CONFIG, seed=2).double()  # float64, so that rounding cannot hide behind a tolerance
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".proj.weight", ".w_down.weight")):
                weight.mul_(5)
            elif "router" in name:
                weight.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("exported")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    save_checkpoint(MoEHuginnModel(CONFIG), folder / "model.pth")
    return SimpleNamespace(model=str(folder / "model.pth"), tokenizer=str(folder / "tokenizer"))


def make_lm(model: MoEHuginnModel, batch_size: int = 4, recurrence: int = 3) -> HuginnLM:
    return HuginnLM(model, make_tokenizer(), recurrence, batch_size)


def requests(*arguments) -> list:
    return [SimpleNamespace(args=pair if isinstance(pair, tuple) else (pair,)) for pair in arguments]


def log_p(model: MoEHuginnModel, tokens: list[int], start: int, recurrence: int = 3) -> float:
    """Log-probability of tokens[start:] after tokens[:start], from the model's whole output."""
    logits = model(torch.tensor([tokens[:-1]]), num_steps=(recurrence, 0)).logits[0]
    scores = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])
    return scores[start - 1 :].sum().item()


PAIRS = [
    ("def f(x):\n    ", "return x"),
    ("def f(x):\n    ", "raise E"),
    ("a", "b"),
    ("a longer context than the others have", " and its end"),
    ("", "nothing before it"),
    ("choose: ", "A"),
    ("choose: ", "B"),
]


def test_loglikelihood_is_that_of_the_continuation_after_bos_and_context(model):
    lm = make_lm(model)
    for (context, continuation), (score, greedy_hit) in zip(PAIRS, lm.loglikelihood(requests(*PAIRS)), strict=True):
        kept = context.rstrip()  # lm-eval moves the space between the two to the continuation
        head = [BOS, *lm.tok_encode(kept)]
        tokens = [BOS, *lm.tok_encode(context + continuation)]
        assert score == pytest.approx(log_p(model, tokens, len(head)), rel=1e-10)
        best = greedy(model, [head], (3, 0), len(tokens) - len(head))[0]
        assert greedy_hit == (best == tokens[len(head) :])


def test_greedy_continuation_is_recognised(model):
    lm = make_lm(model)
    best = greedy(model, [[BOS, *lm.tok_encode("abc")]], (3, 0), 1)[0]
    other = (best[0] + 1) % 256
    scores = lm._loglikelihood_tokens([(None, [BOS, *lm.tok_encode("abc")], [token]) for token in (best[0], other)])
    assert [hit for _, hit in scores] == [True, False]


def test_scores_do_not_depend_on_batch_size_or_order(model):
    whole = make_lm(model, batch_size=8).loglikelihood(requests(*PAIRS))
    for batch_size in (1, 3):
        found = make_lm(model, batch_size).loglikelihood(requests(*reversed(PAIRS)))
        for (a, hit_a), (b, hit_b) in zip(whole, reversed(found), strict=True):
            assert a == pytest.approx(b, rel=1e-12)
            assert hit_a == hit_b


def test_recurrence_changes_the_scores(model):
    shallow, deep = (make_lm(model, recurrence=r).loglikelihood(requests(PAIRS[0]))[0][0] for r in (1, 6))
    assert abs(shallow - deep) > 1e-3


def test_questions_that_read_alike_are_read_once(model, monkeypatch):
    sizes = []
    hidden = MoEHuginnModel.hidden
    monkeypatch.setattr(
        MoEHuginnModel, "hidden", lambda self, tokens, *rest: sizes.append(len(tokens)) or hidden(self, tokens, *rest)
    )
    make_lm(model).loglikelihood(requests(("choose: ", "A"), ("choose: ", "B"), ("choose: ", "C")))
    assert sizes == [1]


def test_long_contexts_lose_their_left_end(model):
    lm = make_lm(model)
    context, continuation = "0123456789" * 9, "the end"
    (score, _), (same, _) = lm.loglikelihood(requests((context, continuation), ("x" + context, continuation)))
    tokens = (lm.tok_encode(context) + lm.tok_encode(continuation))[-(CONFIG.block_size + 1) :]
    assert score == same == pytest.approx(log_p(model, tokens, len(tokens) - 7), rel=1e-10)
    with pytest.raises(UnsupportedRequestError, match="70 tokens is longer than the model's 64"):
        lm.loglikelihood(requests(("a", "b" * 70)))


def test_a_continuation_merged_into_the_context_is_still_scored(model):
    score, _ = make_lm(model).loglikelihood(requests(("f(", ")")))[0]
    encode = make_lm(model).tok_encode
    assert len(encode("f()")) == len(encode("f("))
    assert score == pytest.approx(log_p(model, [BOS, *encode("f("), *encode(")")], 3), rel=1e-10)


def test_rolling_is_the_whole_text_after_bos_in_windows(model):
    lm = make_lm(model)
    short, long = "a short text", "".join(chr(97 + i * 7 % 26) for i in range(150))
    found = lm.loglikelihood_rolling(requests(short, "", long))
    assert found[0] == pytest.approx(log_p(model, [BOS, *lm.tok_encode(short)], 1), rel=1e-10)
    assert found[1] == 0
    tokens = [BOS, *lm.tok_encode(long)]
    assert len(tokens) == 151
    # Two whole windows, then the last with as much context as fits.
    windows = log_p(model, tokens[:65], 1) + log_p(model, tokens[64:129], 1)
    last = log_p(model, tokens[-65:], 65 - 22)
    assert found[2] == pytest.approx(windows + last, rel=1e-10)


def test_generation_is_the_repeated_argmax_and_stops_at_a_stop_string(model):
    lm = make_lm(model)
    prompts = ["abc", "a much longer prompt", "z"]
    texts = lm.generate_until(requests(*((prompt, {"until": [], "max_gen_toks": 6}) for prompt in prompts)))
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = [BOS, *lm.tok_encode(prompt)]
        for _ in range(6):
            tokens.append(model(torch.tensor([tokens]), num_steps=(3, 0)).logits[0, -1].argmax().item())
            if tokens[-1] == EOS:
                break
        assert text == lm.tokenizer.decode(tokens[len(prompt) + 1 :], skip_special_tokens=True)
    stop = texts[0][2:4]
    cut = lm.generate_until(requests(("abc", {"until": [stop], "max_gen_toks": 6})))[0]
    assert cut == texts[0][: texts[0].index(stop)]
    with pytest.raises(UnsupportedRequestError, match="sampled"):
        lm.generate_until(requests(("abc", {"do_sample": True, "temperature": 1.0})))


def test_generation_ends_at_block_size(model):
    assert len(greedy(model, [[BOS] * 60], (1, 0), 100)[0]) == 4
    with pytest.raises(ValueError, match="at least one token"):
        greedy(model, [[]], (1, 0), 1)


# ---- The command ----------------------------------------------------------------------------------------------------


def arguments(files, *more: str, tasks: str = "stdlib_perplexity") -> list[str]:
    given = ["--checkpoint_name", files.model, "--tokenizer_path", files.tokenizer, "--tasks", tasks]
    return [*given, "--recurrence", "2", "--batch_size", "8", *more]


def refusal(capsys, given: list[str]) -> str:
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quick_checkpoint_eval: error: ")
    assert err.count("\n") == 1
    return err


def test_command_prints_the_table_and_writes_json(files, capsys, tmp_path):
    tasks = "stdlib_perplexity, stdlib_continuation"
    assert main(arguments(files, "--limit=3", "--output", str(tmp_path / "results.json"), tasks=tasks)) == 0
    out, _ = capsys.readouterr()
    assert "|stdlib_perplexity|" in out
    assert "|stdlib_continuation|" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["recurrence"] == 2
    assert results["failed"] == {}
    assert 0 <= results["results"]["stdlib_continuation"]["acc,none"] <= 1
    # About log2(264) bits a byte from an untrained model over as many tokens of a byte each.
    assert results["results"]["stdlib_perplexity"]["bits_per_byte,none"] == pytest.approx(8.04, abs=0.4)
    assert results["n_samples"]["stdlib_continuation"] == {"original": 400, "effective": 3}
    assert os.listdir(tmp_path) == ["results.json"]


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
        (["--recurrence", "two"], "invalid int value: 'two'"),
        (["--recurrence", "0"], "--recurrence 0 must be at least 1"),
        (["--batch_size", "-3"], "--batch_size -3 must be at least 1"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--num_fewshot", "-1"], "--num_fewshot -1 must be at least 0"),
        (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--checkpoint_name", str(tmp_path / "no.pth")], "no.pth: no such file"),
        (["--tokenizer_path", str(tmp_path / "no")], "no: no such folder"),
        (["--output", str(tmp_path / "taken.json")], "taken.json exists already"),
        (["--output", str(tmp_path / "no" / "r.json")], "there is no folder"),
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
    assert "has 269 tokens, more than the model's 264" in message


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
    arc, tiny = done.stderr.strip().splitlines()
    assert "arc_easy did not run: its dataset cannot be loaded: Couldn't reach 'allenai/ai2_arc'" in arc
    assert "OfflineModeIsEnabled" in arc  # found out once, not by retries that take 23 s a task
    assert "tinyMMLU did not run: it needs the package tinyBenchmarks: pip install git+https://github.com/" in tiny
    assert "|stdlib_perplexity|" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["failed"]) == ["arc_easy", "tinyMMLU"]
    assert list(results["results"]) == ["stdlib_perplexity"]
