"""The shipped default model: a merge recipe and a trained difference, merged on first use into the cache.

A fused model of the shipped parents would repeat every weight that they already hold; what is shipped instead is the
recipe of the merge (``merge.yaml``) and what training changed (``difference.safetensors``). The folder in the cache is
named by a hash of everything that it is made from, so that another version never meets a stale one, and appears by
rename when whole. A shipped model that needs no merge (a folder with ``config.json``) is used where it lies.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from jam import assets
from jam.errors import CheckpointError

RECIPE, DIFFERENCE = "merge.yaml", "difference.safetensors"


def content_key(files: list[Path]) -> str:
    """First 16 hex digits of a SHA-256 over names and bytes of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + str(file.stat().st_size).encode() + b"\0")
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _ingredients(chat: Path, parents: tuple[Path, Path]) -> list[Path]:
    missing = [path for path in (chat / RECIPE, chat / DIFFERENCE, *parents) if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{missing[0]}: missing; the default chat model needs it, reinstall jam or give the path of a model"
        )
    own = sorted(path for path in chat.iterdir() if path.is_file())
    return own + [path for parent in parents for path in sorted(parent.rglob("*")) if path.is_file()]


def default_model() -> Path:
    """Folder of the shipped default chat model; the first call merges it (seconds) and says so on stderr.

    Raises:
        CheckpointError: the installation lacks the shipped weights, or a part of them.
    """
    chat, parents = assets.CHAT, (assets.TEXT_PARENT, assets.IMAGE_PARENT)
    if (chat / "config.json").is_file():
        return chat
    cache = assets.cache_dir()
    final = cache / f"chat-{content_key(_ingredients(chat, parents))}"
    if (final / "config.json").is_file():
        return final
    print("jam: making the default model from its parts, once (seconds)", file=sys.stderr)
    work = cache / f".{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        _build(chat, parents, work)
        try:
            os.rename(work / "tuned", final)
        except OSError:  # another process was faster; its folder is whole and the same
            if not (final / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _build(chat: Path, parents: tuple[Path, Path], work: Path) -> None:
    """Merges into ``work/merged``, adds the difference into ``work/tuned``."""
    from jam.difference import apply_difference
    from jam.recipe import load_recipe
    from merge.recipe import MergeRecipe
    from merge.run import run_merge

    recipe = load_recipe(chat / RECIPE, MergeRecipe)
    recipe = recipe.model_copy(update={"text": parents[0], "image": parents[1], "out": work / "merged"})
    work.mkdir(parents=True)
    run_merge(recipe)
    tuned = apply_difference(work / "merged", chat / DIFFERENCE, work / "tuned")
    for file in chat.iterdir():  # its own model card and recipes, where it has them
        if file.is_file() and file.name not in (RECIPE, DIFFERENCE):
            shutil.copyfile(file, tuned / file.name)
