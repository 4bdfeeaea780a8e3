"""The candidate that the others agree with is chosen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mdseq.data.tokenizer import Tokenizer
from mdseq.generate.rerank import EmbeddingCosine, best_of, bleu, choose, rouge
from tests.generate.models import tiny_denoiser

CENTRE = "the cat sat on the mat today"
CANDIDATES = [
    "the cat sat on the mat yesterday evening",
    "a dog ran over some hills and far away",
    CENTRE,
    "the cat sat on the mat today again",
    "",
]


@pytest.mark.parametrize("utility", [bleu, rouge])
def test_the_one_in_the_middle_wins(utility) -> None:
    for order in itertools.permutations(CANDIDATES):
        assert order[choose(order, utility)] in (CENTRE, "the cat sat on the mat today again")
    assert choose([CANDIDATES[1], "the cat", "the cat"], utility) == 1


def test_rouge_is_known() -> None:
    """ "a b c d" and "a b x": a common subsequence of 2, precision 2/4, recall 2/3."""
    utility_nn = rouge(["a b c d", "a b x", "q"])
    assert utility_nn[0, 1] == utility_nn[1, 0] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert utility_nn[0, 2] == 0


def test_bleu_takes_the_first_as_the_hypothesis() -> None:
    short, long = "a b c d e", "a b c d e f g h i j"
    utility_nn = bleu([short, long])
    assert utility_nn[0, 1] == pytest.approx(100 * np.exp(1 - 10 / 5))  # all n-grams are right, but it is half as long
    assert utility_nn[1, 0] == pytest.approx(100 * np.prod([5 / 10, 4 / 9, 3 / 8, 2 / 7]) ** 0.25)


def test_embedding_is_the_cosine_of_means(tokenizer: Tokenizer) -> None:
    denoiser = tiny_denoiser(tokenizer.vocab_size)
    texts = ["the river runs", "river the runs", "silver fish and snow", ""]
    utility_nn = EmbeddingCosine(tokenizer, denoiser)(texts)
    embedding = denoiser.embedding.weight.detach().double().numpy()
    means = [embedding[tokenizer.encode(text)].mean(axis=0) for text in texts[:3]]
    for i, j in itertools.product(range(3), range(3)):
        cosine = means[i] @ means[j] / np.linalg.norm(means[i]) / np.linalg.norm(means[j])
        assert utility_nn[i, j] == pytest.approx(cosine)
    assert (utility_nn[3] == 0).all()
    assert choose(["silver fish", "the river runs", "the river runs"], EmbeddingCosine(tokenizer, denoiser)) == 1


def test_a_candidate_does_not_vote_for_itself() -> None:
    """The diagonal is not looked at; of equals the first is taken."""
    utility_nn = np.array([[99.0, 1, 1], [2, 0, 2], [2, 2, 0]])
    assert choose(["a", "b", "c"], lambda texts: utility_nn.copy()) == 1
    assert choose(["a"], lambda texts: np.full((1, 1), np.nan)) == 0


def test_groups_are_chosen_from_when_they_are_whole_in_whatever_order_they_come() -> None:
    texts = ["x", "a b", "a b", "c d", "c d", "y"]
    for order in itertools.permutations(range(6)):
        best = list(best_of(((index, texts[index]) for index in order), 3, rouge))
        assert sorted(best) == [(0, "a b"), (1, "c d")]


def test_of_equals_the_first_by_index_is_taken_whichever_came_first() -> None:
    for order in itertools.permutations(range(3)):
        assert list(best_of(((index, "xyz"[index]) for index in order), 3, rouge)) == [(0, "x")]
