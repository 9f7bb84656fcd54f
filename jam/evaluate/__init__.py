"""Measuring models: what a held-out text or image costs them."""
