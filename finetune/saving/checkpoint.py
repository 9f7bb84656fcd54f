"""Checkpoints of a run: whole or invisible.

Written to a temporary sibling, every file fsynced, listed with size and SHA-256 in MANIFEST.json, COMPLETE last, then
renamed. ``newest`` trusts only a folder whose COMPLETE is there and whose files verify; it falls back to the next older
one and says so. Tensors are safetensors, numbers JSON; no pickle.

The format knows nothing of ranks: tensors are whole and named by their parameters. Where they lie in shards, all ranks
take part in reading out one after another; the first rank writes, and never holds more than one.
"""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.saving.restored import DTYPES, check_fits, check_moments, state_problem, tensors_of
from finetune.scale.engines import Engine, Whole, laid_as, whole
from finetune.scale.ranks import Ranks
from jam.errors import RunError
from jam.shard_file import ShardFile
from jam.shards import header_of, sync_path

_FILES = ("model.safetensors", "state.json", "train/optimizer.safetensors")  # without which none can be resumed

_ADAPTER = re.compile(r"\.(lora_\w+|trainable_tokens_delta)\.")


def discard(folder: Path) -> None:
    """Removes a folder that looks whole, if it is there: it loses its name first, so a kill leaves no half of it."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.tmp-discard-{os.getpid()}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers under one name each, in their own type (float32). Of a network under adapters
    (``finetune.lora``) theirs alone: the rest is the parent's."""
    state = model.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in state.items() if _ADAPTER.search(name)} or state
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_tensors(path: Path, tensors: dict[str, Whole], writes: bool) -> str | None:
    """One safetensors file, tensor by tensor; its SHA-256 on the rank that writes.

    What goes wrong while writing is raised after the last tensor: the other ranks wait in each.
    """
    failed: Exception | None = None
    file: ShardFile | None = None
    try:
        if writes:
            try:
                file = ShardFile(path, hashed=True)
                sizes = {name: (DTYPES[t.dtype], t.shape, _bytes(t)) for name, t in tensors.items()}
                file.append(header_of(sizes))
            except Exception as error:
                failed = error
        for tensor in tensors.values():
            found = tensor.read()
            if file is not None and failed is None:
                try:
                    file.append(found.reshape(-1).view(torch.uint8).numpy().data)
                except Exception as error:
                    failed = error
        if failed is not None:
            raise failed
        done, file = file, None
        return None if done is None else done.finish()
    finally:
        if file is not None:
            file.drop()


def _bytes(tensor: Whole) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def save(
    run: Path, step: int, model: nn.Module, engine: Engine, ema: dict[str, Tensor] | None, state: dict, ranks: Ranks
) -> Path:
    """Writes ``checkpoint-<step>`` and points ``last`` at it; for every rank at once.

    Raises:
        RunError: the disk is full or the folder cannot be written; earlier checkpoints stay as they are.
    """
    final = run / f"checkpoint-{step}"
    temporary = run / f".checkpoint-{step}.tmp-{os.getpid()}"
    moments = {name: engine.moments(parameter) for name, parameter in _trained(model).items()}
    files = {
        "model.safetensors": {name: engine.weight(tensor) for name, tensor in own_tensors(model).items()},
        "train/optimizer.safetensors": {f"{n}.{key}": one[key] for n, one in moments.items() for key in sorted(one)},
    }
    if ema is not None:
        files["train/ema.safetensors"] = {name: whole(ema[name]) for name in sorted(ema)}
    with ranks.together():
        _save(final, temporary, files, {"step": step, **state}, ranks.first)
    return final


def _save(final: Path, temporary: Path, files: dict[str, dict[str, Whole]], state: dict, writes: bool) -> None:
    run = final.parent
    try:
        failed: Exception | None = None
        if writes:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / "train").mkdir(parents=True)
            except Exception as error:
                failed = error
        digests: dict[str, str | None] = {}
        for name, tensors in files.items():  # every rank to the end, whatever failed on the one that writes
            try:
                digests[name] = write_tensors(temporary / name, tensors, writes and failed is None)
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed
        if writes:
            _complete(final, temporary, digests, state)
    except Exception as error:
        # whatever it was, nothing half-written stays
        shutil.rmtree(temporary, ignore_errors=True)  # before the room is measured
        free = shutil.disk_usage(run).free
        raise RunError(
            f"{final}: could not be written ({error}); {free / 1e6:.0f} MB are free, earlier checkpoints stay; "
            "free space and run again to resume"
        ) from error
    finally:  # also when a second Ctrl+C ends it
        shutil.rmtree(temporary, ignore_errors=True)


def _complete(final: Path, temporary: Path, digests: dict[str, str | None], state: dict) -> None:
    """State and manifest, COMPLETE, and the folder under its name."""
    (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    digests = digests | {"state.json": _digest(temporary / "state.json")}
    manifest = {
        name: {"size": (temporary / name).stat().st_size, "sha256": digest} for name, digest in sorted(digests.items())
    }
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name in ("state.json", "MANIFEST.json"):  # the tensors are on disk
        sync_path(temporary / name)
    (temporary / "COMPLETE").write_text("")
    for folder in (temporary / "train", temporary):
        sync_path(folder)
    discard(final)
    os.rename(temporary, final)
    run = final.parent
    sync_path(run)
    link = run / ".last.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, run / "last")


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    if not (folder / "COMPLETE").exists():
        return "it has no COMPLETE mark"
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"its MANIFEST.json does not read ({error})"
    entries = manifest.values() if isinstance(manifest, dict) else ()
    if not all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in entries):
        return "its MANIFEST.json does not say size and sha256 of every file"
    if unlisted := [name for name in _FILES if not isinstance(manifest, dict) or name not in manifest]:
        return f"its MANIFEST.json does not list {unlisted[0]}"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['size']} are recorded"
        if _digest(path) != entry["sha256"]:
            return f"the content of {name} differs from its recorded hash"
    return state_problem(folder, step_of(folder))


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(folder.name.removeprefix("checkpoint-"))


def listed(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", p.name)]
    return sorted(found, key=step_of, reverse=True)


def newest(run: Path, warn) -> Path | None:
    """The newest checkpoint that verifies; ``warn(line)`` is told of every one skipped."""
    for folder in listed(run):
        reason = verify(folder)
        if reason is None:
            return folder
        warn(f"WARNING: {folder} is skipped: {reason}; going on from the next older checkpoint")
    return None


def load(folder: Path, model: nn.Module, engine: Engine) -> tuple[dict, dict[str, Tensor] | None]:
    """Puts weights and optimizer back, tensor by tensor; returns the state and the EMA (None if there is none).

    Raises:
        RunError: the checkpoint is of another model, or its optimizer of other parameters or of another kind.
    """
    own, trained = own_tensors(model), _trained(model)
    with tensors_of(folder / "model.safetensors") as file:
        missing, unexpected = own.keys() - file.keys(), file.keys() - own.keys()
        if unexpected or missing:
            raise RunError(
                f"{folder}: {len(missing)} tensors missing, {len(unexpected)} unexpected; "
                "it was made with another model, start a new output_dir"
            )
        check_fits(file, {name: engine.weight(tensor) for name, tensor in own.items()}, own.keys() - trained.keys())
        for name, tensor in own.items():
            engine.put_weight(tensor, file.get_tensor(name))
    with tensors_of(folder / "train/optimizer.safetensors") as file:
        keys: dict[str, list[str]] = {}
        for name in file.keys():  # noqa: SIM118  (no mapping)
            parameter, _, key = name.rpartition(".")
            keys.setdefault(parameter, []).append(key)
        if keys.keys() != trained.keys():
            raise RunError(
                f"the checkpoint's optimizer covers {len(keys)} parameters, this run trains {len(trained)}, not the "
                "same; resume with the recipe and the jam that made it, or start a new output_dir"
            )
        check_moments(
            file, keys, {name: engine.weight(one) for name, one in trained.items()}, _by_muon(trained, engine)
        )
        for name in keys:
            engine.put_moments(trained[name], {key: file.get_tensor(f"{name}.{key}") for key in keys[name]})
    state = json.loads((folder / "state.json").read_text())
    path = folder / "train/ema.safetensors"
    if not path.exists():
        return state, None
    with tensors_of(path) as file:
        check_fits(file, {name: engine.weight(trained[name]) for name in file.keys() if name in trained})  # noqa: SIM118
        return state, {name: laid_as(file.get_tensor(name), trained[name]) for name in file.keys()}  # noqa: SIM118


def _by_muon(trained: dict[str, nn.Parameter], engine: Engine) -> set[str]:
    """Names of the parameters that Muon updates, which sharded engines do not have."""
    groups = [] if engine.shards else engine.raw.param_groups
    ids = {id(one) for group in groups if group.get("part") == "muon" for one in group["params"]}
    return {name for name, parameter in trained.items() if id(parameter) in ids}


def rotate(run: Path, step: int, keep: int) -> None:
    """Removes all but the newest ``keep`` of the checkpoints up to ``step``, the one just written. Those beyond it did
    not verify when the run was resumed: they do not count, and go when the run gets there."""
    reached = [folder for folder in listed(run) if step_of(folder) <= step]
    for folder in reached[keep:]:
        discard(folder)


def remove_stale(run: Path) -> None:
    """Removes temporary folders that a killed run left (the run lock is held, so nobody is writing them)."""
    for folder in run.glob(".*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)
