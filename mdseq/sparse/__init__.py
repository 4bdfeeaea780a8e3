"""Sparse attention as a small library: a pattern as data, one call, engines that agree.

layout = documents.layout(num_global=8)
out_bshd = attend(q_bshd, k_bshd, v_bshd, Pattern(window=256, dilations=(2,)), layout)
"""

from mdseq.sparse.attend import attend
from mdseq.sparse.documents import NO_DOCUMENT, Documents, Layout
from mdseq.sparse.pattern import Pattern

__all__ = ["NO_DOCUMENT", "Documents", "Layout", "Pattern", "attend"]
