"""How tensors are computed fast: compiled programs, CUDA graphs, Philox and matrix products on a GPU."""
