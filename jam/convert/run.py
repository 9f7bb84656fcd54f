"""``jam convert``: a pickle checkpoint as its owner ships it to a folder that jam reads.

Stages: tell what the source is, by its files and then by its tensors' names; read tables and settings, and refuse what
does not fit; stream every tensor to disk; write configuration, vocabulary and tokenizer; rename. Nothing is left of a
conversion that failed.
"""

import sys
from enum import StrEnum
from pathlib import Path

from jam.checkpoint import INDEX, WEIGHTS, check_place, write_json
from jam.convert.chameleon import Chameleon, find_chameleon, tokenizer_settings
from jam.convert.metaseq import find_parts, find_tokenizer, make_tokenizer, read_metaseq
from jam.convert.outputs import Bar, Output
from jam.convert.pickles import Pickles
from jam.convert.transformers_bin import bin_outputs, copy_files, find_bins, side_files
from jam.convert.vqgan import is_vqgan, read_settings, read_vqgan, write_vqgan
from jam.errors import CheckpointError
from jam.shards import ShardWriter, check_output

IMAGE_TOKENIZER = "image_tokenizer"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


class SourceKind(StrEnum):
    """What ``jam convert`` reads."""

    vqgan = "vqgan"
    chameleon = "chameleon"
    metaseq = "metaseq"
    transformers = "transformers"


def run_convert(source: Path, out: Path, kind: str | None = None, settings: Path | None = None) -> Path:
    """Convert ``source`` to the new folder ``out``.

    Args:
        kind: what the source is; None finds out.
        settings: the yaml of a VQGAN, or the training settings of a metaseq checkpoint, where they are not beside it.

    Returns:
        The output folder.

    Raises:
        CheckpointError: nothing there that jam can convert; a pickle that is damaged or asks for code; parts that do
            not fit each other; an output that is taken.
        JamError: the disk is full.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder; give a checkpoint")
    if not (source.is_file() or source.is_dir()):
        raise CheckpointError(f"{source}: neither a file nor a folder; give a checkpoint")
    check_output(out)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{out}: lies inside the source; a folder outside of it is required, choose another")
    found = SourceKind(kind) if kind else tell_kind(source)
    work = {
        SourceKind.vqgan: _vqgan,
        SourceKind.chameleon: _chameleon,
        SourceKind.metaseq: _metaseq,
        SourceKind.transformers: _transformers,
    }
    note = work[found](source, out, settings)
    print(f"{out}: {found.value} checkpoint, {note}", file=sys.stderr)
    return out


def tell_kind(source: Path) -> SourceKind:
    """What a source is: a folder by its files, a file or a lone one in a folder by its tensors.

    Raises:
        CheckpointError: nothing that is known, or several things.
    """
    if source.is_dir():
        if find_chameleon(source):
            return SourceKind.chameleon
        if find_bins(source) and (source / "config.json").is_file():
            raw = read_settings(source / "config.json")
            return SourceKind.vqgan if "model_type" not in raw and "channel_mult" in raw else SourceKind.transformers
        if find_parts(source):
            return SourceKind.metaseq
        if any((source / name).is_file() for name in (WEIGHTS, INDEX)):
            raise CheckpointError(f"{source}: already safetensors, nothing to convert; give jam this folder as it is")
    with Pickles([_one_pickle(source)]) as pickles:
        state = pickles.state()
    if is_vqgan(state):
        return SourceKind.vqgan
    if "decoder.embed_tokens.weight" in state:
        return SourceKind.metaseq
    meta = "tok_embeddings.weight" in state
    hint = "give the folder that holds models and tokenizer" if meta else "name it with --kind"
    if source.is_file() and (source.parent / "config.json").is_file():
        hint = f"give the folder {source.parent} if it is a transformers model, or name it with --kind"
    raise CheckpointError(
        f"{source}: tensors {', '.join(sorted(state)[:3])}, ... of an unknown kind; {', '.join(SourceKind)} are known, "
        f"{hint}"
    )


def _one_pickle(source: Path) -> Path:
    if source.is_file():
        return source
    files = [path for path in sorted(source.iterdir()) if path.suffix in PICKLES and path.is_file()]
    if len(files) != 1:
        raise CheckpointError(
            f"{source}: {len(files)} pickles ({', '.join(PICKLES)}) and no layout that jam knows; one is required, or "
            "a folder as Meta, metaseq or transformers ships it, name the file"
        )
    check_place(source, files[0])
    return files[0]


def _vqgan(source: Path, out: Path, settings: Path | None) -> str:
    path = _one_pickle(source)
    settings = settings or _settings_beside(path)
    with Pickles([path]) as pickles:
        found = read_vqgan(pickles, 0, settings)
        with Bar(_bytes(found.outputs)) as bar:
            write_vqgan(found, out, bar)
    return found.note


def _settings_beside(path: Path) -> Path:
    """A VQGAN's settings: of the same name, else the only yaml, else config.json in its folder."""
    same = path.with_suffix(".yaml")
    files = [same] if same.is_file() else sorted([*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")])
    files = files or [file for file in (path.parent / "config.json",) if file.is_file()]
    if len(files) != 1:
        raise CheckpointError(
            f"{path}: {len(files)} yaml files beside it; the one with the network's sizes is required, give it with "
            "--config"
        )
    return files[0]


def _chameleon(source: Path, out: Path, settings: Path | None) -> str:
    files = find_chameleon(source)
    if files is None:
        raise CheckpointError(
            f"{source}: no models/*/consolidated*.pth; Chameleon's models and tokenizer are required, give the folder "
            "that holds both"
        )
    with Pickles([*files.shards, files.vqgan]) as pickles:
        model = Chameleon(files, pickles)
        images = read_vqgan(pickles, len(files.shards), settings or files.tokenizer / "vqgan.yaml", model.order)
        record = model.jam_file(images.config.codes_per_image)
        text = files.tokenizer / "text_tokenizer.json"
        specs = [output.spec for output in model.outputs]
        room = _bytes(images.outputs) + text.stat().st_size + (1 << 20)
        total = _bytes(model.outputs) + _bytes(images.outputs)
        with ShardWriter(out, specs, side_bytes=room) as writer, Bar(total) as bar:
            bar.write(writer, model.outputs)
            write_vqgan(images, writer.folder / IMAGE_TOKENIZER, bar)
            write_json(writer.folder / "config.json", model.config)
            (writer.folder / "tokenizer.json").write_bytes(text.read_bytes())
            (writer.folder / "tokenizer_config.json").write_text(tokenizer_settings(model.vocabulary))
            record.write(writer.folder)
            writer.finish()
    averaged = f", {model.averaged} norms that differed between shards averaged" if model.averaged else ""
    return f"{len(specs)} tensors of {len(files.shards)} shards, image tokenizer of {images.note}{averaged}"


def _metaseq(source: Path, out: Path, settings: Path | None) -> str:
    parts = find_parts(source) or (_one_pickle(source),)
    for part in parts if source.is_dir() else ():
        check_place(source, part)
    with Pickles(parts) as pickles:
        model = read_metaseq(pickles, None if settings is None else read_settings(settings))
        folder = source if source.is_dir() else source.parent
        files = find_tokenizer(folder)
        for file in files or ():
            check_place(folder, file)
        tokenizer = None if files is None else make_tokenizer(files, model.config["vocab_size"])
        with ShardWriter(out, [output.spec for output in model.outputs], side_bytes=1 << 24) as writer:
            with Bar(_bytes(model.outputs)) as bar:
                bar.write(writer, model.outputs)
            write_json(writer.folder / "config.json", model.config)
            if tokenizer is not None:
                tokenizer.save(str(writer.folder / "tokenizer.json"))
            writer.finish()
    words = "its tokenizer" if tokenizer else "no tokenizer found: put its tokenizer.json into the folder"
    return f"{len(model.outputs)} tensors as an OPT, {words}; for images write its jam.json, no file says the image ids"


def _transformers(source: Path, out: Path, settings: Path | None) -> str:
    paths = find_bins(source) if source.is_dir() else ()
    if source.is_file():
        raise CheckpointError(f"{source}: a file; a transformers folder is required, give the folder {source.parent}")
    if not paths:
        raise CheckpointError(
            f"{source}: no pytorch_model.bin and no index of its parts; a transformers folder is required, name one"
        )
    others = side_files(source)
    with Pickles(paths) as pickles:
        outputs, left_out = bin_outputs(source, pickles)
        room = sum((source / path).stat().st_size for path in others) + (1 << 20)
        with ShardWriter(out, [output.spec for output in outputs], side_bytes=room) as writer:
            with Bar(_bytes(outputs)) as bar:
                bar.write(writer, outputs)
            copy_files(source, others, writer.folder)
            writer.finish()
    return f"{len(outputs)} tensors, {left_out} left out (a tied head, masks), {len(others)} other files copied"


def _bytes(outputs: list[Output] | tuple[Output, ...]) -> int:
    return sum(output.spec.bytes for output in outputs)
