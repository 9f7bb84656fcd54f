"""Running a merge: recipe to plan to a checkpoint folder that appears when whole.

Stages: read both parents' headers; ask the method what stands in the way, and refuse with the methods that would work;
plan; stream every job block by block through float32 to disk; write configuration, vocabulary, tokenizers, the resolved
recipe, the report and a model card; rename. Same inputs, recipe and version give the same bytes.
"""

import json
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jam import __version__, assets
from jam.checkpoint import row_blocks, write_json
from jam.errors import CheckpointError, MergeError
from jam.floats import SHORT
from jam.memory import keep_freed_memory
from jam.models.family import HEAD
from jam.recipe import dump_recipe
from jam.shards import ShardWriter, TensorSpec, check_output, encode
from merge import cross, uniform, width
from merge.image_network import FOLDER
from merge.plan import Copy, Job, Parent, Plan, read_parent, token_ids
from merge.recipe import MergeRecipe
from merge.union import Pair

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
}


def run_merge(recipe: MergeRecipe, dry_run: bool = False) -> Path | None:
    """Fuse two parents as the recipe says.

    Args:
        dry_run: print the fate of every tensor and row from headers alone, and write nothing.

    Returns:
        The output folder, or None for a dry run.

    Raises:
        MergeError: the parents do not allow the method, or the output folder is taken.
        CheckpointError: a damaged parent, NaN or infinite weights, values that overflow the output type.
        JamError: the disk is full.
    """
    plan, pair = make_plan(recipe)
    network = pair.image.network
    if dry_run:
        _print_plan(plan, pair, recipe)
        return None
    try:
        check_output(recipe.out)
    except CheckpointError as error:
        raise MergeError(str(error)) from None
    for parent in pair.sides:
        if recipe.out.resolve().is_relative_to(parent.path.resolve()):
            raise MergeError(f"{recipe.out}: lies inside the {parent.side} parent; choose a folder outside of it")
    given = None if network is None else network.folder
    if given is not None and recipe.out.resolve().is_relative_to(given.resolve()):
        raise MergeError(f"{recipe.out}: lies inside the image tokenizer; choose a folder outside of it")
    specs = [TensorSpec(job.name, SHORT[recipe.dtype], job.shape) for job in plan.jobs]
    side_files = _side_files(pair)
    side_bytes = sum(source.stat().st_size for source in side_files.values()) + (1 << 20)
    side_bytes += 0 if network is None else network.bytes
    keep_freed_memory()  # blocks come and go thousands of times
    with ShardWriter(recipe.out, specs, side_bytes=side_bytes) as writer:
        _stream(plan, writer, recipe)
        _write_side_files(plan, pair, recipe, side_files, writer.folder)
        writer.finish()
    print(f"{recipe.out}: {plan.method} merge, {plan.parameters:,} parameters in {recipe.dtype}", file=sys.stderr)
    return recipe.out


def make_plan(recipe: MergeRecipe) -> tuple[Plan, Pair]:
    """Read the parents' headers and plan. Raises MergeError naming the methods that would work instead."""
    pair = Pair(
        read_parent(recipe.text or assets.TEXT_PARENT, "text"),
        read_parent(recipe.image or assets.IMAGE_PARENT, "image", recipe.image_tokenizer),
    )
    method = METHODS[recipe.method]
    if reasons := method.obstacles(pair, recipe):
        others = fitting_methods(pair)
        todo = f"use --method {' or '.join(others)}" if others else "no method can fuse these parents"
        raise MergeError(f"{recipe.method} merge: {reasons[0]}; {todo}")
    plan = method.plan(pair, recipe)
    return replace(plan, notes=(*plan.notes, *pair.image.notes)), pair


def fitting_methods(pair: Pair) -> list[str]:
    """The methods, under their default settings, that can fuse these parents."""
    found = []
    for name, method in METHODS.items():
        if not method.obstacles(pair, MergeRecipe(method=name, out=Path("out"))):
            found.append(name)
    return found


AHEAD = 4  # blocks computed before the first of them is written: bounds the memory, keeps both threads busy


def _stream(plan: Plan, writer: ShardWriter, recipe: MergeRecipe) -> None:
    """Every job through bounded memory, block by block in order; the bar counts bytes written and is shown on a
    terminal only.

    Two threads read and compute (numpy lets go of the interpreter), this one writes. A job's first block is computed
    here: it settles what a rule works out once (a table's mean, a fitted map).
    """
    console = Console(stderr=True)
    dtype = SHORT[recipe.dtype]
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    total = sum(spec.bytes for spec in writer.specs)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
        ThreadPoolExecutor(2) as pool,
    ):
        task = progress.add_task("merging", total=total)
        waiting: deque[tuple[str, Future]] = deque()

        def write_next() -> None:
            name, stored = waiting.popleft()
            block = stored.result()
            writer.append(name, block)
            progress.advance(task, block.nbytes)

        try:
            for job, spec in zip(plan.jobs, writer.specs, strict=True):
                for number, block in enumerate(row_blocks(job.shape)):
                    if number == 0:
                        first: Future = Future()
                        first.set_result(_block(job, spec, dtype, block))
                        waiting.append((job.name, first))
                    else:
                        waiting.append((job.name, pool.submit(_block, job, spec, dtype, block)))
                    if len(waiting) > AHEAD:
                        write_next()
            while waiting:
                write_next()
        finally:
            pool.shutdown(cancel_futures=True)


def _block(job: Job, spec: TensorSpec, dtype: str, block: slice) -> np.ndarray:
    """A block of a job's rows as it is stored; a tensor that is copied in its own type is not converted."""
    rule = job.rule
    if isinstance(rule, Copy) and rule.parent.checkpoint.tensors[rule.tensor].dtype == dtype:
        return rule.parent.checkpoint.finite(rule.tensor, block)
    return encode(rule.rows(block), spec)


def _side_files(pair: Pair) -> dict[Path, Path]:
    """Files that are copied: target inside the output -> source. Of two equal tokenizers the image parent's is taken,
    which names all joint controls, else the text parent's; a chat template comes from the text parent if it has one."""
    text, image = pair.sides
    owner = image if pair.union.same else text
    files = {Path(name): owner.path / name for name in TOKENIZER_FILES if (owner.path / name).is_file()}
    if (text.path / "chat_template.jinja").is_file():
        files[Path("chat_template.jinja")] = text.path / "chat_template.jinja"
    return files


def _write_side_files(plan: Plan, pair: Pair, recipe: MergeRecipe, files: dict[Path, Path], folder: Path) -> None:
    for target, source in files.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_bytes(source.read_bytes())
    if pair.image.network is not None:
        pair.image.network.write(folder / FOLDER)
    write_json(folder / "config.json", plan.config)
    ids = {key: value for key, value in token_ids(plan.jam.vocabulary).items() if value is not None}
    write_json(folder / "generation_config.json", ids)
    plan.jam.write(folder)
    (folder / "merge.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "report.json").write_text(compact_json(report(plan, pair, recipe)), encoding="utf-8")
    (folder / "README.md").write_text(model_card(plan, pair), encoding="utf-8")


def report(plan: Plan, pair: Pair, recipe: MergeRecipe) -> dict:
    """Where everything comes from: parents, every tensor's fate, every vocabulary row's source."""
    return {
        "format": 1,
        "jam": __version__,
        "method": plan.method,
        "parents": {
            side.side: {
                "folder": side.path.name,
                "family": side.family.model_type,
                "identity": side.checkpoint.identity(),
                "dtypes": list(side.checkpoint.dtypes),
                "parameters": side.checkpoint.parameters,
            }
            for side in pair.sides
        },
        "preserves": plan.preserves,
        "notes": list(plan.notes),
        "dtype": recipe.dtype,
        "parameters": plan.parameters,
        "settings": dict(plan.figures) | plan.measured(),
        "text_rows_of_image_parent": pair.union.figures(),
        "image_tokenizer": None if pair.image.network is None else pair.image.network.origin,
        "rows": dict(plan.rows),
        "tensors": {job.name: {"shape": list(job.shape), "from": job.rule.fate} for job in plan.jobs},
        "inputs": {side.side: input_fates(plan, side) for side in pair.sides},
    }


def input_fates(plan: Plan, parent: Parent) -> dict[str, str]:
    """Every tensor of a parent's files: where in the result it went, or why it is left out."""
    used: dict[str, list[str]] = {}
    for job in plan.jobs:
        for side, tensor in job.rule.sources:
            if side == parent.side:
                used.setdefault(tensor, []).append(job.name)
    fates = {}
    for name, info in parent.checkpoint.tensors.items():
        if name in used:
            fates[info.name] = f"to {', '.join(used[name])}"
        elif name in parent.axes:
            fates[info.name] = "left out: a shared table and head take its place"
        elif name == HEAD:
            fates[info.name] = (
                "left out: the configuration ties the head to the table, and transformers ignores this copy"
            )
        else:
            fates[info.name] = "left out: a buffer that transformers computes anew"
    if parent.passengers is not None:
        kept = parent.side == "image" and parent.network.source is parent.passengers
        for name, info in parent.passengers.tensors.items():
            fates[info.name] = parent.network.fate(name) if kept else "left out: another image tokenizer is taken"
    return fates


def compact_json(value: dict) -> str:
    """Indented JSON with the innermost lists and ranges on one line each."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


def model_card(plan: Plan, pair: Pair) -> str:
    """README.md of the result."""
    automatic = plan.method != "cross" and pair.image.family.automatic
    load = "AutoModelForCausalLM.from_pretrained(folder)" if automatic else "jam.models.load.load_bundle(Path(folder))"
    lines = ["---", "library_name: transformers", "pipeline_tag: any-to-any", "tags: [jam, merge]", "---", ""]
    lines += [f"# {plan.method} merge", ""]
    for side in pair.sides:
        count = f"{side.checkpoint.parameters:,}"
        lines += [f"* {side.side} parent: `{side.path.name}`, {side.family.model_type}, {count} parameters"]
    lines += [
        f"* result: `{plan.config['architectures'][0]}`, {plan.parameters:,} parameters, {plan.config['dtype']}",
        "",
    ]
    lines += [f"Preserved: {plan.preserves}.", ""]
    lines += [f"* {note}" for note in plan.notes]
    lines += ["", f"Load with `{load}`. The weights are an initialisation: continue training before use.", ""]
    lines += ["`merge.yaml` is the recipe, `report.json` says where every tensor and vocabulary row came from.", ""]
    return "\n".join(lines)


def _print_plan(plan: Plan, pair: Pair, recipe: MergeRecipe) -> None:
    """The dry run's page, on stdout."""
    size = plan.parameters * (4 if recipe.dtype == "float32" else 2)
    place = next(folder for folder in (recipe.out.absolute(), *recipe.out.absolute().parents) if folder.is_dir())
    print(f"{plan.method} merge to {recipe.out}: {plan.parameters:,} parameters, {size:,} bytes of {recipe.dtype}")
    print(f"disk: {shutil.disk_usage(place).free:,} bytes are free")
    print(f"preserves: {plan.preserves}")
    for note in plan.notes:
        print(f"note: {note}")
    for side in pair.sides:
        print(f"from the {side.side} parent {side.path}:")
        shapes = side.stored_shapes()
        for name, fate in input_fates(plan, side).items():
            print(f"  {name} {list(shapes[name])}: {fate}")
    print("tensors of the result:")
    for job in plan.jobs:
        print(f"  {job.name} {_shape(job)}: {job.rule.fate}")
    for name, table in plan.rows.items():
        print(f"rows, {name}: {', '.join(f'{count} {label}' for label, count in table['counts'].items())}")
        for start, stop, label in table["ranges"]:
            print(f"  [{start}, {stop}): {label}")


def _shape(job: Job) -> str:
    return f"[{', '.join(map(str, job.shape))}] = {prod(job.shape):,}"
