"""Subword regularisation (Kudo, arXiv 1804.10959): a text cut into tokens at random, in another way in each copy.

A way of cutting a word that has probability P under the unigram model is drawn with a probability ~ P^alpha, among the
NUM_WAYS likeliest ones; words are drawn independently. As the pieces of our vocabularies do not straddle words, the
likeliest ways of all words are together that of the text. Other vocabularies may have pieces that do: those are not
drawn, and the tokens still spell the text.

What is drawn follows from the document's id and the number of the copy alone. They are the key and the counter of
Philox, of which the raw numbers are taken: numpy may draw floats from them in another way one day.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mdseq.data.format import token_dtype
from mdseq.data.tokenizer import SPACE_MARK, Tokenizer

NUM_WAYS = 64
CACHED_WORDS = 2**15  # of some 2 kB each
# Stretches of a text that hold all of it: a word with the spaces before it, spaces that end a line, a line's end. Those
# that are very long are cut, as the likeliest ways to cut them would differ in few places.
_WORDS = re.compile(f"{SPACE_MARK}+|\n| {{0,16}}[^ \n{SPACE_MARK}]{{1,32}}| {{1,16}}")

# Ways to cut a word: their cumulative probabilities but the last, and the bytes of the tokens of each.
_Ways = tuple[Sequence[float], tuple[bytes, ...]]


class SegmentationSampler:
    """Draws tokens for texts. `tokenizer` must be a unigram model; the lower `alpha`, the more varied they are."""

    def __init__(self, tokenizer: Tokenizer, alpha: float) -> None:
        assert alpha > 0
        self._tokenizer = tokenizer
        self._alpha = alpha
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._ways_of = lru_cache(CACHED_WORDS)(self._find_ways)

    def encode_pieces(self, pieces: Iterable[str], document_id: bytes, copy: int) -> Iterator[np.ndarray]:
        """Token ids of a text that arrives in pieces, without special tokens; joined, they spell it exactly.

        Yields an unsigned array a block, like `Tokenizer.encode_pieces`, and holds no more text.

        Args:
            pieces: The text; how it is cut into pieces changes nothing.
            document_id: 16 bytes.
            copy: Number of the copy of the document, from 0.
        """
        philox = np.random.Philox(key=np.frombuffer(document_id, "<u8"), counter=[0, 0, 0, copy])
        for block in self._tokenizer.blocks(pieces):
            words = _WORDS.findall(block)
            uniforms = (philox.random_raw(len(words)) >> 11) * 2.0**-53
            draws = zip(map(self._ways_of, words), uniforms.tolist(), strict=True)
            drawn = [ways[bisect_right(cumulative, uniform)] for (cumulative, ways), uniform in draws]
            yield np.frombuffer(b"".join(drawn), self._dtype)

    def _find_ways(self, word: str) -> _Ways:
        ways = self._tokenizer.segmentations(word, NUM_WAYS)
        edges = np.cumsum([0, *map(len, ways)])
        ids = np.concatenate(ways)
        scores = np.add.reduceat(self._tokenizer.scores[ids], edges[:-1])
        sums = np.exp(self._alpha * (scores - scores.max())).cumsum()
        # The last sum is left out: what is drawn above all others is the last way, whatever was rounded.
        cumulative = array("d", (sums[:-1] / sums[-1]).tobytes())
        tokens = ids.astype(self._dtype)
        content, places = tokens.tobytes(), (edges * tokens.itemsize).tolist()
        return cumulative, tuple(content[start:stop] for start, stop in pairwise(places))
