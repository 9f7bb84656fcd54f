"""Ids and images: one id space, the tokenizers of both modalities, and the way from documents to tokens."""
