"""Checkpoints as their owners lay them out."""
