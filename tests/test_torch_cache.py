"""The twin's cache: whatever is read in pieces, at any depth and beside whatever rows, is what one pass reads."""

from dataclasses import replace

import pytest
import torch

from eval_tasks.language_model import Reading
from tests.torch_support import CORE, DENSE, KINDS, batch, perturbed
from torch_reference import MoEHuginnModel
from torch_reference.cache import Cache
from torch_reference.evaluation import TorchLanguageModel
from torch_reference.generate import greedy

TOLERANCE = 1e-10


@KINDS
def test_text_in_pieces_is_the_text_in_one_pass(config):
    """At several depths: a long piece, one token, two, and the rest."""
    model, text = perturbed(config), batch(config, rows=1)
    for steps in ((1, 0), (2, 2), (9, 0)):
        whole = model.hidden(text, steps)[0][0]
        cache = Cache(model, steps)
        pieces = [cache.read([text[0, a:b].tolist()])[0] for a, b in ((0, 40), (40, 41), (41, 43), (43, 64))]
        assert (torch.cat(pieces) - whole).abs().max() < TOLERANCE
    assert len(cache.layers) == 1 + 9 * 2 + 1


@KINDS
def test_greedy_is_argmax_after_argmax_of_whole_passes(config):
    """Ragged prompts, of which rows end at different times: by their limit, by `finished` and by the context."""
    model, tokens = perturbed(config), batch(config)[0].tolist()
    prompts, limits = [tokens[:40], tokens[5:8], [*tokens, *tokens[:30]]], [5, 9, 9]
    expected = []
    for prompt, limit in zip(prompts, limits, strict=True):
        text = list(prompt)
        while len(text) < min(len(prompt) + limit, config.block_size):
            text.append(int(model(torch.tensor([text]), (3, 0)).logits[0, -1].argmax()))
        expected.append(text[len(prompt) :])
    assert greedy(model, prompts, (3, 0), limits) == expected
    ended = greedy(model, prompts, (3, 0), limits, lambda row, new: row == 1 and len(new) == 2)
    assert ended == [expected[0], expected[1][:2], expected[2]]


def test_a_row_that_leaves_changes_nothing_for_the_others():
    model, tokens = perturbed(CORE), batch(CORE)[0].tolist()
    cache = Cache(model, (3, 0))
    cache.read([tokens[:9], tokens[:30], tokens[20:23]])
    cache.select([0, 2])
    found = cache.read([tokens[9:11], tokens[23:24]])
    for row, text in enumerate((tokens[:11], tokens[20:24])):
        whole = model.hidden(torch.tensor([text]), (3, 0))[0][0]
        new = found[row, : 2 - row]
        assert (new - whole[-len(new) :]).abs().max() < TOLERANCE


@KINDS
def test_what_texts_begin_with_is_read_once_and_scores_the_same(config, monkeypatch):
    """As the examples of a few-shot task do; the second text's continuation leaves 39 tokens that both can share."""
    model, tokens = perturbed(config), batch(config)[0].tolist()
    readings = [
        Reading((*tokens[:50], 3, 4), ((4, 5), (7,))),
        Reading(tuple(tokens[:41]), ((8, 9),)),
        Reading((*tokens[:45], 1), ((2,),)),
    ]
    sizes = []
    hidden = MoEHuginnModel.hidden
    monkeypatch.setattr(
        MoEHuginnModel,
        "hidden",
        lambda self, x, *_, **kind: sizes.append(tuple(x.shape)) or hidden(self, x, *_, **kind),
    )
    together = TorchLanguageModel(model).log_probabilities(readings, 4)
    assert sizes == [(1, 39), (3, 13)]
    for reading, scores in zip(readings, together, strict=True):
        log_p = model(torch.tensor([reading.tokens]), (4, 0)).logits[0].log_softmax(-1)
        for score, continuation in zip(scores, reading.continuations, strict=True):
            places = log_p[-len(continuation) :]
            expected = [places[i, token].item() for i, token in enumerate(continuation)]
            assert score.log_probabilities == pytest.approx(expected, abs=TOLERANCE)
            assert score.greedy == (places.argmax(-1).tolist() == list(continuation))


def test_a_text_that_outgrows_the_context_is_refused():
    model, tokens = perturbed(replace(DENSE, block_size=64)), batch(DENSE)[0].tolist()
    cache = Cache(model, (1, 0))
    cache.read([tokens])
    with pytest.raises(ValueError, match="a sequence of 65 tokens"):
        cache.read([tokens[:1]])
