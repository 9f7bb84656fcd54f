"""Running a merge: recipe to plan to a checkpoint folder that appears when whole.

Stages: read both parents' headers; ask the method what stands in the way, and refuse with the methods that would work;
plan; stream every job block by block through float32 to disk; write configuration, vocabulary, tokenizers, the resolved
recipe, the report and a model card; rename. Same inputs, recipe and version give the same bytes, also when the merge
was killed on the way and went on.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import numpy as np

from jam import __version__, assets
from jam.checkpoint import INDEX, check_place, write_json
from jam.digest import sha256_of
from jam.errors import CheckpointError, MergeError
from jam.floats import SHORT
from jam.journal import JOURNAL, check_parents
from jam.memory import keep_freed_memory
from jam.recipe import dump_recipe
from jam.shards import ShardWriter, TensorSpec, check_output
from merge import cross, extend, uniform, width
from merge.codes_alone import is_tokenizer, tokenizer_parent
from merge.doubts import doubts
from merge.forecast import forecast
from merge.image_network import FOLDER
from merge.plan import Parent, Plan, read_parent, token_ids
from merge.recipe import MergeRecipe
from merge.report import compact_json, existing, model_card, print_plan, report
from merge.stream import stream
from merge.union import Pair

Files = dict[str, Path]  # name in a report -> where it lies

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Method:
    """``obstacles`` lists why not; ``plan`` makes the jobs."""

    obstacles: Callable[[Pair, MergeRecipe], list[str]]
    plan: Callable[[Pair, MergeRecipe], Plan]


METHODS: dict[str, Method] = {
    "uniform": Method(uniform.obstacles, uniform.plan),
    "width": Method(width.obstacles, width.plan),
    "cross": Method(cross.obstacles, cross.plan),
    "extend": Method(extend.obstacles, extend.plan),
}


def run_merge(recipe: MergeRecipe, dry_run: bool = False, quiet: bool = False) -> Path | None:
    """Fuse two parents as the recipe says.

    Args:
        dry_run: print the fate of every tensor and row, what is doubtful and what it will cost, and leave nothing
            behind.
        quiet: say nothing of the result, which is a step of other work.

    Returns:
        The output folder, or None for a dry run.

    Raises:
        MergeError: the parents do not allow the method, the output folder is taken, or an input changed meanwhile.
        CheckpointError: a damaged parent, NaN or infinite weights, values that overflow the output type.
        JamError: the disk is full.
    """
    plan, pair = make_plan(recipe)
    inputs = {side.side: parent_files(side) for side in pair.sides}
    if recipe.uniform.base is not None:
        inputs["base"] = _top_files(recipe.uniform.base)
    if (measured := recipe.width.calibration) is not None:
        inputs["calibration"] = {measured.name: measured}
    specs = [TensorSpec(job.name, SHORT[recipe.dtype], job.shape) for job in plan.jobs]
    keep_freed_memory()  # blocks come and go thousands of times
    _check_place(recipe, pair)
    if dry_run:
        read = sum(path.stat().st_size for files in inputs.values() for path in files.values())
        cost = forecast(plan, specs, read, existing(recipe.out), recipe.hash, time.process_time())
        print_plan(plan, pair, recipe, cost)
        return None
    network, key = pair.image.network, plan_key(plan, inputs, recipe)
    side_files = _side_files(pair)
    side_bytes = sum(source.stat().st_size for source in side_files.values()) + (1 << 20)
    side_bytes += 0 if network is None else network.bytes
    stop = Event()
    with (
        ShardWriter(
            recipe.out,
            specs,
            shard_bytes=recipe.shard_bytes,
            side_bytes=side_bytes,
            key=key,
            hashed=recipe.hash,
        ) as writer,
        ThreadPoolExecutor(2) as pool,
    ):
        try:
            # the inputs are hashed beside the stream, which reads them at the same time
            paths = {path for files in inputs.values() for path in files.values()} if recipe.hash else set()
            hashes = {path: pool.submit(sha256_of, path, stop) for path in sorted(paths)}
            stream(plan, writer)
            writer.close()
            digests = {path: future.result() for path, future in hashes.items()}
        finally:
            stop.set()
        found = doubts(pair, plan.method)
        record = report(plan, pair, recipe, found) | {"files": {side: _sizes(files) for side, files in inputs.items()}}
        if recipe.hash:
            record["sha256"] = {
                side: {name: digests[path] for name, path in files.items()} for side, files in inputs.items()
            }
        _write_side_files(plan, pair, recipe, found, side_files, writer.folder)
        _write_report(record, writer, recipe)
        if plan_key(plan, inputs, recipe) != key:
            raise MergeError(
                f"{recipe.out}: an input file changed while it was read; files that stay as they are required, wait "
                "for their writer and run again"
            )
        writer.finish()
    if not quiet:
        print(f"{recipe.out}: {plan.method} merge, {plan.parameters:,} parameters in {recipe.dtype}", file=sys.stderr)
        for doubt in found:
            print(f"check: {doubt}", file=sys.stderr)
    return recipe.out


def _check_place(recipe: MergeRecipe, pair: Pair) -> None:
    """Raises MergeError unless the output can become a new folder, outside of every input, JamError unless folders can
    be made there."""
    try:
        check_output(recipe.out)
    except CheckpointError as error:
        raise MergeError(str(error)) from None
    network, place = pair.image.network, Path(os.path.realpath(recipe.out))  # resolve() raises for a circle of links
    inputs = {
        "the text parent": pair.text.path,
        "the image parent": pair.image.path,
        "the image tokenizer": None if network is None else network.folder,
        "the ancestor": recipe.uniform.base,
    }
    for name, folder in inputs.items():
        if folder is not None and place.is_relative_to(folder.resolve()):
            raise MergeError(f"{recipe.out}: lies inside {name}; choose a folder outside of it")
    check_parents(recipe.out)


def parent_files(parent: Parent) -> Files:
    """Every file of a parent that a merge reads. Raises CheckpointError for a link out of its folder."""
    found = {info.file for info in parent.checkpoint.tensors.values()}
    names = ("config.json", "jam.json", INDEX, *TOKENIZER_FILES)
    found |= {parent.path / name for name in names if (parent.path / name).is_file()}
    files = {file.relative_to(parent.path).as_posix(): (parent.path, file) for file in found}
    if parent.network is not None:
        folder = parent.network.folder
        if folder is None:
            found = {info.file for info in parent.network.source.tensors.values()}
            files |= {file.relative_to(parent.path).as_posix(): (parent.path, file) for file in found}
        else:
            found = {file for file in folder.rglob("*") if file.is_file()}
            # the parent's own folder may hold links to its siblings; one that the recipe names stands for itself
            root = parent.path if folder.is_relative_to(parent.path) else folder
            files |= {f"{FOLDER}/{file.relative_to(folder).as_posix()}": (root, file) for file in found}
    for root, file in files.values():
        check_place(root, file)
    return {name: file for name, (_, file) in sorted(files.items())}


def _top_files(folder: Path) -> Files:
    """The files of an ancestor's folder that a merge can read."""
    names = ("config.json", "jam.json", INDEX, *TOKENIZER_FILES)
    found = [file for file in sorted(folder.iterdir()) if file.suffix == ".safetensors" or file.name in names]
    for file in found:
        check_place(folder, file)
    return {file.name: file for file in found}


def _sizes(files: Files) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in files.items()}


def plan_key(plan: Plan, inputs: dict[str, Files], recipe: MergeRecipe) -> str:
    """SHA-256 over all that decides a merge's bytes: versions, recipe, jobs, and every input file by its path, size and
    time of change. The output's name is no part of it: the journal lies beside the output."""
    stats = {str(path.resolve()): path.stat() for files in inputs.values() for path in files.values()}
    parts = [
        [__version__, np.__version__, platform.python_version()],
        recipe.model_dump(mode="json", exclude={"out"}),
        [[job.name, job.shape, job.rule.fate] for job in plan.jobs],
        [dict(plan.figures), list(plan.notes)],
        [[path, stat.st_size, stat.st_mtime_ns] for path, stat in sorted(stats.items())],
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def make_plan(recipe: MergeRecipe) -> tuple[Plan, Pair]:
    """Read the parents' headers and plan. Raises MergeError naming the methods that would work instead."""
    pair = Pair(read_parent(recipe.text or assets.TEXT_PARENT, "text"), _image_parent(recipe))
    method = METHODS[recipe.method]
    if reasons := method.obstacles(pair, recipe):
        raise MergeError(f"{recipe.method} merge: {_refusal(reasons, pair, recipe)}")
    plan = method.plan(pair, recipe)
    return replace(plan, notes=(*plan.notes, *pair.image.notes)), pair


def _image_parent(recipe: MergeRecipe) -> Parent:
    """The image parent; an extension needs no more of one than its image tokenizer."""
    folder = recipe.image or assets.IMAGE_PARENT
    if recipe.method == "extend" and recipe.image_tokenizer is None and is_tokenizer(folder):
        return tokenizer_parent(folder)
    return read_parent(folder, "image", recipe.image_tokenizer)


def _refusal(reasons: list[str], pair: Pair, recipe: MergeRecipe) -> str:
    """The reason that matters, and the other methods where they are the way out: not where the recipe's settings or the
    parents' vocabularies are in the way, of which the reason says what to do."""
    if reason := pair.obstacle():
        return reason
    others = fitting_methods(pair)
    if recipe.method in others:
        return reasons[0]
    if others:
        return f"{reasons[0]}; use --method {' or '.join(others)}"
    return reasons[0] if ";" in reasons[0] else f"{reasons[0]}; no method can fuse these parents"


def fitting_methods(pair: Pair) -> list[str]:
    """The methods, under their default settings, that can fuse these parents."""
    found = []
    for name, method in METHODS.items():
        if not method.obstacles(pair, MergeRecipe(method=name, out=Path("out"))):
            found.append(name)
    return found


def _side_files(pair: Pair) -> dict[Path, Path]:
    """Files that are copied: target inside the output -> source. Of two equal tokenizers the image parent's is taken,
    which names all joint controls, else the text parent's; a chat template comes from the text parent if it has one."""
    text, image = pair.sides
    owner = image if pair.union.same else text
    files = {Path(name): owner.path / name for name in TOKENIZER_FILES if (owner.path / name).is_file()}
    if (text.path / "chat_template.jinja").is_file():
        files[Path("chat_template.jinja")] = text.path / "chat_template.jinja"
    return files


def _write_side_files(
    plan: Plan, pair: Pair, recipe: MergeRecipe, doubtful: list[str], files: dict[Path, Path], folder: Path
) -> None:
    for target, source in files.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / target)
    if pair.image.network is not None:
        pair.image.network.write(folder / FOLDER)
    write_json(folder / "config.json", plan.config)
    ids = {key: value for key, value in token_ids(plan.jam.vocabulary).items() if value is not None}
    write_json(folder / "generation_config.json", ids)
    plan.jam.write(folder)
    (folder / "merge.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "README.md").write_text(model_card(plan, pair, doubtful), encoding="utf-8")


def _write_report(record: dict, writer: ShardWriter, recipe: MergeRecipe) -> None:
    """report.json, which knows every other file of the output but the recipe: that one names the output folder, and
    the same merge under another name has the same report."""
    files = {
        file.relative_to(writer.folder).as_posix(): file for file in sorted(writer.folder.rglob("*")) if file.is_file()
    }
    del files[JOURNAL], files["merge.yaml"]
    record["files"]["output"] = _sizes(files)
    if recipe.hash:
        record["sha256"]["output"] = {name: writer.digests.get(name) or sha256_of(path) for name, path in files.items()}
    (writer.folder / "report.json").write_text(compact_json(record), encoding="utf-8")
