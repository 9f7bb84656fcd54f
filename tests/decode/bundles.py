"""Bundles for decoding tests, made in memory from the tiny parents: random, but eager to draw and to end.

A random model opens an image about once in three hundred tokens. These add a constant to the scores of <break> and
</s>, so that a sampled stream switches back and forth within a few tokens and ends by itself.
"""

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache

from jam.models.cross import JamCrossForCausalLM
from jam.models.cross_config import JamCrossConfig
from jam.models.load import Bundle, load_bundle
from jam.models.readout import Readout, States
from jam.tokens.vocabulary import Vocabulary
from tests.tiny import randomize, tiny_pair, tiny_vocabulary

EAGERNESS = {"eos": 3.0, "begin_image": 5.0}


class EagerReadout:
    """A readout whose text head likes the controls ``eos`` and ``begin_image``."""

    def __init__(self, own: Readout, vocabulary: Vocabulary):
        self.own, self.states, self.codes, self.vocabulary = own, own.states, own.codes, vocabulary
        self.start, self.finish = own.start, own.finish

    def text(self, states: States) -> Tensor:
        return _eager(self.own.text(states), self.vocabulary)


class EagerBundle(Bundle):
    """A bundle whose model likes the controls ``eos`` and ``begin_image``."""

    def logits(self, *args, **kwargs) -> tuple[Tensor, Cache | None]:
        logits_BTV, cache = super().logits(*args, **kwargs)
        return _eager(logits_BTV, self.vocabulary), cache

    def readout(self) -> Readout:
        return EagerReadout(super().readout(), self.vocabulary)


def _eager(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    for name, bonus in EAGERNESS.items():
        logits[..., vocabulary.controls[name]] += bonus
    return logits


def eager(bundle: Bundle) -> EagerBundle:
    return EagerBundle(**{field.name: getattr(bundle, field.name) for field in fields(Bundle) if field.init})


def plain_bundle(folder: Path, dtype: torch.dtype = torch.float64, **changes) -> Bundle:
    """The tiny image parent: one table, both modalities."""
    _, image = tiny_pair(folder, **changes)
    return eager(load_bundle(image, dtype))


def cross_bundle(folder: Path, dtype: torch.dtype = torch.float64) -> Bundle:
    """Two towers with random weights and gates that are far from zero, the image one wider."""
    _, path = tiny_pair(folder)
    bundle = load_bundle(path, dtype)
    vocabulary = tiny_vocabulary(images=True)
    tower = bundle.model.config.to_dict()
    config = JamCrossConfig(
        text_config=tower,
        image_config=tower | {"hidden_size": 48, "word_embed_proj_dim": 48},
        exchanges=[[2, 2], [4, 4]],
        vocabulary=vocabulary.to_json(),
        vocab_size=vocabulary.size,
    )
    bundle.model = JamCrossForCausalLM(config).to(dtype).eval()
    randomize(bundle.model, 7)
    return eager(bundle)
