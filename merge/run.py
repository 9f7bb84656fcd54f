"""Running a merge: recipe to plan to a checkpoint folder that appears when whole.

Stages: read both parents' headers; ask the method what stands in the way, and refuse with the methods that would work;
plan; stream every job block by block through float32 to disk; write configuration, vocabulary, tokenizers, the resolved
recipe, the report and a model card; rename. Same inputs, recipe and version give the same bytes.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jam import __version__, assets
from jam.checkpoint import row_blocks, write_json
from jam.errors import CheckpointError, MergeError
from jam.floats import SHORT
from jam.models.families import HEAD
from jam.recipe import dump_recipe
from jam.shards import ShardWriter, TensorSpec, check_output
from merge import cross, uniform, width
from merge.plan import Job, Parent, Plan, read_parent, token_ids
from merge.recipe import MergeRecipe

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
    """``obstacles`` (text, image, recipe) lists why not; ``plan`` of the same makes the jobs."""

    obstacles: Callable[[Parent, Parent, MergeRecipe], list[str]]
    plan: Callable[[Parent, Parent, MergeRecipe], Plan]


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
    plan, parents = make_plan(recipe)
    if dry_run:
        _print_plan(plan, recipe)
        return None
    try:
        check_output(recipe.out)
    except CheckpointError as error:
        raise MergeError(str(error)) from None
    for parent in parents:
        if recipe.out.resolve().is_relative_to(parent.path.resolve()):
            raise MergeError(f"{recipe.out}: lies inside the {parent.side} parent; choose a folder outside of it")
    specs = [TensorSpec(job.name, SHORT[recipe.dtype], job.shape) for job in plan.jobs]
    side_files = _side_files(parents)
    side_bytes = sum(source.stat().st_size for source in side_files.values()) + (1 << 20)
    with ShardWriter(recipe.out, specs, side_bytes=side_bytes) as writer:
        _stream(plan, writer, recipe)
        _write_side_files(plan, parents, recipe, side_files, writer.folder)
        writer.finish()
    print(f"{recipe.out}: {plan.method} merge, {plan.parameters:,} parameters in {recipe.dtype}", file=sys.stderr)
    return recipe.out


def make_plan(recipe: MergeRecipe) -> tuple[Plan, tuple[Parent, Parent]]:
    """Read the parents' headers and plan. Raises MergeError naming the methods that would work instead."""
    text = read_parent(recipe.text or assets.TEXT_PARENT, "text")
    image = read_parent(recipe.image or assets.IMAGE_PARENT, "image")
    method = METHODS[recipe.method]
    if reasons := method.obstacles(text, image, recipe):
        others = fitting_methods(text, image, recipe)
        todo = f"use --method {' or '.join(others)}" if others else "no method can fuse these parents"
        raise MergeError(f"{recipe.method} merge: {reasons[0]}; {todo}")
    return method.plan(text, image, recipe), (text, image)


def fitting_methods(text: Parent, image: Parent, recipe: MergeRecipe) -> list[str]:
    """The methods, under their default settings, that can fuse these parents."""
    found = []
    for name, method in METHODS.items():
        tried = MergeRecipe(method=name, text=recipe.text, image=recipe.image, out=recipe.out)
        if not method.obstacles(text, image, tried):
            found.append(name)
    return found


def _stream(plan: Plan, writer: ShardWriter, recipe: MergeRecipe) -> None:
    """Every job through bounded memory; the bar counts bytes written and is shown on a terminal only."""
    console = Console(stderr=True)
    item = {"float32": 4}.get(recipe.dtype, 2)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("merging", total=plan.parameters * item)
        for job in plan.jobs:
            for block in row_blocks(job.shape):
                rows = job.rule.rows(block)
                writer.write(job.name, rows)
                progress.advance(task, rows.size * item)


def _side_files(parents: tuple[Parent, Parent]) -> dict[Path, Path]:
    """Files that are copied: target inside the output -> source. The tokenizer is the image parent's, which names all
    joint controls; a chat template comes from the text parent if it has one."""
    text, image = parents
    files = {Path(name): image.path / name for name in TOKENIZER_FILES if (image.path / name).is_file()}
    if (text.path / "chat_template.jinja").is_file():
        files[Path("chat_template.jinja")] = text.path / "chat_template.jinja"
    if image.jam.image_tokenizer is not None:
        source = image.path / image.jam.image_tokenizer
        for file in sorted(source.rglob("*")):
            if file.is_file():
                files[Path("image_tokenizer") / file.relative_to(source)] = file
    return files


def _write_side_files(
    plan: Plan, parents: tuple[Parent, Parent], recipe: MergeRecipe, files: dict[Path, Path], folder: Path
) -> None:
    for target, source in files.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_bytes(source.read_bytes())
    write_json(folder / "config.json", plan.config)
    ids = {key: value for key, value in token_ids(plan.jam.vocabulary).items() if value is not None}
    write_json(folder / "generation_config.json", ids)
    plan.jam.write(folder)
    (folder / "merge.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "report.json").write_text(compact_json(report(plan, parents, recipe)), encoding="utf-8")
    (folder / "README.md").write_text(model_card(plan, parents), encoding="utf-8")


def report(plan: Plan, parents: tuple[Parent, Parent], recipe: MergeRecipe) -> dict:
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
            for side in parents
        },
        "preserves": plan.preserves,
        "notes": list(plan.notes),
        "dtype": recipe.dtype,
        "parameters": plan.parameters,
        "settings": dict(plan.figures) | plan.measured(),
        "rows": dict(plan.rows),
        "tensors": {job.name: {"shape": list(job.shape), "from": job.rule.fate} for job in plan.jobs},
        "left_out": {side.side: _left_out(plan, side) for side in parents},
    }


def _left_out(plan: Plan, parent: Parent) -> list[str]:
    """Input tensors that the result does not hold: a head stored beside a tied table, buffers, heads that a shared one
    replaces."""
    dropped = [name for name in parent.checkpoint.tensors if name not in parent.axes]
    if plan.config.get("tables") == "shared":
        dropped += [name for name in parent.axes if name == HEAD]
    return dropped


def compact_json(value: dict) -> str:
    """Indented JSON with the innermost lists and ranges on one line each."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


def model_card(plan: Plan, parents: tuple[Parent, Parent]) -> str:
    """README.md of the result."""
    cross_model = plan.method == "cross"
    load = (
        "jam.models.load.load_bundle(Path(folder))" if cross_model else "AutoModelForCausalLM.from_pretrained(folder)"
    )
    lines = ["---", "library_name: transformers", "pipeline_tag: any-to-any", "tags: [jam, merge]", "---", ""]
    lines += [f"# {plan.method} merge", ""]
    for side in parents:
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


def _print_plan(plan: Plan, recipe: MergeRecipe) -> None:
    """The dry run's page, on stdout."""
    size = plan.parameters * (4 if recipe.dtype == "float32" else 2)
    print(f"{plan.method} merge to {recipe.out}: {plan.parameters:,} parameters, {size:,} bytes of {recipe.dtype}")
    print(f"preserves: {plan.preserves}")
    for note in plan.notes:
        print(f"note: {note}")
    print("tensors:")
    for job in plan.jobs:
        print(f"  {job.name} {_shape(job)}: {job.rule.fate}")
    for name, table in plan.rows.items():
        print(f"rows, {name}:")
        for start, stop, label in table["ranges"]:
            print(f"  [{start}, {stop}): {label}")


def _shape(job: Job) -> str:
    return f"[{', '.join(map(str, job.shape))}] = {prod(job.shape):,}"
