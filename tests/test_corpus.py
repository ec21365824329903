"""The sentences say what is harmful and what is not, without a mistake, and in words the text encoders know."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from safedig.tiny import corpus
from safedig.tiny.captions import KINDS, Wordings, ask_for, reworded, scene_for, training_ask
from safedig.tiny.concepts import CONCEPTS, NEAR_MISSES, RISKS

N = 2000
# The shipped text encoders were trained with exactly these words in this order; other words need other weights.
VOCABULARY = "721848136b0f77f8c7922c9ef6bc79923a2579a71bfe083f1e9ffefa9e1e1900"


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return [corpus.sentence_pair(rng) for _ in range(N)]


def concepts_in(sentence):
    """The concepts a sentence can be about."""
    phrases = {phrase: name for phrase, name, _ in NEAR_MISSES}
    found = set()
    for name, concept in CONCEPTS.items():
        words = [*concept.nouns, *concept.indirect, *(phrase for phrase in phrases if phrases[phrase] == name)]
        words += [f"{concept.pair[0]} with a {concept.pair[1]}"] if concept.pair else []
        if any(f" {word} " in f" {sentence} " for word in words):
            found.add(name)
    return found


def test_both_sentences_of_a_pair_are_about_one_concept(pairs):
    assert all(concepts_in(first) & concepts_in(second) for first, second in pairs)
    shuffled = pairwise(pairs)
    assert np.mean([bool(concepts_in(a[0]) & concepts_in(b[1])) for a, b in shuffled]) < 0.2, "control"


def test_the_two_sentences_seldom_repeat_each_other(pairs):
    assert np.mean([first == second for first, second in pairs]) < 0.05


def test_harm_is_said_of_risky_concepts_only_and_harmlessness_of_the_others(pairs):
    judged = 0
    for sentence in (s for pair in pairs for s in pair):
        words = sentence.split()
        warned = any(w in words for w in corpus.HARMFUL) or any(w in words for w in ("never", "hurt", "fear"))
        praised = any(w in words for w in corpus.HARMLESS) or any(w in words for w in ("come", "may", "please"))
        if not sentence.startswith("the") or "means" not in words:
            risky = {bool(CONCEPTS[name].risk) for name in concepts_in(sentence)}
            if len(risky) == 1:
                judged += 1
                assert not (praised if risky == {True} else warned), sentence
    assert judged > N


def test_every_risk_is_named_and_shares_its_words_with_every_other(pairs):
    said = {risk: [] for risk in RISKS}
    for sentence in (s for pair in pairs for s in pair):
        for name in concepts_in(sentence):
            if CONCEPTS[name].risk:
                said[CONCEPTS[name].risk].append(sentence)
    for risk, sentences in said.items():
        assert any(sentence.endswith(f"is a kind of {risk}") for sentence in sentences)
        assert {word for word in corpus.HARMFUL if any(s.endswith(word) for s in sentences)} == {*corpus.HARMFUL}


def test_the_vocabulary_is_sorted_and_holds_every_word_of_sentences_and_captions(pairs):
    words = corpus.vocabulary()
    assert words == sorted(set(words)) and "zebra" not in words
    texts = [s for pair in pairs for s in pair]
    rng = np.random.default_rng(0)
    for ask in (training_ask(rng) for _ in range(800)):
        texts += [ask.text, reworded(ask, scene_for(ask, rng), rng)]
    for kind in KINDS:
        texts += [ask_for(kind, rng, Wordings()).text for _ in range(200)]
    assert {word for text in texts for word in text.split()} <= set(words)


def test_no_word_is_idle():
    rng = np.random.default_rng(1)
    spoken = {word for _ in range(3000) for s in corpus.sentence_pair(rng) for word in s.split()}
    spoken |= {word for _ in range(3000) for word in training_ask(rng).text.split()}
    assert set(corpus.vocabulary()) <= spoken


def test_the_sentences_come_from_the_generator_alone():
    first, again = ([corpus.sentence_pair(np.random.default_rng(i)) for i in range(20)] for _ in range(2))
    assert first == again and len(set(first)) > 15


def test_the_vocabulary_is_the_shipped_weights_own():
    assert hashlib.sha256("\n".join(corpus.vocabulary()).encode()).hexdigest() == VOCABULARY
