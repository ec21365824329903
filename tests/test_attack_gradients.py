"""White-box attacks: the objective is the flow-matching loss through the steering, and descending it is felt."""

from itertools import islice

import pytest
import torch

from safedig.evaluation.attacks import ATTACKS
from safedig.evaluation.attacks.adaptive import Adaptive
from safedig.evaluation.attacks.embeddings import descent, silence
from safedig.evaluation.attacks.objective import Objective, at_step
from safedig.evaluation.attacks.tokens import TokenSearch, Vocabulary
from safedig.evaluation.methods.text import Text, encode
from tests.lessons import HARMFUL, learnt
from tests.victims import victim

ROW = HARMFUL[0]


@pytest.fixture(scope="module", params=["tiny-flux", pytest.param("tiny-sd3", marks=pytest.mark.slow)])
def ours(request):
    return victim(learnt(request.param, "Repel, contrast decoder")(4.0), model=request.param)


def mean_loss(objective, text, n=16):
    objective.generator.manual_seed(1)
    with torch.no_grad():
        return sum(objective.loss(text).item() for _ in range(n)) / n


def test_a_harmful_picture_is_denoised_better_by_the_words_that_asked_for_it(ours):
    objective = Objective(ours, ROW)
    own, other = (mean_loss(objective, encode(ours.pipe, [text], 16)) for text in (ROW["prompt"], "a cup"))
    assert own < other


def test_the_loss_is_felt_through_the_steering(ours):
    objective, text = Objective(ours, ROW), encode(ours.pipe, [ROW["prompt"]], 16)
    plain = mean_loss(objective, text)
    with ours.acting.apply(ours.pipe):
        assert mean_loss(objective, text) > plain, "steered, the model denoises harm worse"


def test_the_clock_shows_the_step_and_then_what_it_showed(ours):
    before = ours.pipe.scheduler._step_index
    with at_step(ours.pipe.scheduler, 2):
        assert ours.pipe.scheduler.step_index == 2
    assert ours.pipe.scheduler._step_index == before


def test_losses_of_several_texts_are_those_of_each(ours):
    objective = Objective(ours, ROW)
    texts = encode(ours.pipe, [ROW["prompt"], "a cup"], 16)
    with torch.no_grad():
        objective.generator.manual_seed(3)
        both = objective.loss(texts)
        for at in range(2):
            objective.generator.manual_seed(3)
            assert objective.loss(Text(texts.tokens[at : at + 1], texts.pooled[at : at + 1])).item() == pytest.approx(
                both[at].item(), rel=1e-4
            )


def test_descent_makes_the_loss_through_the_steering_smaller(ours):
    start = encode(ours.pipe, ["a cup on the left"], 16)
    with ours.metered() as meter:
        objective = Objective(ours, ROW)
        spent = meter.passes
        batches = list(islice(descent(ours, ROW, objective, start, steps=10, rate=0.1), 2))
        assert meter.passes - spent == 2 * 10 * 3, "a forward and a gradient that counts twice"
    text = batches[-1][0].text
    assert text is not None
    with ours.acting.apply(ours.pipe):
        assert mean_loss(objective, text) < mean_loss(objective, start)


def loudness(ours, text):
    objective = Objective(ours, ROW)
    with torch.no_grad(), ours.reading() as margins, ours.acting.apply(ours.pipe):
        objective.loss(text)
        return float(silence(margins))


def test_who_knows_the_gates_ends_below_them_and_who_does_not_stays_above(ours):
    start = encode(ours.pipe, [ROW["prompt"]], 16)
    ends = {}
    for knows in (True, False):
        batches = islice(descent(ours, ROW, Objective(ours, ROW), start, 15, 0.1, knows_gates=knows), 6)
        ends[knows] = loudness(ours, list(batches)[-1][0].text)
    assert loudness(ours, start) > 0.1 and ends[True] < 0.1 * loudness(ours, start) and ends[True] < ends[False]


def test_the_vocabulary_is_one_token_a_word_for_every_encoder(ours):
    vocabulary = Vocabulary(ours.pipe)
    assert {"knife", "cup", "dagger"} <= set(vocabulary.words) and len(vocabulary.encoders) == len(vocabulary.rows)
    for (tokenizer, _), rows in zip(vocabulary.encoders, vocabulary.rows, strict=True):
        at = vocabulary.words.index("knife")
        assert tokenizer is not None and int(rows[at]) in tokenizer("a knife")["input_ids"]


def test_exchanges_that_the_gradient_ranks_make_the_loss_smaller(ours):
    """From "a cup" towards the picture of the hazard, with nothing on the model: three exchanges are felt."""
    plain = victim(model="tiny-flux" if "Flux" in type(ours.pipe).__name__ else "tiny-sd3")
    vocabulary, objective = Vocabulary(plain.pipe), Objective(plain, ROW)
    losses = []
    words = ["a", "cup"]
    for _ in range(3):
        objective.generator.manual_seed(0)
        words = TokenSearch()._exchanged(plain, objective, vocabulary, words)
        losses.append(mean_loss(objective, encode(plain.pipe, [" ".join(words)], 16)))
    assert losses[-1] < mean_loss(objective, encode(plain.pipe, ["a cup"], 16))


def test_token_search_spends_what_it_says_and_ends_in_words(ours):
    with ours.metered() as meter:
        found = list(islice(ATTACKS["token search"].candidates(ours, ROW), 2))
    tried = 1 + 8
    assert meter.passes == ours.passes_an_image + 2 * (1 + 2 + tried)  # its picture; two exchanges
    words = found[1][0].prompt.split()
    assert len(words) == len(ROW["prompt"].split()) + 2 and found[1][0].text is None


def test_adaptive_draws_the_most_silent_of_the_wordings_first(ours):
    batches = list(islice(ATTACKS["adaptive"].candidates(ours, ROW), 3))
    assert [one.prompt for one in batches[0]] == [ROW["prompt"]] and len(batches[1]) == 4
    attack, objective = Adaptive(), Objective(ours, ROW)
    chosen, first = ([c.prompt for c in batch] for batch in (batches[1], batches[0]))
    loud = attack._loudness(ours, objective, encode(ours.pipe, [*chosen, *first], 16))
    assert loud[:4].max() <= loud[4] and loud[:4].tolist() == sorted(loud[:4].tolist())
    assert batches[2][0].text is not None
