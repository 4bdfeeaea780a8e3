"""Of several candidates, the one that the others agree with: minimum Bayes risk decoding (Kumar and Byrne, 2004).

    best = argmax_i  1 / (n - 1)  sum over j != i of utility(candidate_i, reference = candidate_j)

DiffuSeq (arXiv 2210.08933, section 4.1) chooses this way, by BLEU.

Shapes: n candidates, v vocabulary, z embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, permutations

import numpy as np
import torch

from mdseq.data.tokenizer import Tokenizer
from mdseq.model.denoiser import Denoiser

# The utility of each candidate (first axis) if each (second axis) were the truth, float64 [n, n]; the diagonal is not
# looked at.
Utility = Callable[[Sequence[str]], np.ndarray]


def bleu(texts: Sequence[str]) -> np.ndarray:
    """Sentence BLEU of sacrebleu, with effective order, as short texts need."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)
    utility_nn = np.zeros((len(texts), len(texts)))
    for i, j in permutations(range(len(texts)), 2):
        utility_nn[i, j] = metric.sentence_score(texts[i], [texts[j]]).score
    return utility_nn


def rouge(texts: Sequence[str]) -> np.ndarray:
    """F of ROUGE-L, which is symmetric; takes time with the square of the texts' lengths."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    utility_nn = np.zeros((len(texts), len(texts)))
    for i, j in combinations(range(len(texts)), 2):
        utility_nn[i, j] = utility_nn[j, i] = scorer.score(texts[j], texts[i])["rougeL"].fmeasure
    return utility_nn


class EmbeddingCosine:
    """Cosine of the means of the model's own token embeddings; 0 for an empty text."""

    def __init__(self, tokenizer: Tokenizer, denoiser: Denoiser) -> None:
        self._tokenizer = tokenizer
        with torch.no_grad():
            self._embedding_vz = denoiser.vocabulary().embedding_vz.double().cpu().numpy()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        mean_nz = np.stack([self._mean(text) for text in texts])
        norm_n1 = np.linalg.norm(mean_nz, axis=1, keepdims=True)
        unit_nz = mean_nz / np.where(norm_n1 == 0, 1, norm_n1)
        return unit_nz @ unit_nz.T

    def _mean(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text)
        return self._embedding_vz[ids].sum(axis=0) / max(len(ids), 1)


def choose(texts: Sequence[str], utility: Utility) -> int:
    """Index of the best candidate; of equally good ones, the first."""
    if len(texts) == 1:
        return 0
    utility_nn = utility(texts)
    np.fill_diagonal(utility_nn, 0)
    return int(utility_nn.sum(axis=1).argmax())


def best_of(written: Iterable[tuple[int, str]], num_candidates: int, utility: Utility) -> Iterator[tuple[int, str]]:
    """Of each `num_candidates` texts whose indices follow one another, the best, when all of them are there.

    Args:
        written: Indices and texts, in any order.
        num_candidates: How many belong together: those of the indices 0 to n - 1, n to 2n - 1 and so on.
        utility: What is compared.

    Yields:
        The index of the group, and its best text.
    """
    waiting: dict[int, dict[int, str]] = {}
    for index, text in written:
        group, place = divmod(index, num_candidates)
        waiting.setdefault(group, {})[place] = text
        if len(waiting[group]) == num_candidates:
            texts = [text for _, text in sorted(waiting.pop(group).items())]
            yield group, texts[choose(texts, utility)]
