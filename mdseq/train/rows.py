"""Which rows a run trains on, and in what order: packing, mixture and shuffle as its spec asks for them."""

from __future__ import annotations

from dataclasses import dataclass

from mdseq.data.corpus import Corpus
from mdseq.data.mixture import MixedOrder, mixture_shares
from mdseq.data.order import Order, RowOrder
from mdseq.data.packing import DocumentPacking, JoinedPacking, Packing, SplitPacking, WholePacking
from mdseq.errors import UserError
from mdseq.spec import RunSpec

# With whole documents, the most that a row may hold: it bounds the number of global slots.
MAX_DOCUMENTS_PER_ROW = 64


@dataclass(frozen=True)
class Rows:
    """The rows of a run.

    Attributes:
        packing: What each row holds.
        order: Which rows each step takes.
        parts: The packing of each source of a mixture, or of all sources together, under a title.
    """

    packing: Packing
    order: Order
    parts: dict[str, DocumentPacking]

    @classmethod
    def of(cls, corpus: Corpus, spec: RunSpec) -> Rows:
        """Plan the rows. Raises UserError: the packing does not suit the documents, or the mixture the sources."""
        shares = mixture_shares(corpus, spec.data.mixture)
        if not shares:
            packing = _pack(corpus, spec, range(corpus.num_documents))
            order = RowOrder(packing.num_rows, spec.seed, spec.data.shuffle_window)
            return cls(packing, order, {"all sources": packing})
        packings = [_pack(corpus, spec, corpus.sources[name]) for name in shares]
        num_rows = [packing.num_rows for packing in packings]
        mixed = MixedOrder(num_rows, list(shares.values()), spec.seed, spec.data.shuffle_window)
        titles = [f"{name}, {float(share):.1%} of the rows read" for name, share in shares.items()]
        return cls(JoinedPacking(packings), mixed, dict(zip(titles, packings, strict=True)))

    def describe(self) -> str:
        """What the packing makes of the documents, a line for each source of a mixture."""
        return "\n".join(f"{title}: {packing.report()}" for title, packing in self.parts.items())


def _pack(corpus: Corpus, spec: RunSpec, documents: range) -> DocumentPacking:
    if spec.data.packing == "whole":
        return WholePacking(corpus, spec.data.row_length, MAX_DOCUMENTS_PER_ROW, documents)
    if corpus.manifest.kind == "pair":
        raise UserError(
            "data.packing = split would cut sources from their targets, and this dataset holds pairs: "
            "set data.packing=whole"
        )
    return SplitPacking(corpus, spec.data.row_length, documents)
