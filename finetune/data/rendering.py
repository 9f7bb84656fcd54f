"""Rows of any form to tokens, in order, by one process or several.

Stages: rows of the source, ``CHUNK`` at a time -> documents, their images opened and fitted -> codes of a chunk's
images together -> tokens. A chunk is the same rows whoever does it, and chunks come back in order: what they become
does not depend on the number of workers.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from PIL.Image import Image

from finetune.data.readers import FORMS, Context, Media, Row, Torn, read_map, rows_of
from jam.document import CodesPart, Document, ImagePart
from jam.errors import DataError, JamError
from jam.layouts import open_model
from jam.tokens.belong import check_tokenizers
from jam.tokens.image import ImageTokenizer
from jam.tokens.render import Tokens, render
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import Vocabulary

CHUNK = 64  # rows that one worker does at once


@dataclass(frozen=True)
class Tokenizers:
    """What a model folder needs to write documents: all but its network."""

    path: Path
    vocabulary: Vocabulary
    text: TextTokenizer
    image: ImageTokenizer | None

    @classmethod
    def load(cls, folder: Path) -> "Tokenizers":
        """Raises CheckpointError as ``jam.models.load.load_bundle``, of everything but the network."""
        record = open_model(folder).jam
        image = None if record.image_tokenizer is None else ImageTokenizer.load(folder / record.image_tokenizer)
        text = TextTokenizer.load(folder)
        check_tokenizers(folder, record.vocabulary, text, image)
        return cls(folder, record.vocabulary, text, image)


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        form: a name of ``finetune.data.readers.FORMS``.
        media_root: the folder of the images; None is the source's own.
        image_map: JSON lines of ``{"url", "path"}``.
        own_sizes: images at the size the model's owner gives them (``ImageTokenizer.read``), not as squares.
    """

    source: Path
    form: str
    media_root: Path | None = None
    image_map: Path | None = None
    own_sizes: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise DataError(f"reader {self.form!r:.60}; one of {', '.join(FORMS)} is required, choose one")

    def media(self) -> Media:
        """Raises DataError as :func:`read_map`."""
        own = self.source if self.source.is_dir() else self.source.parent
        return Media(self.media_root or own, {} if self.image_map is None else read_map(self.image_map))

    def settings(self) -> dict:
        """As source.json keeps them; names of files, not of the folders that they were in."""
        settings = {"name": self.form, "source": self.source.name, "own_sizes": self.own_sizes}
        return settings | {"image_map": None if self.image_map is None else self.image_map.name}


@dataclass(frozen=True)
class Outcome:
    """What became of row ``number`` (from 0): tokens, or one line of what is wrong; neither without a model.

    ``torn``: nothing of this file can be read after it.
    """

    number: int
    tokens: Tokens | None
    conversation: bool = False
    error: str | None = None
    torn: bool = False


class Renderer:
    """Chunks of rows to outcomes; without a model rows are read and their images opened, no more."""

    def __init__(self, reading: Reading, model: Tokenizers | None):
        self.form, self.model, self.own_sizes = FORMS[reading.form], model, reading.own_sizes
        codes = model.vocabulary.codes_per_image if model else 0
        self.context = Context(replace(reading.media(), keep=self._keep), codes or None)
        if reading.own_sizes and model is not None and not model.vocabulary.framed:
            raise DataError(f"own sizes of images, and those of {model.path} have one size; leave out --own-sizes")

    def __call__(self, first: int, rows: list[Row]) -> list[Outcome]:
        documents: list[tuple[int, Row, Document]] = []
        outcomes: list[Outcome] = []
        for number, row in enumerate(rows, first):
            try:
                fields = row.fields()
                if fields is not None:
                    documents.append((number, row, self._prepared(self.form(fields, self.context))))
            except JamError as error:
                outcomes.append(Outcome(number, None, error=f"{row.where}: {error}", torn=isinstance(error, Torn)))
        for (number, row, _), document in zip(documents, self._with_codes([d for *_, d in documents]), strict=True):
            conversation = any(part.role != "document" for part in document.parts)
            try:
                tokens = None if self.model is None else render(document, self.model.vocabulary, self.model.text)
                outcomes.append(Outcome(number, tokens, conversation))
            except JamError as error:
                outcomes.append(Outcome(number, None, error=f"{row.where}: {error}"))
        return sorted(outcomes, key=lambda outcome: outcome.number)

    def _keep(self, image: Image) -> Image:
        """An image as it waits for the rest of its chunk: photographs as they are would fill the memory."""
        if self.model is None or self.model.image is None:
            return image.resize((1, 1))  # it could be opened, and no more is asked
        return image if self.own_sizes else self.model.image.fit(image)

    def _prepared(self, document: Document) -> Document:
        """With codes, where images are not encoded together. Raises DataError where none can be."""
        if self.model is None or not any(isinstance(part, ImagePart) for part in document.parts):
            return document
        image, vocabulary = self.model.image, self.model.vocabulary
        if image is None:
            raise DataError(f"an image, and {self.model.path} has no image tokenizer; use a model that has one")
        if self.own_sizes:
            return document.with_codes(
                lambda images: [
                    CodesPart(codes, grid=grid) for codes, grid in (image.read(i, vocabulary) for i in images)
                ]
            )
        return document

    def _with_codes(self, documents: list[Document]) -> list[Document]:
        images = [part.image for document in documents for part in document.parts if isinstance(part, ImagePart)]
        if self.model is None or not images:
            return documents
        codes = iter(self.model.image.encode(images).tolist())
        return [d.with_codes(lambda some: [CodesPart(tuple(next(codes))) for _ in some]) for d in documents]


_renderer: Renderer | None = None  # of a worker process


def _start_worker(reading: Reading, model: Path | None) -> None:
    global _renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the parent's business
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # a killed parent says nothing
    _renderer = Renderer(reading, None if model is None else Tokenizers.load(model))


def _work(first: int, rows: list[Row]) -> list[Outcome]:
    return _renderer(first, rows)


def outcomes_of(
    reading: Reading, model: Tokenizers | None, workers: int = 1, start: int = 0
) -> Iterator[tuple[int, list[Outcome]]]:
    """Chunks in order: the number of rows read so far, and what became of the chunk's rows; blank lines are left out.

    Args:
        start: rows that are passed over, a multiple of ``CHUNK``.

    Raises:
        DataError: a source or settings that cannot be read at all; a worker that died.
    """
    renderer = Renderer(reading, model)
    chunks = _chunks(reading.source, start)
    if workers == 1:
        for first, rows in chunks:
            yield first + len(rows), renderer(first, rows)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    arguments = (reading, None if model is None else model.path)
    pool = ProcessPoolExecutor(workers, context, _start_worker, arguments)
    waiting: deque[tuple[int, Future]] = deque()
    try:
        for first, rows in chunks:
            waiting.append((first + len(rows), pool.submit(_work, first, rows)))
            if len(waiting) > 2 * workers:
                end, future = waiting.popleft()
                yield end, future.result()
        while waiting:
            end, future = waiting.popleft()
            yield end, future.result()
    except BrokenProcessPool:
        raise DataError(
            f"{reading.source}: a worker process died, of too little memory perhaps; use fewer --workers and run again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(source: Path, start: int) -> Iterator[tuple[int, list[Row]]]:
    rows = rows_of(source)
    for first in range(0, 1 << 62, CHUNK):
        if not (chunk := list(islice(rows, CHUNK))):
            return
        if first >= start:
            yield first, chunk
