"""Chameleon's and Anole's id space, read off the words of its tokenizer.

An image token is ``IMGIMG``, the codebook index with letters A to J for digits, and ``Z``; ``<racm3:break>`` begins an
image and ``<eoss>`` ends one. Imports no torch.
"""

import re
from itertools import groupby

import numpy as np

from jam.errors import CheckpointError
from jam.tokens.vocabulary import Span, Vocabulary

_IMAGE = re.compile(r"IMGIMG([A-J]+)Z")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_CONTROLS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "begin_image": "<racm3:break>", "end_image": "<eoss>"}


def chameleon_vocabulary(words: dict[str, int], size: int) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary of ``size`` ids, and int64 [image ids]: the code that image id ``start + k`` stands for.

    The number of codes per image is the image tokenizer's to say; one image id each stands here until then.

    Raises:
        CheckpointError: image tokens that are missing, not contiguous or not one for each code; no control token of a
            name; ids beyond ``size``.
    """
    codes = {
        index: int(match[1].translate(_DIGITS)) for word, index in words.items() if (match := _IMAGE.fullmatch(word))
    }
    ids = np.array(sorted(codes))
    if not len(ids) or ids[-1] - ids[0] + 1 != len(ids) or sorted(codes.values()) != list(range(len(ids))):
        raise CheckpointError(
            f"tokenizer: {len(ids)} image tokens IMGIMG...Z; one for each code and all in a row are required, use the "
            "tokenizer of a Chameleon"
        )
    if absent := [word for word in _CONTROLS.values() if word not in words]:
        raise CheckpointError(f"tokenizer: no token {absent[0]}; Chameleon's is required, use the model's own")
    if max(words.values()) >= size:
        raise CheckpointError(f"tokenizer: id {max(words.values())}, the model has {size} rows; use the model's own")
    kinds = ["control"] * size
    for word, index in words.items():
        if index in codes:
            kinds[index] = "image"
        elif not (word.startswith("<") and word.endswith(">") and len(word) > 2):
            kinds[index] = "text"
    spans, at = [], 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        spans.append(Span(kind, at, at + length))
        at += length
    controls = {name: words[word] for name, word in _CONTROLS.items()}
    return Vocabulary(tuple(spans), controls, len(ids)), np.array([codes[index] for index in ids.tolist()])
