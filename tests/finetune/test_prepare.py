"""Prepared sources: what goes in comes out, however many workers and however often it was killed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import prepare as prepare_module
from finetune.data import rendering
from finetune.data.prepare import Job, prepare
from finetune.data.readers import rows_of
from finetune.data.rendering import Reading, Tokenizers
from finetune.data.shards import ShardWriter, altered, dtype_for, open_shards, runs_of
from finetune.data.sources import open_source, pieces
from finetune.order.pack import collate
from finetune.order.plan import PackedSource, Plan
from finetune.recipe import FinetuneRecipe
from finetune.recipe import Source as SourceRecipe
from jam.errors import DataError, JamError
from jam.header import read_header
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import Tokens, parse, render
from jam.tokens.vocabulary import Span, Vocabulary
from tests.tiny import tiny_pair
from tests.tiny_framed import framed_parent

DOCUMENTS = 150  # more than two chunks


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return load_bundle(tiny_pair(tmp_path_factory.mktemp("pair"))[1])


@pytest.fixture(scope="module")
def model(bundle) -> Tokenizers:
    return Tokenizers.load(bundle.path)


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    """Captioned noise: every image has codes of its own."""
    folder = tmp_path_factory.mktemp("captions")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(DOCUMENTS):
        pixels = generator.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"picture {number} of the " + "cat " * (number % 7)})
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "c.jsonl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAM_CACHE", str(tmp_path / "cache"))


def equal(one: Tokens, other: Tokens) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("ids", "heads", "weights", "segments")]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_runs_are_bit_exact():
    weights = np.array([0.0, -0.0, 1.0, 1.0, 0.1], np.float32)
    tokens = Tokens(np.arange(5, dtype=np.int32), np.array([0, 0, 0, 1, 1], np.uint8), weights, np.zeros(5, np.int32))
    lengths, heads, weights, _ = runs_of(tokens)
    assert lengths.tolist() == [1] * 5 and heads.tolist() == [0, 0, 0, 1, 1]
    assert np.signbit(weights).tolist() == [False, True, False, False, False]


def test_the_type_is_the_narrowest_that_holds_every_id():
    assert [dtype_for(Vocabulary((Span("text", 0, size),), {})) for size in (1 << 16, (1 << 16) + 1)] == [
        "uint16",
        "uint32",
    ]


@pytest.mark.parametrize("shard_bytes", [1, 700, 10**9])
def test_shards_give_the_tokens_of_the_file(tmp_path, bundle, model, captions, shard_bytes):
    counts = prepare(Job(Reading(captions, "captions"), model, tmp_path / "out", shard_bytes=shard_bytes))
    shards = open_shards(tmp_path / "out")
    plain = open_source("mine", SourceRecipe(kind="captions", path=str(captions), weight=1.0), bundle)
    rendered = [render(plain.make(index, 0.0), bundle.vocabulary, bundle.text) for index in range(DOCUMENTS)]
    assert len(shards) == DOCUMENTS == counts.documents == counts.images
    assert all(equal(shards.tokens(index), tokens) for index, tokens in enumerate(rendered))
    assert counts.tokens == sum(map(len, rendered)) == shards.lengths().sum()
    assert counts.learnt == sum(int((tokens.weights[1:] > 0).sum()) for tokens in rendered)
    assert counts.image == 4 * DOCUMENTS and shards.with_images().all() and not counts.conversations
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.bin"))]
    assert {1: len(sizes) == DOCUMENTS, 700: len(sizes) > 5 and max(sizes) <= 700, 10**9: len(sizes) == 1}[shard_bytes]
    assert list(altered(tmp_path / "out")) == []


def test_a_recipe_reads_the_same_batches_from_either(tmp_path, bundle, model, captions):
    prepare(Job(Reading(captions, "captions"), model, tmp_path / "out", shard_bytes=900))

    def batch(kind: str, path: Path):
        entry = {"kind": kind, "path": str(path), "weight": 1.0, "loss": {"text": 0.5}}
        recipe = FinetuneRecipe.model_validate(
            {
                "model": str(bundle.path),
                "output_dir": str(tmp_path / "run"),
                "data": {"seq_len": 96, "seed": 3, "mix": {"mine": entry}},
                "objective": {"cm3": 0.5, "code_noise": 0.5},
                "train": {"steps": 1},
            }
        )
        source = open_source("mine", recipe.data.mix["mine"], bundle)
        plan = Plan([PackedSource(source, 0, bundle, recipe, 128)], [1.0], 3)
        sequences = [plan.sequence(t)[1] for t in range(60)]  # into the second epoch
        return collate(sequences, [0] * 60, 96, bundle.vocabulary.controls["pad"])

    one, other = batch("captions", captions), batch("shards", tmp_path / "out")
    for name in one.__dataclass_fields__:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_conversations_stay_causal_and_carry_their_weights(tmp_path, bundle, model):
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    prepare(Job(Reading(tmp_path / "d.jsonl", "messages"), model, tmp_path / "out"))
    ready = open_source("x", SourceRecipe(kind="shards", path=str(tmp_path / "out"), weight=1.0), bundle)
    plain = open_source("x", SourceRecipe(kind="conversations", path=str(tmp_path / "d.jsonl"), weight=1.0), bundle)
    assert not ready.conditioned and not plain.conditioned
    assert equal(pieces(ready, bundle, 0, 0.5, 64)[0], pieces(plain, bundle, 0, 0.5, 64)[0])


def test_the_bytes_do_not_depend_on_the_workers(tmp_path, model, captions):
    for workers in (1, 2):
        prepare(Job(Reading(captions, "captions"), model, tmp_path / str(workers), workers=workers, shard_bytes=900))
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("skip", [False, True])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, model, captions, monkeypatch, skip):
    """Killed at every place where a file is synced: what is there then is what a killed process leaves."""
    source = tmp_path / "data/c.jsonl"
    shutil.copytree(captions.parent, source.parent)
    if skip:
        lines = source.read_text().splitlines(True)
        for at in (0, 40, 41, 63, 64, 149):
            lines[at] = "{broken\n"
        source.write_text("".join(lines))
    whole = Job(Reading(source, "captions"), model, tmp_path / "whole", shard_bytes=2000, skip_bad=skip)
    counts = prepare(whole)
    assert counts.skipped == (6 if skip else 0) and counts.rows == DOCUMENTS
    killed = resumed = 0
    for place in range(1, 200, 4):
        told: list[str] = []
        job = Job(whole.reading, model, tmp_path / "out", shard_bytes=2000, skip_bad=skip, tell=told.append)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", killer(place))
            try:
                prepare(job)
                break
            except Killed:
                killed += 1
        if not job.out.exists():  # else it was killed after the rename
            prepare(job)
            resumed += any(line.startswith("going on after") for line in told)
        assert bytes_of(job.out) == bytes_of(whole.out)
        shutil.rmtree(job.out)
    assert killed > 4 and resumed > 2


def killer(place: int):
    """An ``os.fsync`` that ends everything at its ``place``-th call."""
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == place:
            raise Killed
        real(handle)

    return fsync


def test_a_changed_source_starts_afresh(tmp_path, model, captions, monkeypatch):
    source = tmp_path / "t.jsonl"
    source.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(100)))
    real = prepare_module._finish
    monkeypatch.setattr(prepare_module, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
    job = Job(Reading(source, "text"), model, tmp_path / "out", shard_bytes=200)
    with pytest.raises(Killed):
        prepare(job)
    source.write_text(source.read_text().replace("line", "other line"))
    monkeypatch.setattr(prepare_module, "_finish", real)
    told = []
    prepare(Job(job.reading, model, job.out, shard_bytes=200, tell=told.append))
    assert not any("going on" in line for line in told)
    assert (tmp_path / "out").is_dir() and not (tmp_path / ".out.partial").exists()
    assert not (tmp_path / ".out.lock").exists()


def test_bad_rows_end_it_with_file_and_line_or_are_left_out(tmp_path, model):
    source = tmp_path / "t.jsonl"
    source.write_text('{"text": "one"}\n\n{"txt": 3}\nnonsense\n{"text": "two"}\n')
    with pytest.raises(DataError) as caught:
        prepare(Job(Reading(source, "text"), model, tmp_path / "out"))
    lines = str(caught.value).split("\n")
    assert [line.startswith(f"{source}:{number}: ") for line, number in zip(lines, (3, 4), strict=True)] == [True] * 2
    told = []
    counts = prepare(Job(Reading(source, "text"), model, tmp_path / "out", skip_bad=True, tell=told.append))
    assert (counts.documents, counts.skipped, counts.rows) == (2, 2, 5)
    assert [line for line in told if line.startswith("skipped")] == [f"skipped: {line}" for line in lines]


def test_what_a_torn_file_loses_is_never_left_out(tmp_path, model):
    (tmp_path / "t.csv").write_bytes(b"text\nfine\ncaf\xe9\nlost\n")
    with pytest.raises(DataError, match=r"t\.csv:\d: not readable CSV"):
        prepare(Job(Reading(tmp_path / "t.csv", "text"), model, tmp_path / "out", skip_bad=True))


def test_a_source_without_documents_and_a_taken_folder_are_refused(tmp_path, model):
    (tmp_path / "t.jsonl").write_text("\n")
    job = Job(Reading(tmp_path / "t.jsonl", "text"), model, tmp_path / "out")
    with pytest.raises(DataError, match="no documents"):
        prepare(job)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(DataError, match="exists already"):
        prepare(job)
    with pytest.raises(DataError, match="no such file"):
        prepare(Job(Reading(tmp_path / "none.jsonl", "text"), model, tmp_path / "new"))
    with pytest.raises(DataError, match="reader 'novel'"):
        Reading(tmp_path / "t.jsonl", "novel")


def test_two_writers_are_one_too_many(tmp_path, model):
    from jam.journal import Lock

    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n')
    lock = Lock(tmp_path / "out")
    lock.acquire()
    with pytest.raises(JamError, match="another process is writing"):
        prepare(Job(Reading(tmp_path / "t.jsonl", "text"), model, tmp_path / "out"))
    lock.release()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def prepared(tmp_path, model) -> Path:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(40)))
    prepare(Job(Reading(tmp_path / "t.jsonl", "text"), model, tmp_path / "out", shard_bytes=200))
    return tmp_path / "out"


def test_one_altered_byte_is_found(prepared):
    for path in sorted(prepared.glob("shard-*"))[:4]:
        for at in (0, path.stat().st_size // 2, -1):
            flip(path, at)
            assert [line.startswith(f"{path}: altered") for line in altered(prepared)] == [True]
            flip(path, at)


def test_damage_is_said_on_opening(prepared):
    files = {path.name: path.read_bytes() for path in prepared.iterdir()}

    def opened(name: str, data: bytes | None) -> str:
        path = prepared / name
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            open_shards(prepared)
        path.write_bytes(files[name])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    record = files["source.json"]
    assert "shard-00001.bin: missing" in opened("shard-00001.bin", None)
    assert "bytes, " in opened("shard-00001.bin", files["shard-00001.bin"][:-1])
    assert "shard-00000.idx" in opened("shard-00000.idx", b"\xff" * len(files["shard-00000.idx"]))
    assert "no prepared source" in opened("source.json", None)
    assert "format 2" in opened("source.json", record.replace(b'"format": 1', b'"format": 2'))
    for bad in (
        record[:-9],
        b"[]",
        record.replace(b"shard-00000.bin", b"/etc/passwd"),
        record.replace(b"uint16", b"O"),
        record.replace(b'"images": 0', b'"images": "0"'),
    ):
        assert "damaged" in opened("source.json", bad)
    odd = {**files, "source.json": record.replace(b"uint16", b"uint32")}
    assert "does not fit" in opened("source.json", odd["source.json"])
    swapped = json.loads(record)
    swapped["counts"]["documents"] += 1
    assert "documents, source.json says" in opened("source.json", json.dumps(swapped).encode())
    assert len(open_shards(prepared)) == 40


def test_shards_of_another_model_are_refused(prepared, tmp_path, bundle, model, captions):
    entry = SourceRecipe(kind="shards", path=str(prepared), weight=1.0)
    text = load_bundle(tiny_pair(tmp_path / "pair")[0])
    with pytest.raises(DataError, match="prepared for another vocabulary than that of"):
        open_source("mine", entry, text)
    other = tmp_path / "other"
    shutil.copytree(bundle.path, other)
    words = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(words | {"padding": None}))  # written differently, the same words
    assert open_source("mine", entry, load_bundle(other)).size == 40
    words["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(DataError, match="prepared for another text tokenizer"):
        open_source("mine", entry, load_bundle(other))
    shutil.copy(bundle.path / "tokenizer.json", other / "tokenizer.json")
    prepare(Job(Reading(captions, "captions"), model, tmp_path / "pictures"))
    bent = load_bundle(other)
    with torch.no_grad():
        next(iter(bent.image.network.state_dict().values())).flatten()[0] += 1
    pictures = SourceRecipe(kind="shards", path=str(tmp_path / "pictures"), weight=1.0)
    with pytest.raises(DataError, match="prepared for another image tokenizer"):
        open_source("mine", pictures, bent)
    assert open_source("mine", entry, bent).size == 40  # no images, no image tokenizer
    assert open_source("mine", pictures, bundle).size == DOCUMENTS


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_images_at_their_own_sizes(tmp_path, kind):
    """Emu3 and Lumina-mGPT: rows and columns as the owner's processor would have them."""
    sized = Tokenizers.load(framed_parent(tmp_path / "model", kind))
    Image.effect_noise((24, 12), 90).convert("RGB").save(tmp_path / "wide.png")
    (tmp_path / "c.jsonl").write_text('{"image": "wide.png", "caption": "x"}\n')
    grids = []
    for own in (False, True):
        out = tmp_path / str(own)
        prepare(Job(Reading(tmp_path / "c.jsonl", "captions", own_sizes=own), sized, out))
        found = parse(open_shards(out).tokens(0).ids.tolist(), sized.vocabulary, sized.text)
        grids.append(found.parts[-1].grid)
        if own:
            codes, grid = sized.image.read(Image.open(tmp_path / "wide.png"), sized.vocabulary)
            assert (found.parts[-1].codes, found.parts[-1].grid) == (codes, grid)
    assert grids == [(2, 2), {"text": (2, 5), "tokens": (2, 2)}[kind]]  # size tokens: at most four codes


def test_own_sizes_need_a_model_with_sizes(tmp_path, model, captions):
    with pytest.raises(DataError, match="--own-sizes"):
        prepare(Job(Reading(captions, "captions", own_sizes=True), model, tmp_path / "out"))


def test_a_dead_worker_is_one_line(tmp_path, model, captions, monkeypatch):
    class Broken:
        def __init__(self, *_):
            pass

        def submit(self, *_):
            raise rendering.BrokenProcessPool

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(rendering, "ProcessPoolExecutor", Broken)
    with pytest.raises(DataError, match="a worker process died"):
        prepare(Job(Reading(captions, "captions"), model, tmp_path / "out", workers=2))


@pytest.mark.parametrize("with_model", [True, False])
def test_photographs_wait_small(tmp_path, model, with_model, monkeypatch):
    """What a chunk of rows holds of its images: as many pixels as the tokenizer takes, or none to speak of."""
    Image.effect_noise((300, 200), 90).convert("RGB").save(tmp_path / "b.png")
    turns = [{"role": "user", "content": "look"}, {"role": "assistant", "content": "<image> <image>"}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": turns, "images": ["b.png"] * 2}) + "\n")
    renderer = rendering.Renderer(Reading(tmp_path / "m.jsonl", "messages"), model if with_model else None)
    sizes, real = [], renderer._prepared

    def spy(document):
        sizes.extend(part.image.size for part in document.parts if hasattr(part, "image"))
        return real(document)

    monkeypatch.setattr(renderer, "_prepared", spy)
    assert [outcome.error for outcome in renderer(0, list(rows_of(tmp_path / "m.jsonl")))] == [None]
    assert sizes == [(model.image.resolution,) * 2 if with_model else (1, 1)] * 2


@pytest.mark.parametrize(("array", "value"), [("offsets", -7), ("offsets", 1 << 62), ("run_offsets", 1 << 62)])
def test_an_index_out_of_order_is_no_count_of_lengths(prepared, array, value):
    path = prepared / "shard-00000.idx"
    info = next(info for info in read_header(path) if info.name == array)
    with path.open("r+b") as file:
        file.seek(info.begin + 8)
        file.write(np.array(value, "<i8").tobytes())
    shards = open_shards(prepared)
    with pytest.raises(DataError, match=r"shard-00000\.idx: altered"):
        shards.lengths() if array == "offsets" else shards.with_images()


def test_a_full_disk_is_one_line_with_the_folder_and_the_next_run_goes_on(tmp_path, model, captions, monkeypatch):
    job = Job(Reading(captions, "captions"), model, tmp_path / "out", shard_bytes=200)
    straight = Job(Reading(captions, "captions"), model, tmp_path / "straight", shard_bytes=200)
    prepare(straight)
    finish, done = ShardWriter.finish, []

    def full(writer: ShardWriter) -> list:
        if len(done) == 2:
            os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())  # what is buffered finds no room
        return done.append(writer.name) or finish(writer)

    with monkeypatch.context() as patched, pytest.raises(DataError, match=r"out: could not be written \(No space left"):
        patched.setattr(ShardWriter, "finish", full)
        prepare(job)
    assert not job.out.exists() and not list(tmp_path.glob(".out*/*.tmp"))
    prepare(job)
    assert bytes_of(job.out) == bytes_of(straight.out)
