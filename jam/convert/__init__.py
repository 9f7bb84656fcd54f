"""Pickle checkpoints as their owners ship them to folders that jam reads; the one place where pickles are opened."""
