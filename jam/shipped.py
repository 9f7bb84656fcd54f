"""The shipped models: each a merge recipe and a trained difference, merged on first use into the cache.

A fused model of parents that are shipped, or can be fetched, would repeat every weight that they already hold; what is
shipped instead is the recipe of the merge (``merge.yaml``) and what training changed (``difference.safetensors``). The
folder in the cache is named by a hash of everything that it is made from, so that another version never meets a stale
one, and appears by rename when whole. A shipped model that needs no merge (a folder with ``config.json``) is used where
it lies.
"""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from jam import assets
from jam.errors import CheckpointError
from jam.fetch import fetched
from jam.shards import remove_stale

RECIPE, DIFFERENCE = "merge.yaml", "difference.safetensors"


@dataclass(frozen=True)
class Parts:
    """What a shipped model is made from: the folder with recipe and difference, and its parents."""

    name: str
    chat: Path
    text: Path
    image: Path

    @property
    def key(self) -> str:
        """A hash of all parts; a fetched parent counts by its folder's name, which holds the hash of its weights."""
        folders = (self.text, self.image) if self.name == "mini" else (self.image,)
        files = sorted(path for path in self.chat.iterdir() if path.is_file())
        files += [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        key = content_key(files)
        return key if self.name == "mini" else f"{self.text.name.rpartition('-')[2][:8]}{key[:8]}"


def parts_of(name: str) -> Parts:
    """Raises CheckpointError when a part is missing; the message says how to get it."""
    if name == "mini":
        found = Parts(name, assets.CHAT, assets.TEXT_PARENT, assets.IMAGE_PARENT)
    else:
        found = Parts(name, assets.SHIPPED / name, fetched(name), assets.IMAGE_PARENT)
        if not found.text.is_dir():
            raise CheckpointError(f"{name}: its language model is not here; run: jam fetch {name}")
    needed = (found.chat / RECIPE, found.chat / DIFFERENCE, found.text, found.image)
    if missing := [path for path in needed if not path.exists()]:
        raise CheckpointError(
            f"{missing[0]}: missing; the shipped model {name} needs it, reinstall jam or give the path of a model"
        )
    return found


def content_key(files: list[Path]) -> str:
    """First 16 hex digits of a SHA-256 over names and bytes of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + str(file.stat().st_size).encode() + b"\0")
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def model_folder(path: Path | None) -> Path:
    """The folder that a user means: None is the default model, a bare name that of a shipped one unless such a folder
    is there. Raises as ``shipped_model``."""
    if path is None:
        return shipped_model()
    named = str(path) == "mini" or (str(path) == path.name and (assets.SHIPPED / path.name / DIFFERENCE).is_file())
    return shipped_model(str(path)) if named and not path.exists() else Path(path)


def shipped_model(name: str = "mini") -> Path:
    """Folder of a shipped chat model; the first call merges it (seconds) and says so on stderr.

    Raises:
        CheckpointError: the installation lacks the shipped weights, or a parent was not fetched.
    """
    if name == "mini" and (assets.CHAT / "config.json").is_file():
        return assets.CHAT
    parts = parts_of(name)
    cache = assets.cache_dir()
    final = cache / f"{'chat' if name == 'mini' else f'chat-{name}'}-{parts.key}"
    if (final / "config.json").is_file():
        return final
    print(f"jam: making the shipped model {name} from its parts, once (seconds)", file=sys.stderr)
    remove_stale(final)
    work = cache / f".{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        _build(parts, work)
        try:
            os.rename(work / "tuned", final)
        except OSError:  # another process was faster; its folder is whole and the same
            if not (final / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _build(parts: Parts, work: Path) -> None:
    """Merges into ``work/merged``, adds the difference into ``work/tuned``."""
    from jam.difference import apply_difference
    from jam.recipe import load_recipe
    from merge.recipe import MergeRecipe
    from merge.run import run_merge

    recipe = load_recipe(parts.chat / RECIPE, MergeRecipe)
    recipe = recipe.model_copy(update={"text": parts.text, "image": parts.image, "out": work / "merged"})
    work.mkdir(parents=True)
    run_merge(recipe, quiet=True)  # its folder is a step on the way
    tuned = apply_difference(work / "merged", parts.chat / DIFFERENCE, work / "tuned")
    for file in parts.chat.iterdir():  # its own model card and recipes, where it has them
        if file.is_file() and file.name not in (RECIPE, DIFFERENCE):
            shutil.copyfile(file, tuned / file.name)
