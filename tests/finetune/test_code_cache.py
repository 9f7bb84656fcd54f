"""Codes of images, kept: what is read again is what the tokenizer said."""

import numpy as np
import pytest
from PIL import Image

from finetune.data.code_cache import encode_cached
from jam.tokens.image import ImageTokenizer
from tests.tiny import CODES_PER_IMAGE, tiny_pair


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, np.uint16), (1 << 18, np.uint32)])
def test_the_last_code_of_a_codebook_is_kept_as_it_is(tmp_path, monkeypatch, size, dtype):
    monkeypatch.setenv("JAM_CACHE", str(tmp_path / "cache"))
    tokenizer = ImageTokenizer.load(tiny_pair(tmp_path)[1] / "image_tokenizer")
    monkeypatch.setattr(ImageTokenizer, "codebook_size", size)
    made = []

    def encode(self, images):
        made.append(len(images))
        return np.full((len(images), CODES_PER_IMAGE), size - 1)

    monkeypatch.setattr(ImageTokenizer, "encode", encode)
    found = [encode_cached(tokenizer, ["a", "b"], lambda i: Image.new("RGB", (8, 8))) for _ in range(2)]
    assert all(codes.dtype == dtype and (codes == size - 1).all() and len(codes) == 2 for codes in found)
    assert made == [2]  # the second time they were read
