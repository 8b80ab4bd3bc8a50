"""The check of a GPU: whether the Triton kernels compute right results on it, and how fast they are."""
