"""`python -m jax_huginn.evaluate` and `quick_checkpoint_eval.py` give the same scores, and keep them apart by model."""

import json
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from eval_tasks.cache import AnswerCache
from eval_tasks.lm import HuginnLM
from jax_huginn import evaluate
from jax_huginn.checkpoints.sources import load_for_inference, open_source
from jax_huginn.config.checks import UserError
from jax_huginn.inference import Exit, generate
from jax_huginn.inference.evaluation import JaxLanguageModel
from tests.evaluation_support import BOS, CONFIG, EOS, lively_model, make_tokenizer
from torch_reference import quick_checkpoint_eval, save_checkpoint
from torch_reference.evaluation import TorchLanguageModel

torch.set_num_threads(1)  # tensors this small lose tenfold to threads that wait for each other on a busy machine


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights in both frameworks, in float32, and their file."""
    folder = tmp_path_factory.mktemp("exported")
    twin = lively_model().float()
    save_checkpoint(twin, folder / "model.pth")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    source = open_source(folder / "model.pth")
    return SimpleNamespace(
        folder=folder, torch=TorchLanguageModel(twin), jax=JaxLanguageModel(load_for_inference(source))
    )


def lms(models, batch_size, recurrence=5) -> list[HuginnLM]:
    return [HuginnLM(model, make_tokenizer(), recurrence, batch_size) for model in (models.jax, models.torch)]


def pairs_of(lm: HuginnLM) -> list:
    """As lm-eval asks: an empty context is BOS alone."""
    encoded = (lm._encode_pair(*pair) if pair[0] else ([BOS], lm.tok_encode(pair[1])) for pair in PAIRS)
    return [(None, *tokens) for tokens in encoded]


def requests(*arguments) -> list:
    return [SimpleNamespace(args=each) for each in arguments]


LONG = "".join(chr(97 + i * 7 % 26) for i in range(150))
PAIRS = [
    ("def f(x):\n    ", "return x"), ("a", "b"), ("", "nothing before it"), ("a longer context than any", " and end"),
    ("choose: ", "A"), ("choose: ", "B"), (LONG, " the end"), ("f(", ")"), ("x" * 20, "y" * 40),
]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_agree_token_by_token(models, batch_size):
    ours, theirs = lms(models, batch_size)
    pairs = pairs_of(ours)
    for one, other in zip(ours.scores(pairs), theirs.scores(pairs), strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)
        assert one.greedy == other.greedy
    assert ours.notes == theirs.notes
    assert sum(ours.notes.values()) == 1  # LONG


@pytest.mark.parametrize("batch_size", [1, 7])
def test_whole_texts_agree(models, batch_size):
    ours, theirs = lms(models, batch_size)
    texts = requests((LONG,), ("short",), ("",), (LONG[:64],), (LONG[:65],))
    found, expected = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts)
    for one, other, text in zip(found, expected, texts, strict=True):
        assert one == pytest.approx(other, abs=1e-4 * max(len(text.args[0]), 1))
    assert found[2] == 0


@pytest.mark.parametrize("batch_size", [1, 7])
def test_generated_texts_agree(models, batch_size):
    ours, theirs = lms(models, batch_size)
    asked = requests(
        ("abc", {"until": [], "max_gen_toks": 6}), ("a much longer prompt", {"until": ["e"], "max_gen_toks": 8}),
        ("z", {"until": []}), ("0123456789" * 6, {"until": []}), ("", {"until": ["\n"], "max_gen_toks": 0}),
    )  # fmt: skip
    texts = ours.generate_until(asked)
    assert texts == theirs.generate_until(asked)
    assert any(texts)


def test_scores_do_not_depend_on_the_batch_in_jax(models):
    alone, together = (lms(models, batch_size)[0] for batch_size in (1, 8))
    pairs = pairs_of(alone)
    for one, other in zip(alone.scores(pairs), reversed(together.scores(pairs[::-1])), strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-5)


# ---- The commands -----------------------------------------------------------------------------------------------


def test_both_commands_take_the_same_flags_and_write_the_same_results(models, tmp_path):
    path = str(models.folder / "model.pth")
    flags = ["--tasks", "stdlib_*", "--recurrence", "1,3", "--limit", "3", "--batch_size", "5", "--dtype", "float32"]
    assert evaluate.main([path, *flags, "--output", str(tmp_path / "jax.json")]) == 0
    given = ["--checkpoint_name", path, *flags, "--output", str(tmp_path / "torch.json")]
    assert quick_checkpoint_eval.main(given) == 0
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("jax", "torch"))
    assert list(ours["results"]) == list(theirs["results"]) == ["1", "3"]
    assert ours["executed_steps"] == {"1": 1, "3": 3}
    for depth in ("1", "3"):
        for task, metrics in ours["results"][depth].items():
            expected = theirs["results"][depth][task]
            assert metrics.keys() == expected.keys()
            for name, value in metrics.items():
                if isinstance(value, float):
                    assert value == pytest.approx(expected[name], rel=1e-5), (task, name)
    same = ("weights_sha256", "tokenizer_sha256", "dtype", "commit", "fewshot_seed", "chat_template", "task_versions")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert len(ours["weights_sha256"]) == len(ours["tokenizer_sha256"]) == 64
    assert ours["versions"]["framework"].startswith("jax ")
    assert theirs["versions"]["framework"].startswith("torch ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pth"], "no model at absent.pth: give a run folder"),
        (["{folder}"], "no config.json there, so neither a run nor a Hugging Face folder"),
        (["{folder}/model.pth", "--recurrence", "1,0"], "--recurrence 0 must be at least 1"),
        (["{folder}/model.pth", "--recurence", "1"], "unknown option --recurence; perhaps you meant --recurrence"),
        (["{folder}/model.pth", "--exit", "kll"], "exit 'kll' is not a criterion: choose one of kl, kl-entropy"),
        (["{folder}/model.pth", "--exit", "kl", "--exit_threshold", "small"], "--exit_threshold small: not a number"),
        (["{folder}/model.pth", "--min_steps", "4"], "--min_steps need --exit NAME"),
        (["{folder}/model.pth", "--tokenizer_path", "/absent"], "--tokenizer_path /absent: no such folder"),
        (["{folder}/model.pth", "--cache.policy", "mod"], "cache.budget=0 must be positive with cache.policy=mod"),
        (["{folder}/model.pth", "--parallel.data", "99"], "--parallel.data 99 is more than the"),
    ],
)
def test_a_mistake_is_one_line(models, capsys, arguments, message):
    given = [argument.format(folder=models.folder) for argument in arguments]
    assert evaluate.main([*given, "--tasks", "stdlib_perplexity"]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("python -m jax_huginn.evaluate: error: ")
    assert (out, err.count("\n")) == ("", 1)


# ---- Exits ------------------------------------------------------------------------------------------------------


def test_the_command_scores_with_exits(models, tmp_path):
    """Two thresholds in one call, at most 9 recurrences; what is resumed costs what it cost at first."""
    path = str(models.folder / "model.pth")
    flags = [path, "--tasks", "stdlib_perplexity", "--limit", "2", "--use_cache", str(tmp_path / "cache")]
    exits = [*flags, "--recurrence", "9", "--exit", "latent-diff", "--exit_threshold", "0.5,1e-9"]
    for name in ("first", "again"):
        assert evaluate.main([*exits, "--output", str(tmp_path / f"{name}.json")]) == 0
    assert evaluate.main([*flags, "--recurrence", "9", "--output", str(tmp_path / "fixed.json")]) == 0
    found, again, fixed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "again", "fixed"))
    names = ["latent-diff 0.5", "latent-diff 1e-09"]
    assert list(found["results"]) == list(found["exits"]) == names
    assert found["exits"][names[0]] == {
        "name": "latent-diff", "threshold": 0.5, "entropy": 0.3, "min_steps": 1, "every": 1, "most": 9,
    }  # fmt: skip
    early, never = (found["executed_steps"][name]["stdlib_perplexity"] for name in names)
    assert 2 <= early["used"] < early["computed"] <= 9
    assert never == {"used": 9, "computed": 9}
    bits = [found["results"][name]["stdlib_perplexity"]["bits_per_byte,none"] for name in names]
    assert bits[1] == pytest.approx(fixed["results"]["9"]["stdlib_perplexity"]["bits_per_byte,none"], rel=1e-5)
    assert bits[0] != pytest.approx(bits[1], rel=1e-5)
    for key in ("results", "executed_steps"):
        assert again[key] == found[key]


def test_a_task_that_generates_does_so_with_exits(models, tmp_path):
    """By the engine of `generate`, which has tests of its own; what is resumed costs what it cost at first."""
    rule, most = Exit("latent-diff", 0.5), 9
    asked = requests(*((text, {"until": ["e"], "max_gen_toks": 5}) for text in ("abc", "a longer prompt", "z")))
    texts, steps = [], []
    for _ in range(2):
        with closing(AnswerCache(tmp_path, {})) as cache:
            lm = HuginnLM(models.jax.exiting(rule), make_tokenizer(), most, 2, cache)
            texts.append(lm.generate_until(asked))
            steps.append(lm.steps)
    assert texts[0] == texts[1]
    assert steps[0] == pytest.approx(steps[1])
    for request, text in zip(asked, texts[0], strict=True):
        prompt = lm._with_bos(lm.tok_encode(request.args[0]))
        ((found,), _) = generate(models.jax._model, [prompt], max_new_tokens=32, recurrence=most, exit=rule)
        new = found.tokens[: 1 + next((i for i, token in enumerate(found.tokens) if token == EOS), 4)][:5]
        assert text == lm._decode(new, ["e"])
    assert 2 < steps[0]["used"] / steps[0]["tokens"] < steps[0]["computed"] / steps[0]["tokens"]
    assert sum(map(len, texts[0])) + len("abca longer promptz") <= steps[0]["tokens"] <= 15 + 19


def test_a_cache_that_keeps_less_writes_another_text_and_scores_nothing(models):
    lm = HuginnLM(JaxLanguageModel(models.jax._model, None, "last"), make_tokenizer(), 5, 2)
    asked = requests(("a longer prompt", {"until": [], "max_gen_toks": 20}))
    assert lm.generate_until(asked) != lms(models, 2)[0].generate_until(asked)
    with pytest.raises(UserError, match=r"--cache\.policy last is for tasks that generate"):
        lm.loglikelihood(requests(("a", "b")))


# ---- The cache of answers ---------------------------------------------------------------------------------------


def ask(models, folder, **setting) -> list:
    """Answers of the twin, with a cache in the folder for this setting."""
    setting = {"weights": "w", "recurrence": 2, **setting}
    until = {"until": ["e"], "max_gen_toks": 4}
    with closing(AnswerCache(folder, setting)) as cache:
        lm = HuginnLM(models.torch, make_tokenizer(), setting["recurrence"], 4, cache)
        return [*lm.loglikelihood(requests(*PAIRS)), *lm.generate_until(requests(("abc", until), ("z", until)))]


def test_a_killed_evaluation_resumes_from_its_answers(models, tmp_path, monkeypatch):
    expected = ask(models, None)
    assert ask(models, tmp_path) == expected
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:6]) + "\n" + lines[6][:40])  # five answers, and one cut by a kill
    asked = []
    score = TorchLanguageModel.log_probabilities

    def count(self, readings, recurrence):
        asked.extend(one for reading in readings for one in reading.continuations)
        return score(self, readings, recurrence)

    monkeypatch.setattr(TorchLanguageModel, "log_probabilities", count)
    resumed = ask(models, tmp_path)
    assert len(asked) == len(PAIRS) - 5
    for one, other in zip(resumed, expected, strict=True):  # in other batches, so that float32 rounds otherwise
        assert one == other if isinstance(one, str) else one == (pytest.approx(other[0], abs=1e-5), other[1])
    asked.clear()
    assert ask(models, tmp_path) == resumed
    assert asked == []


def test_another_depth_model_or_type_never_gets_the_answers(models, tmp_path):
    """lm-eval's own cache returned the scores of recurrence 1 for recurrence 6."""
    first = ask(models, tmp_path)
    for change in ({"recurrence": 4}, {"weights": "other"}, {"dtype": "bfloat16"}):
        ask(models, tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 4
    assert ask(models, tmp_path, recurrence=4) == ask(models, None, recurrence=4) != first


def test_the_commands_cache_by_depth(models, tmp_path, capsys):
    flags = ["--tasks", "stdlib_perplexity", "--limit", "2", "--use_cache", str(tmp_path / "cache")]
    results = {}
    for depth in ("1", "3", "1,3"):
        output = tmp_path / f"{depth}.json"
        given = ["--checkpoint_name", str(models.folder / "model.pth"), *flags]
        assert quick_checkpoint_eval.main([*given, "--recurrence", depth, "--output", str(output)]) == 0
        results |= {(depth, key): value for key, value in json.loads(output.read_text())["results"].items()}
    assert results["1,3", "1"] == results["1", "1"] != results["3", "3"] == results["1,3", "3"]
    settings = [json.loads(file.read_text().splitlines()[0]) for file in (tmp_path / "cache").iterdir()]
    assert sorted(setting["recurrence"] for setting in settings) == [1, 3]
    assert settings[0].keys() >= {
        "weights_sha256",
        "tokenizer_sha256",
        "dtype",
        "cache",
        "device",
        "commit",
        "versions",
    }


def test_a_cache_that_cannot_be_written_is_one_line(models, capsys):
    given = ["--checkpoint_name", str(models.folder / "model.pth"), "--tasks", "stdlib_perplexity", "--limit", "1"]
    assert quick_checkpoint_eval.main([*given, "--use_cache", "/proc/cache"]) == 2
    assert "--use_cache /proc/cache cannot be written: " in capsys.readouterr().err


def test_bos_alone_predicts_the_first_token(models):
    ours, theirs = lms(models, 1)
    assert CONFIG.block_size == ours.model.max_length
    one, other = (lm.scores([(None, [BOS], [5])])[0] for lm in (ours, theirs))
    assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)
