"""Sources: what a recipe's ``data.mix`` names, as documents that can be asked for by (epoch, index).

Stages: read and check the raw lines (every bad line is reported with file and line) -> turn every image into codes
once, cached by the hash of tokenizer and images -> on demand, render document ``index`` of ``epoch`` to Tokens. What
varies between epochs (the wording of a caption) is drawn from a generator keyed by (seed, epoch, index).
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
from PIL import Image

from finetune import mini_data
from finetune.readers.lines import parse_line, text_field
from finetune.readers.media import open_media
from finetune.recipe import Source as SourceRecipe
from finetune.shards import hash_network, open_shards
from jam.assets import cache_dir
from jam.document import CodesPart, Document, ImagePart, TextPart, from_messages
from jam.errors import DataError
from jam.models.load import Bundle
from jam.tokens.image import ImageTokenizer
from jam.tokens.render import IMAGE_HEAD, Tokens, render

Progress = Callable[[str, int, int], None]  # what, done, total


def keyed(*keys: int) -> np.random.Generator:
    """A generator that depends only on the keys (Philox under a SeedSequence)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(keys)))


@dataclass(frozen=True)
class Source:
    """Documents of one kind, ready to render.

    ``make(index, form_draw)`` gives the document, or its tokens where it was rendered before; ``form_draw`` in [0, 1)
    chooses among wordings. ``conditioned``: CM3 and condition drop apply (plain documents; conversations stay causal).
    ``joined``: up to so many documents make one, the last of them being the one asked for.
    """

    name: str
    size: int
    make: Callable[[int, float], Document | Tokens]
    conditioned: bool
    loss_text: float
    loss_image: float
    joined: int = 1

    def earlier(self, index: int, draw: float) -> Iterator[Document]:
        """What may be said before a document: 0 to ``joined`` - 1 others, each number as often, none of them twice."""
        generator = keyed(index, int(draw * 2**53))
        count = min(int(generator.integers(self.joined)), self.size - 1)
        for step in generator.permutation(min(self.size - 1, 1 << 16))[:count].tolist():
            yield self.make((index + 1 + step) % self.size, float(generator.random()))


def encode_cached(
    tokenizer: ImageTokenizer, keys: list[str], open_one: Callable[[int], Image.Image], progress: Progress | None = None
) -> np.ndarray:
    """Codes uint16 [N, codes_per_image] of N images, cached by the tokenizer's weights and the images' keys."""
    fingerprint = hash_network(tokenizer)
    for key in keys:
        fingerprint.update(key.encode() + b"\0")
    path = cache_dir() / f"codes-{fingerprint.hexdigest()[:24]}.npy"
    if (cached := _read_codes(path, (len(keys), tokenizer.codes_per_image), tokenizer.codebook_size)) is not None:
        return cached
    chunks = []
    for at in range(0, len(keys), 64):
        chunks.append(tokenizer.encode([open_one(i) for i in range(at, min(at + 64, len(keys)))]).astype(np.uint16))
        if progress:
            progress("tokenising images", min(at + 64, len(keys)), len(keys))
    codes = np.concatenate(chunks) if chunks else np.zeros((0, tokenizer.codes_per_image), np.uint16)
    _write_codes(path, codes)
    return codes


def _read_codes(path: Path, shape: tuple[int, int], codebook_size: int) -> np.ndarray | None:
    """Cached codes; None if there are none, or the file is damaged, which a power cut can do: they are made anew."""
    try:
        with path.open("rb") as handle:
            codes = np.lib.format.read_array(handle, allow_pickle=False)  # np.load would also open archives
    except (FileNotFoundError, EOFError, ValueError, TokenError, MemoryError):  # numpy's ways to say damaged
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the cache must be readable, or set JAM_CACHE to another") from None
    fits = codes.shape == shape and codes.dtype == np.uint16 and (codes < codebook_size).all()
    return codes if fits else None


def _write_codes(path: Path, codes: np.ndarray) -> None:
    """Raises DataError, and leaves nothing, when the cache cannot be written."""
    temporary = path.with_suffix(f".tmp-{os.getpid()}.npy")
    try:
        np.save(temporary, codes)
        temporary.replace(path)
    except OSError as error:  # numpy reports a full disk without an error number
        raise DataError(
            f"{path}: the codes of the images could not be kept ({error.strerror or 'disk full'}); room for "
            f"{codes.nbytes} bytes is required, free some or set JAM_CACHE to another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


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


def _read_lines(path: Path, check: Callable[[dict], object]) -> list:
    """Applies ``check`` to every JSON line; collects all bad lines before raising."""
    if not path.is_file():
        raise DataError(f"{path}: no such data file; give a .jsonl file or 'mini'")
    good, bad = [], []
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                row = parse_line(raw, number)
                if row is not None:
                    good.append(check(row))
            except DataError as error:
                bad.append(f"{path}:{number}: {error}")
    if bad:
        more = f"\n... and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise DataError("\n".join(bad[:20]) + more)
    if not good:
        raise DataError(f"{path}: no documents; at least one line is required")
    return good


def _file_source(recipe: SourceRecipe, bundle: Bundle, name: str, progress: Progress | None):
    path = Path(recipe.path)
    root = path.parent
    if recipe.kind == "text":
        return _text_source(tuple(_read_lines(path, lambda row: text_field(row, "text"))))
    if recipe.kind == "captions":
        tokenizer = _image_tokenizer(bundle, name)

        def pair(row: dict) -> tuple[str, Image.Image]:
            return text_field(row, "caption"), tokenizer.fit(open_media(root, text_field(row, "image")))

        pairs = _read_lines(path, pair)  # at the tokenizer's size: photographs as they are would fill the memory
        keys = [hashlib.sha256(image.tobytes()).hexdigest() for _, image in pairs]
        codes = encode_cached(tokenizer, keys, lambda i: pairs[i][1], progress)
        return len(pairs), lambda index, draw: _caption_document(pairs[index][0], codes[index], False)
    if recipe.kind == "conversations":

        def opened(file: str) -> Image.Image:
            image = open_media(root, file)
            return image if bundle.image is None else bundle.image.fit(image)

        def conversation(row: dict) -> Document:
            if row.get("images"):  # else they would be lost in silence, and their <image> tags learnt as text
                raise DataError(
                    "field 'images' is not read; name each image where it stands: {type: image, path} in content"
                )
            document = from_messages(row.get("messages"), opened)
            if not any(part.loss for part in document.parts):
                raise DataError("no turn of the assistant, so nothing to learn; add one or remove the line")
            return document

        documents = _read_lines(path, conversation)
        images = [part.image for d in documents for part in d.parts if isinstance(part, ImagePart)]
        keys = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        codes = iter(
            encode_cached(_image_tokenizer(bundle, name), keys, images.__getitem__, progress) if images else ()
        )
        ready = [d.with_codes(lambda some: [CodesPart(tuple(next(codes).tolist())) for _ in some]) for d in documents]
        return len(ready), lambda index, draw: ready[index]
    raise DataError(f"data.mix.{name}: kind {recipe.kind!r} exists only in the shipped data; set path to 'mini'")


def open_source(name: str, recipe: SourceRecipe, bundle: Bundle, progress: Progress | None = None) -> Source:
    """Reads and checks one entry of ``data.mix``.

    Raises:
        DataError: bad lines (all of them, with file and line), missing or unreadable images, no documents.
    """
    conditioned = recipe.kind != "conversations"
    if recipe.kind == "shards":
        shards = open_shards(Path(recipe.path))
        shards.check_model(bundle.path, bundle.vocabulary, bundle.image)
        size, make, conditioned = len(shards), lambda index, draw: shards.tokens(index), not shards.counts.conversations
    elif recipe.path != "mini":
        size, make = _file_source(recipe, bundle, name, progress)
    elif recipe.kind == "text":
        size, make = _text_source(mini_data.texts("train"))
    elif recipe.kind == "captions":
        size, make = _mini_captions(bundle, name, progress)
    elif recipe.kind == "scenes":
        size, make = _mini_scenes(bundle, name, progress, recipe.limit)
    else:
        size, make = _mini_conversations(bundle, name, progress)
    if recipe.limit is not None:
        size = min(size, recipe.limit)
    return Source(name, size, make, conditioned, recipe.loss.text, recipe.loss.image, recipe.joined)


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
    return list(cut(source, bundle, index, draw, seq_len, lambda: 0))


def cut(
    source: Source, bundle: Bundle, index: int, draw: float, seq_len: int, growth: Callable[[], int]
) -> Iterator[Tokens]:
    """Document ``index`` as tokens, in pieces that leave room to grow within ``seq_len``; only text is ever cut.

    Args:
        growth: asked before each piece how many tokens it will grow by; a piece keeps half of ``seq_len`` whatever it
            says, as one with images keeps all.

    Raises:
        DataError: a document with images is longer than ``seq_len``.
    """
    made = source.make(index, draw)
    tokens = made if isinstance(made, Tokens) else _rendered(source, bundle, made, index, draw, seq_len)
    factors = np.where(tokens.heads == IMAGE_HEAD, source.loss_image, source.loss_text).astype(np.float32)
    tokens = Tokens(tokens.ids, tokens.heads, tokens.weights * factors, tokens.segments)
    limit = seq_len - min(growth(), seq_len // 2)
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
        at, limit = stop, seq_len - min(growth(), seq_len // 2)


def _with_bos(tokens: Tokens, start: int, stop: int, bos: np.ndarray) -> Tokens:
    part = slice(start, stop)
    return Tokens(
        np.concatenate([bos, tokens.ids[part]]),
        np.concatenate([np.zeros(1, np.uint8), tokens.heads[part]]),
        np.concatenate([np.zeros(1, np.float32), tokens.weights[part]]),
        np.concatenate([np.full(1, -1, np.int32), tokens.segments[part]]),
    )
