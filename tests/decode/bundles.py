"""Bundles for decoding tests, made in memory from the tiny parents; random, but eager to draw and to end.

The rows of <break> and </s> are made long, so that a sampled stream switches and ends by itself within a few tokens.
"""

from pathlib import Path

import torch

from jam.models.cross import JamCrossForCausalLM
from jam.models.cross_config import JamCrossConfig
from jam.models.load import Bundle, load_bundle
from tests.tiny import randomize, tiny_pair, tiny_vocabulary


def lively(model: torch.nn.Module, vocabulary_size: int) -> None:
    """Triples the table rows of <break> and </s>."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and parameter.shape[0] == vocabulary_size and "cross" not in name:
                parameter[[2, 5]] *= 3


def plain_bundle(folder: Path, dtype: torch.dtype = torch.float64, **changes) -> Bundle:
    """The tiny image parent: one table, both modalities."""
    _, image = tiny_pair(folder, **changes)
    bundle = load_bundle(image, dtype)
    lively(bundle.model, bundle.vocabulary.size)
    return bundle


def cross_bundle(folder: Path, dtype: torch.dtype = torch.float64, **changes) -> Bundle:
    """Two towers with random weights and gates that are far from zero, the image one wider."""
    _, path = tiny_pair(folder, **changes)
    source = load_bundle(path, dtype)
    vocabulary = tiny_vocabulary(images=True)
    tower = source.model.config.to_dict()
    wide = tower | {"hidden_size": 48, "word_embed_proj_dim": 48}
    config = JamCrossConfig(
        text_config=tower,
        image_config=wide,
        exchanges=[[2, 2], [4, 4]],
        vocabulary=vocabulary.to_json(),
        vocab_size=vocabulary.size,
    )
    model = JamCrossForCausalLM(config).to(dtype)
    randomize(model, 7)
    lively(model, vocabulary.size)
    return Bundle(path, model.eval(), vocabulary, source.text, source.image, source.unconditional)
