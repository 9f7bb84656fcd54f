"""Replies from a model: sampling, the grammar of mixed streams, the cached loop and its slow oracle, events."""
