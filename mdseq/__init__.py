"""mdseq trains diffusion language models on long documents."""

__version__ = "0.1.0"
