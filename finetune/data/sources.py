"""Sources: what a recipe's ``data.mix`` names, as documents that can be asked for by (epoch, index).

Stages: read and check the raw lines (every bad line is reported with file and line) -> turn every image into codes
once, cached by the hash of tokenizer and images -> on demand, render document ``index`` of ``epoch`` to Tokens. What
varies between epochs (the wording of a caption) is drawn from a generator keyed by (seed, epoch, index).
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data import mini_data
from finetune.data.code_cache import Progress, encode_cached
from finetune.data.readers import FORMS, Context, Media, rows_of
from finetune.data.readers.containers import files_of
from finetune.data.shards import RECORD, Shards, open_shards
from finetune.recipe import Source as SourceRecipe
from jam.assets import DATA
from jam.digest import sha256_of
from jam.document import MOST_WEIGHT, CodesPart, Document, ImagePart, TextPart, from_messages
from jam.errors import DataError
from jam.models.load import Bundle
from jam.tokens.image import ImageTokenizer
from jam.tokens.render import IMAGE_HEAD, Tokens, render
from jam.tokens.vocabulary import IMAGE, TEXT


def keyed(*keys: int) -> np.random.Generator:
    """A generator that depends only on the keys (Philox under a SeedSequence)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(keys)))


@dataclass(frozen=True)
class Source:
    """Documents of one kind, ready to render.

    ``make(index, form_draw)`` gives the document, or its tokens where it was rendered before; ``form_draw`` in [0, 1)
    chooses among wordings. ``conditioned``: CM3 and condition drop apply (plain documents; conversations stay causal).
    ``joined``: up to so many documents make one, the last of them being the one asked for.
    ``skip``: documents left out. ``content``: SHA-256 of what the documents are made from, images included.
    ``where(index)`` is the file and line of a document, empty where there is none.
    """

    name: str
    size: int
    make: Callable[[int, float], Document | Tokens]
    conditioned: bool
    loss_text: float
    loss_image: float
    joined: int = 1
    skip: frozenset[int] = frozenset()
    content: str = ""
    where: Callable[[int], str] = lambda index: ""

    def earlier(self, index: int, draw: float) -> Iterator[Document]:
        """What may be said before a document: 0 to ``joined`` - 1 others, each number as often, none of them twice."""
        if self.joined == 1:
            return
        generator = keyed(index, int(draw * 2**53))
        count = min(int(generator.integers(self.joined)), self.size - 1)
        for step in generator.choice(self.size - 1, count, replace=False).tolist() if count else ():
            other, own = (index + 1 + step) % self.size, float(generator.random())
            if other not in self.skip:
                yield self.make(other, own)


def _image_tokenizer(bundle: Bundle, name: str) -> ImageTokenizer:
    if bundle.image is None:
        raise DataError(f"data.mix.{name} has images, {bundle.path} has no image tokenizer; use a model that has one")
    return bundle.image


def _caption_document(caption: str, codes: np.ndarray, image_first: bool) -> Document:
    parts = (TextPart(caption), CodesPart(tuple(codes.tolist())))
    return Document(parts[::-1] if image_first else parts)


def _text_source(texts: tuple[str, ...]) -> tuple[int, Callable[[int, float], Document]]:
    return len(texts), lambda index, draw: Document((TextPart(texts[index]),))


def mini_codes(tokenizer: ImageTokenizer, files: list[str], progress: Progress | None = None) -> dict[str, np.ndarray]:
    """Codes of shipped images by file name, cached; a rebuilt image set does not meet the codes of another."""
    archive, version = mini_data.ImageArchive(), mini_data.image_set_digest()
    keys = [f"{version}/{file}" for file in files]
    codes = encode_cached(tokenizer, keys, lambda i: archive.open(files[i]), progress)
    return dict(zip(files, codes, strict=True))


def _train_codes(bundle: Bundle, name: str, progress: Progress | None) -> dict[str, np.ndarray]:
    """Of every shipped train image: captions and conversations share one cache."""
    files = [row["file"] for row in mini_data.image_rows() if row["split"] == "train"]
    return mini_codes(_image_tokenizer(bundle, name), files, progress)


def _mini_captions(
    bundle: Bundle, name: str, progress: Progress | None
) -> tuple[int, Callable[[int, float], Document]]:
    rows = [row for row in mini_data.image_rows() if row["split"] == "train"]
    codes = _train_codes(bundle, name, progress)

    def make(index: int, draw: float) -> Document:
        # most captions name label and style, the rest share the other forms; 1 in 8 puts the image first
        form = mini_data.STYLED if draw < 0.7 else (0, 2, 3)[min(2, int((draw - 0.7) * 10))]
        caption = mini_data.caption_for(rows[index], form)
        return _caption_document(caption, codes[rows[index]["file"]], (draw * 64) % 1 < 0.125)

    return len(rows), make


def _mini_scenes(
    bundle: Bundle, name: str, progress: Progress | None, limit: int | None
) -> tuple[int, Callable[[int, float], Document]]:
    archive, scenes = mini_data.ImageArchive(), mini_data.scenes("train")[:limit]
    keys = [f"{mini_data.image_set_digest()}/{scene.key}" for scene in scenes]
    codes = encode_cached(_image_tokenizer(bundle, name), keys, lambda i: scenes[i].image(archive), progress)
    return len(scenes), lambda index, draw: _caption_document(scenes[index].caption, codes[index], False)


def _mini_conversations(bundle: Bundle, name: str, progress: Progress | None):
    codes, rows = _train_codes(bundle, name, progress), mini_data.conversations("train")

    def make(index: int, draw: float) -> Document:
        return from_messages(rows[index]["messages"], lambda path: tuple(codes[path].tolist()))

    return len(rows), make


_READERS = {"text": "text", "captions": "captions", "conversations": "messages"}  # as jam data prepare names them
_ENCODED = Image.new("RGB", (1, 1))  # stands for pixels that are no longer held


def _file_source(recipe: SourceRecipe, bundle: Bundle, name: str, progress: Progress | None) -> Source:
    """A file or folder by the reader of ``jam data prepare``; images wait at the tokenizer's size, as photographs they
    would fill the memory."""
    path = Path(recipe.path)
    if recipe.kind not in _READERS:
        raise DataError(f"data.mix.{name}: kind {recipe.kind!r} exists only in the shipped data; set path to 'mini'")
    if not path.exists():
        raise DataError(f"{path}: no such data file; give a file of rows, a folder of them, or 'mini'")
    media = Media(
        path if path.is_dir() else path.parent, keep=lambda i: i if bundle.image is None else bundle.image.fit(i)
    )
    documents, places = _read_rows(path, _READERS[recipe.kind], Context(media))
    images = [part.image for d in documents for part in d.parts if isinstance(part, ImagePart)]
    keys = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    none = np.zeros((0, 1), np.uint16)
    codes = encode_cached(_image_tokenizer(bundle, name), keys, images.__getitem__, progress) if images else none
    counts = [sum(isinstance(part, ImagePart) for part in d.parts) for d in documents]
    firsts = np.cumsum([0, *counts]).tolist()
    bare = [
        Document(tuple(replace(p, image=_ENCODED) if isinstance(p, ImagePart) else p for p in d.parts))
        for d in documents
    ]

    def make(index: int, draw: float) -> Document:
        rows = codes[firsts[index] : firsts[index + 1]].tolist()
        return bare[index].with_codes(lambda some: [CodesPart(tuple(row)) for row in rows])

    content = hashlib.sha256("".join([*map(sha256_of, files_of(path)), *keys]).encode()).hexdigest()
    return _of(name, recipe, len(bare), make, content, places.__getitem__)


def _read_rows(path: Path, reader: str, context: Context) -> tuple[list[Document], list[str]]:
    """Every row as a document, and where it stands; collects all bad rows before raising."""
    good, places, bad = [], [], []
    for row in rows_of(path):
        try:
            fields = row.fields()
            if fields is not None:
                good.append(FORMS[reader](fields, context))
                places.append(row.where)
        except DataError as error:
            bad.append(f"{row.where}: {error}")
    if bad:
        more = f"\n... and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise DataError("\n".join(bad[:20]) + more)
    if not good:
        raise DataError(f"{path}: no documents; at least one is required")
    return good, places


def _shard_source(recipe: SourceRecipe, bundle: Bundle, name: str) -> Source:
    """A prepared folder. Hashes of its files are the business of ``jam data check``; what is read is looked at."""
    shards = open_shards(Path(recipe.path))
    shards.check_model(bundle.path, bundle.vocabulary, bundle.image)
    kinds = bundle.vocabulary.kinds()
    content = sha256_of(Path(recipe.path) / RECORD)  # which has the hashes of all the others
    conditioned = not shards.counts.conversations

    def make(index: int, draw: float) -> Tokens:
        return _sound(shards, index, kinds)

    return _of(name, recipe, len(shards), make, content, shards.where, conditioned)


def _sound(shards: Shards, index: int, kinds: np.ndarray) -> Tokens:
    """A prepared document. Raises DataError where it is none of this vocabulary: a table would be read beyond its
    end, or a weight that is no number spoil the run."""
    tokens = shards.tokens(index)
    beyond = (tokens.ids < 0) | (tokens.ids >= len(kinds))
    if not len(tokens) or beyond.any():
        what = f"id {int(tokens.ids[beyond][0])} of a vocabulary of {len(kinds)}" if len(tokens) else "no tokens"
    elif not ((tokens.weights >= 0) & (tokens.weights <= MOST_WEIGHT)).all():  # false of what is no number
        what = "a loss weight that is negative, too great or no number"
    elif (kinds[tokens.ids] == np.where(tokens.heads == IMAGE_HEAD, TEXT, IMAGE)).any() or (
        tokens.heads > IMAGE_HEAD
    ).any():
        what = "a token under the wrong head"
    else:
        return tokens
    raise DataError(f"{shards.where(index)} has {what}; altered since it was written, run jam data check")


def _mini_source(recipe: SourceRecipe, bundle: Bundle, name: str, progress: Progress | None) -> Source:
    if recipe.kind == "text":
        size, make = _text_source(mini_data.texts("train"))
    elif recipe.kind == "captions":
        size, make = _mini_captions(bundle, name, progress)
    elif recipe.kind == "scenes":
        size, make = _mini_scenes(bundle, name, progress, recipe.limit)
    else:
        size, make = _mini_conversations(bundle, name, progress)
    content = hashlib.sha256("".join(sha256_of(path) for path in sorted(DATA.glob("*.*"))).encode()).hexdigest()
    return _of(name, recipe, size, make, content, lambda index: "")


def _of(
    name: str,
    recipe: SourceRecipe,
    size: int,
    make: Callable[[int, float], Document | Tokens],
    content: str,
    where: Callable[[int], str],
    conditioned: bool | None = None,
) -> Source:
    """Raises DataError for documents left out that are not there, or all of them."""
    size = size if recipe.limit is None else min(size, recipe.limit)
    skip = frozenset(recipe.skip)
    if skip and max(skip) >= size:
        raise DataError(
            f"data.mix.{name}: skip names document {max(skip)} of {size:,}, which are counted from 0; remove it"
        )
    if len(skip) == size:
        raise DataError(f"data.mix.{name}: skip names every document; one is required, remove the source instead")
    if conditioned is None:
        conditioned = recipe.kind != "conversations"
    weights = recipe.loss
    return Source(name, size, make, conditioned, weights.text, weights.image, recipe.joined, skip, content, where)


def open_source(name: str, recipe: SourceRecipe, bundle: Bundle, progress: Progress | None = None) -> Source:
    """Reads and checks one entry of ``data.mix``.

    Raises:
        DataError: bad rows (all of them, with file and line), missing or unreadable images, no documents.
    """
    if recipe.kind == "shards":
        return _shard_source(recipe, bundle, name)
    read = _mini_source if recipe.path == "mini" else _file_source
    return read(recipe, bundle, name, progress)


def _rendered(source: Source, bundle: Bundle, document: Document, index: int, draw: float, seq_len: int) -> Tokens:
    """A document after those that are joined to it, as many as there is room for."""
    tokens = render(document, bundle.vocabulary, bundle.text)
    for other in source.earlier(index, draw):
        if (other.parts[-1].role, document.parts[0].role) != ("assistant", "user"):
            continue  # two turns of one speaker would run into each other
        longer = render(Document((*other.parts, *document.parts)), bundle.vocabulary, bundle.text)
        if len(longer) > seq_len:
            break
        document, tokens = Document((*other.parts, *document.parts)), longer
    return tokens


def pieces(source: Source, bundle: Bundle, index: int, draw: float, seq_len: int) -> list[Tokens]:
    """Document ``index`` as tokens, in pieces of at most ``seq_len``; errors as :func:`cut`."""
    return list(cut(source, bundle, index, draw, seq_len, lambda document: 0))


def cut(
    source: Source, bundle: Bundle, index: int, draw: float, seq_len: int, growth: Callable[[Tokens], int]
) -> Iterator[Tokens]:
    """Document ``index`` as tokens, in pieces that leave room to grow within ``seq_len``; only text is ever cut.

    Args:
        growth: asked before each piece, with the whole document, how many tokens it will grow by; a piece keeps half
            of ``seq_len`` whatever it says, as one with images keeps all.

    Raises:
        DataError: a document with images is longer than ``seq_len``.
    """
    made = source.make(index, draw)
    tokens = made if isinstance(made, Tokens) else _rendered(source, bundle, made, index, draw, seq_len)
    factors = np.where(tokens.heads == IMAGE_HEAD, source.loss_image, source.loss_text).astype(np.float32)
    tokens = Tokens(tokens.ids, tokens.heads, tokens.weights * factors, tokens.segments)
    limit = seq_len - min(growth(tokens), seq_len // 2)
    whole = bool((tokens.heads == IMAGE_HEAD).any())
    if len(tokens) <= (seq_len if whole else limit):
        yield tokens
        return
    if whole:
        raise DataError(
            f"data.mix.{source.name}: document {index} has {len(tokens)} tokens with its images; "
            f"data.seq_len {seq_len} must hold it whole, raise data.seq_len"
        )
    bos, at = tokens.ids[:1], 1  # every later piece starts with <s> again and loses no token
    while True:
        stop = min(at + limit - 1, len(tokens))
        stop -= stop == len(tokens) - 1 and stop > at + 1  # </s> alone would be learnt as an empty document
        yield _with_bos(tokens, at, stop, bos)
        if stop == len(tokens):
            return
        at, limit = stop, seq_len - min(growth(tokens), seq_len // 2)


def _with_bos(tokens: Tokens, start: int, stop: int, bos: np.ndarray) -> Tokens:
    part = slice(start, stop)
    return Tokens(
        np.concatenate([bos, tokens.ids[part]]),
        np.concatenate([np.zeros(1, np.uint8), tokens.heads[part]]),
        np.concatenate([np.zeros(1, np.float32), tokens.weights[part]]),
        np.concatenate([np.full(1, -1, np.int32), tokens.segments[part]]),
    )
