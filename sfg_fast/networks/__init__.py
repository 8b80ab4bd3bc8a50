"""Whole networks, and controls that act on all SFG layers of a network."""
