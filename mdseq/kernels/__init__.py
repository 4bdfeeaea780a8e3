"""Operations that a GPU would spend its time on moving memory for, each a function that works on any device."""

from mdseq.kernels.grouped import grouped_linear
from mdseq.kernels.norm import add_norm
from mdseq.kernels.rotate import rotate
from mdseq.kernels.rows import combine, dispatch
from mdseq.kernels.softmax import softmax_numerators, softmax_slope
from mdseq.kernels.split import split_linear
from mdseq.kernels.swiglu import swiglu

__all__ = [
    "add_norm", "combine", "dispatch", "grouped_linear", "rotate", "softmax_numerators", "softmax_slope",
    "split_linear", "swiglu",
]  # fmt: skip
