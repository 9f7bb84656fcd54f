"""What a merge says about itself: report.json, the model card, and the dry run's page."""

import json
import platform
import re
import shutil
from math import prod
from pathlib import Path

import numpy as np

from jam import __version__
from jam.models.family import HEAD
from merge.doubts import agreements, doubts
from merge.forecast import Forecast
from merge.plan import Job, Parent, Plan
from merge.recipe import MergeRecipe
from merge.union import Pair


def report(plan: Plan, pair: Pair, recipe: MergeRecipe, doubtful: list[str]) -> dict:
    """Where everything comes from: parents, every tensor's fate, every vocabulary row's source.

    Args:
        doubtful: what ``doubts`` found.
    """
    return {
        "format": 1,
        "jam": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
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
        "checks": [*doubtful, *agreements(pair, plan.method)],
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
        elif plan.method == "extend" and parent.side == "image":
            fates[info.name] = "left out: the vocabulary and the image tokenizer alone are taken"
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
    # a line break is never inside a string of JSON
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\n *", " ", match[0]), text) + "\n"


def model_card(plan: Plan, pair: Pair, doubtful: list[str]) -> str:
    """README.md of the result; ``doubtful`` is what ``doubts`` found."""
    owner = pair.text if plan.method == "extend" else pair.image
    automatic = plan.method != "cross" and owner.family.automatic
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
    lines += [f"* check: {doubt}" for doubt in doubtful]
    lines += ["", f"Load with `{load}`. The weights are an initialisation: continue training before use.", ""]
    lines += ["`merge.yaml` is the recipe, `report.json` says where every tensor and vocabulary row came from.", ""]
    return "\n".join(lines)


def print_plan(plan: Plan, pair: Pair, recipe: MergeRecipe, cost: Forecast) -> None:
    """The dry run's page, on stdout."""
    print(
        f"{plan.method} merge to {recipe.out}: {plan.parameters:,} parameters, {cost.write:,} bytes of {recipe.dtype}"
    )
    free = shutil.disk_usage(existing(recipe.out)).free
    print(f"disk: {free:,} bytes are free" + (f", {cost.write - free:,} too few" if cost.write > free else ""))
    memory = "unknown" if cost.memory is None else f"about {cost.memory / 1e6:.0f} MB"
    print(f"memory: {memory}")
    if cost.seconds is None:
        print(f"time: not estimated: {cost.reason}")
    else:
        print(
            f"time: about {cost.seconds:.1f} s to read {cost.read:,} bytes and write as said; estimated from "
            f"{cost.sampled:,} bytes of this work, done now into a file that is gone"
        )
    print(f"preserves: {plan.preserves}")
    for note in plan.notes:
        print(f"note: {note}")
    for doubt in [*doubts(pair, plan.method), *agreements(pair, plan.method)]:
        print(f"check: {doubt}")
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


def existing(out: Path) -> Path:
    """The nearest folder above ``out`` that is there."""
    return next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
