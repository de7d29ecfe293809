"""lm-eval's requests are answered by the model's log-probabilities and its greedy text, whatever the batch."""

from types import SimpleNamespace

import pytest
import torch

from eval_tasks.language_model import Written
from eval_tasks.lm import HuginnLM
from eval_tasks.progress import Progress
from jax_huginn.config.checks import UserError
from jax_huginn.data.tasks import ShellGame
from jax_huginn.data.tokenizer import character_tokenizer
from tests.evaluation_support import BOS, CONFIG, EOS, PAD, lively_model, make_tokenizer
from torch_reference import MoEHuginnModel
from torch_reference.cache import Cache
from torch_reference.evaluation import TorchLanguageModel
from torch_reference.generate import greedy

torch.set_num_threads(1)  # tensors this small lose tenfold to threads that wait for each other on a busy machine


@pytest.fixture(scope="module")
def model() -> MoEHuginnModel:
    return lively_model()


def make_lm(model: MoEHuginnModel, batch_size: int = 4, recurrence: int = 3) -> HuginnLM:
    return HuginnLM(TorchLanguageModel(model), make_tokenizer(), recurrence, batch_size)


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
    read = Cache.read
    monkeypatch.setattr(Cache, "read", lambda *a, **b: sizes.append(len(a[1])) or read(*a, **b))
    make_lm(model).loglikelihood(requests(("choose: ", "A"), ("choose: ", "B"), ("choose: ", "C")))
    assert sizes == [1]


def test_long_contexts_lose_their_left_end(model):
    lm = make_lm(model)
    context, continuation = "0123456789" * 9, "the end"
    (score, _), (same, _) = lm.loglikelihood(requests((context, continuation), ("x" + context, continuation)))
    tokens = (lm.tok_encode(context) + lm.tok_encode(continuation))[-(CONFIG.block_size + 1) :]
    assert score == same == pytest.approx(log_p(model, tokens, len(tokens) - 7), rel=1e-10)
    assert lm.notes == {"contexts lost their left end to fit the model's 64 tokens": 2}
    with pytest.raises(UserError, match="70 tokens is longer than the model's 64"):
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
    with pytest.raises(UserError, match="sampled"):
        lm.generate_until(requests(("abc", {"do_sample": True, "temperature": 1.0})))


def test_a_prompt_is_never_cut_for_an_answer(model):
    """lm-eval's default limit, 256 new tokens, is far more than this model's 64."""
    lm = make_lm(model)
    prompt = "0123456789" * 4
    text = lm.generate_until(requests((prompt, {"until": ["\n"]})))[0]
    new = greedy(model, [[BOS, *lm.tok_encode(prompt)]], (3, 0), 256, lambda _, new: new[-1] == EOS)[0]
    assert len(new) <= CONFIG.block_size - 41
    assert text == lm.tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]
    assert lm.notes == {"answers had less room than the task allows, so that their prompts stay whole": 1}
    with pytest.raises(UserError, match="a prompt of 71 tokens leaves no room for an answer in the model's 64"):
        lm.generate_until(requests(("0123456789" * 7, {"until": ["\n"]})))


def test_a_stop_string_may_be_a_special_token(model, monkeypatch):
    """Special tokens are dropped from the text only after the stop strings are found in it."""
    lm = make_lm(model)
    written = [[*lm.tok_encode("ab"), PAD, *lm.tok_encode("cd")], [PAD, *lm.tok_encode("ab"), EOS]]

    def generate(prompts, limits, recurrence, finished):
        return [
            Written(next((new[:n] for n in range(1, len(new)) if finished(row, new[:n])), new))
            for row, new in enumerate(written[: len(prompts)])
        ]

    monkeypatch.setattr(lm.model, "generate", generate)
    assert lm.generate_until(requests(("x", {"until": ["<pad>"]}))) == ["ab"]
    assert lm.generate_until(requests(("x", {"until": ["b<pad>c"]}))) == ["a"]
    assert lm.generate_until(requests(("x", {"until": []}), ("y", {"until": []}))) == ["abcd", "ab"]


def test_a_limit_of_nothing_means_nothing_alone_and_in_a_batch(model):
    nothing, some = ("abc", {"until": [], "max_gen_toks": 0}), ("abc", {"until": [], "max_gen_toks": 3})
    lm = make_lm(model)
    alone = [lm.generate_until(requests(each))[0] for each in (nothing, some)]
    assert lm.generate_until(requests(nothing, some)) == alone
    assert alone[0] == ""


@pytest.mark.parametrize(
    "setting", [{"num_beams": 4}, {"repetition_penalty": 1.2}, {"num_return_sequences": 2}, {"x": 1}]
)
def test_a_task_that_wants_more_than_greedy_text_is_refused_by_the_setting(model, setting):
    (name, value), *_ = setting.items()
    with pytest.raises(UserError, match=f"the task wants {name}={value}, which greedy decoding does not have"):
        make_lm(model).generate_until(requests(("abc", {"until": [], name: value})))
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "temperature": 0.0, "top_p": 0.9, "max_gen_toks": 1}
    make_lm(model).generate_until(requests(("abc", {"until": [], **neutral})))


def test_a_chat_template_that_writes_bos_gets_no_second_one(model):
    lm = make_lm(model)
    assert lm._encode_pair("<bos>ab", "c")[0] == lm._encode_pair("ab", "c")[0]


def test_a_character_that_the_tokenizer_does_not_know_is_one_line(model):
    """Such as a letter in a question for the model of a generated task."""
    game = ShellGame()
    lm = HuginnLM(TorchLanguageModel(model), character_tokenizer(game.alphabet, game.separator), 1, 1)
    with pytest.raises(UserError, match="a text has 'd', which the tokenizer has no token for"):
        lm.generate_until(requests(("def", {"until": []})))


def test_generation_ends_at_block_size(model):
    assert len(greedy(model, [[BOS] * 60], (1, 0), 100)[0]) == 4
    with pytest.raises(ValueError, match="at least one token"):
        greedy(model, [[]], (1, 0), 1)


def test_where_a_bar_cannot_be_drawn_lines_say_how_far_an_evaluation_is(monkeypatch, capsys):
    now = iter([0.0, 0.0, 4.0, 11.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr("eval_tasks.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    progress = Progress("scoring", 8)
    for _ in range(4):
        progress.update(2)
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["scoring 8 requests", "scoring 50 % of 8 requests"]
