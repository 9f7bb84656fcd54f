"""Merging: a recipe and two parents become one checkpoint folder."""
