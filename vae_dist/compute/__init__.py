"""Fast computation of tensors: compiled programs, CUDA graphs, and Philox and matrix products on a GPU."""
