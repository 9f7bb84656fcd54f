"""Whether the tokenizers of a model folder are those of its vocabulary."""

from pathlib import Path

from jam.errors import CheckpointError
from jam.tokens.image import ImageTokenizer
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import Vocabulary


def check_tokenizers(path: Path, vocabulary: Vocabulary, text: TextTokenizer, image: ImageTokenizer | None) -> None:
    """Raises CheckpointError where the tokenizers of the folder ``path`` make ids or codes that jam.json has not."""
    words = text.tokenizer.get_vocab_size()
    if words > vocabulary.size:
        raise CheckpointError(
            f"{path}: tokenizer.json has {words} tokens, jam.json names {vocabulary.size} ids; use one pair"
        )
    if image is not None and (image.codebook_size, image.codes_per_image) != (
        vocabulary.codebook_size,
        vocabulary.codes_per_image,
    ):
        raise CheckpointError(
            f"{path}: the image tokenizer makes {image.codes_per_image} codes of {image.codebook_size}, jam.json says "
            f"{vocabulary.codes_per_image} of {vocabulary.codebook_size}; they must belong together"
        )
