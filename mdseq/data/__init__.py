"""From Arrow shards to batches: `format` and `tokenizer` (the contract with the builder), `corpus` (zero-copy
views), `packing` and `order` (which tokens make which row of which step), `batch` and `loader` (tensors).

Nothing is imported here, so that `mdseq.data.format` stays free of torch.
"""
