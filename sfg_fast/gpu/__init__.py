"""Is a GPU's arithmetic right, and fast? Checks, timing, and what is decided from them."""
