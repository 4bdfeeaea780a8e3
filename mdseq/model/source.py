"""Which tokens of a source are global: one rule, for training and for generation."""

from __future__ import annotations

from torch import Tensor

from mdseq.sparse import Documents


def mark_source(documents: Documents, target_bl: Tensor, num_source_global: int) -> Documents:
    """The same documents, with the leading `num_source_global` tokens of each marked global where they are source.

    A source that is shorter has all of its tokens marked; of what is to be generated, none is.
    """
    if not num_source_global:
        return documents
    return Documents(
        documents.document_bl,
        documents.position_bl,
        documents.num_documents,
        global_bl=(documents.position_bl < num_source_global) & ~target_bl & documents.real_bl,
        num_global_tokens=min(documents.document_bl.shape[1], documents.num_documents * num_source_global),
    )
