"""Whole networks, and the controls that act on all SFG layers of one."""
