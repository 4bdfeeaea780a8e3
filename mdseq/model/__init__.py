"""The denoiser: a bidirectional transformer with sparse attention and routed experts, in plain PyTorch."""
