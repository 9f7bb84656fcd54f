"""``jam data``: prepared sources made, checked, measured and shown.

Doors to ``finetune.data.prepare``, ``finetune.data.shards`` and ``finetune.data.look``: what they find is printed here.
"""

import sys
from pathlib import Path

import numpy as np

from finetune.data.prepare import Job, prepare
from finetune.data.rendering import Reading, Tokenizers, outcomes_of
from finetune.data.shards import RECORD, Counts, altered, open_shards
from jam.errors import DataError, printable
from jam.shipped import model_folder

BAR = 40  # letters of the longest bar


def _line(text: str) -> str:
    """Foreign text on one line that cannot steer a terminal."""
    return printable(text.replace("\n", " "))


def _model(path: Path | None) -> Tokenizers:
    return Tokenizers.load(model_folder(path))


def run_prepare(
    reading: Reading, model: Path | None, out: Path, *, workers: int, shard_mb: int, skip_bad: bool
) -> None:
    """Raises as ``finetune.data.prepare.prepare``."""

    def tell(line: str) -> None:
        print(_line(line), file=sys.stderr)

    counts = prepare(Job(reading, _model(model), out, workers, shard_mb * 10**6, skip_bad, tell))
    print(f"{out}: {_sizes(counts)}")


def _sizes(counts: Counts) -> str:
    left_out = f", {counts.skipped:,} rows left out" if counts.skipped else ""
    return f"{counts.documents:,} documents, {counts.tokens:,} tokens, {counts.images:,} images{left_out}"


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"


def run_check(reading: Reading | None, folder: Path, model: Path | None, workers: int) -> None:
    """A prepared folder where it is one, else every row of a source; bad ones to stderr, a line each.

    Raises:
        DataError: something is bad; no reader where one is needed.
    """
    if (folder / RECORD).is_file():
        _check_prepared(folder, model)
        return
    if reading is None:
        raise DataError(f"{folder}: no prepared source; data that is to be prepared needs --reader, say which")
    rows = bad = good = 0
    for end, outcomes in outcomes_of(reading, None if model is None else _model(model), workers):
        rows = end
        good += sum(outcome.error is None for outcome in outcomes)
        for outcome in outcomes:
            if outcome.error is not None:
                bad += 1
                print(f"error: {_line(outcome.error)}", file=sys.stderr)
    if bad:
        raise DataError(
            f"{folder}: {bad:,} of {rows:,} rows cannot be used; mend or remove them, or prepare with --skip-bad"
        )
    if not good:
        raise DataError(f"{folder}: no documents; at least one is required")
    print(f"{folder}: {good:,} documents, all of them good")


def _check_prepared(folder: Path, model: Path | None) -> None:
    if bad := list(altered(folder)):
        raise DataError("\n".join(bad))
    shards = open_shards(folder)
    if model is not None:
        own = _model(model)
        shards.check_model(own.path, own.vocabulary, own.image)
    print(f"{folder}: {_shards(len(shards.shards))} as written; {_sizes(shards.counts)}")


def run_stats(folder: Path, seq_len: int) -> None:
    """Raises DataError as ``finetune.data.shards.open_shards``."""
    from finetune.data.look import fill_of, histogram  # imports transformers, which takes seconds

    shards = open_shards(folder)
    counts, lengths = shards.counts, shards.lengths()
    read = f"reader {shards.reader.get('name')} of {shards.reader.get('source')}"
    print(_line(f"{folder}: {_sizes(counts)}; {_shards(len(shards.shards))}, {read}"))
    print(f"  conversations  {counts.conversations:,}, plain documents {counts.documents - counts.conversations:,}")
    share = {name: getattr(counts, name) / max(1, counts.tokens) for name in ("text", "image", "control", "learnt")}
    print(f"  text           {counts.text:,} tokens ({share['text']:.1%})")
    print(f"  image codes    {counts.image:,} tokens ({share['image']:.1%})")
    print(f"  controls       {counts.control:,} tokens ({share['control']:.1%})")
    print(f"  learnt         {counts.learnt:,} tokens ({share['learnt']:.1%})")
    print(f"  length         {lengths.min():,} to {lengths.max():,}, median {np.median(lengths):,.0f}")
    found = histogram(lengths)
    most, width = max(count for *_, count in found), len(f"{found[-1][1]:,}")
    for first, last, count in found:
        print(f"  {first:>{width},} - {last:<{width},}  {'#' * round(BAR * count / most):<{BAR}}  {count:,}")
    fill = fill_of(shards, seq_len)
    print(
        f"  packing        {fill.share:.1%} full at seq_len {seq_len:,} ({fill.documents:,} documents); {fill.cut:,} "
        f"texts are cut, {fill.too_long:,} documents with images are too long"
    )


def run_show(folder: Path, model: Path | None, *, number: int, start: int, out: Path) -> None:
    """Documents as they read, ``*`` before what is learnt; their images go to ``out``.

    Raises:
        DataError: no prepared source, one of another model, or a start beyond its end.
    """
    from finetune.data.look import stretches  # imports transformers, which takes seconds

    shards, own = open_shards(folder), _model(model)
    shards.check_model(own.path, own.vocabulary, own.image)
    if start >= len(shards):
        raise DataError(f"{folder}: {len(shards)} documents, none at {start}; begin before its end (--start)")
    print(f"{folder}: what is learnt has a * (and its weight, where that is not 1)")
    for index in range(start, min(start + number, len(shards))):
        tokens = shards.tokens(index)
        print(f"document {index}: {len(tokens)} tokens, {int((tokens.weights[1:] > 0).sum())} learnt")
        pictures = 0
        for stretch in stretches(tokens, own):
            mark = "*" if stretch.weight == 1 else f"*{stretch.weight:g}" if stretch.weight else ""
            said = _line(stretch.says)
            if stretch.codes and (picture := stretch.picture(own)) is not None:
                out.mkdir(parents=True, exist_ok=True)
                file = out / f"document-{index}-{(pictures := pictures + 1)}.png"
                picture.save(file)
                said += f": {file}"
            print(f"  {mark:<5} {said}")
