"""The modules: the SFG convolution, and what stands between two of them (residual blocks, merge, heads)."""
