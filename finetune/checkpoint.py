"""Checkpoints of a run: whole or invisible.

Written to a temporary sibling, every file fsynced, listed with size and SHA-256 in MANIFEST.json, COMPLETE last, then
renamed. ``newest`` trusts only a folder whose COMPLETE is there and whose files verify; it falls back to the next older
one and says so. Tensors are safetensors, numbers JSON; no pickle.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jam.errors import RunError
from jam.shards import sync_path

_FILES = ("model.safetensors", "state.json", "train/optimizer.safetensors")  # without which none can be resumed

_ADAPTER = re.compile(r"\.(lora_\w+|trainable_tokens_delta)\.")


def discard(folder: Path) -> None:
    """Removes a folder that looks whole, if it is there: it loses its name first, so a kill leaves no half of it."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.tmp-discard-{os.getpid()}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def share(folder: Path) -> None:
    """Gives safetensors files, which are written for their owner alone, the mode that the umask gives others."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of tied tensors; trained tensors keep their dtype (float32). Of a network
    under adapters (``finetune.lora``) theirs alone: the rest is the parent's."""
    seen: set[int] = set()
    tensors = {}
    state = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if _ADAPTER.search(name)} or state
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().contiguous()
    return tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as named tensors: ``<parameter index>.<key>``."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts :func:`optimizer_tensors` back; the parameter groups must be those of the saved run.

    Raises:
        RunError: the state does not cover the optimizer's parameters.
    """
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = tensor
    expected = sum(len(group["params"]) for group in optimizer.param_groups)
    if len(entries) != expected:
        raise RunError(
            f"the checkpoint's optimizer covers {len(entries)} parameters, this run trains {expected}; "
            "resume with the recipe it was made with, or start a new output_dir"
        )
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def save(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor] | None, state: dict
) -> Path:
    """Writes ``checkpoint-<step>`` and points ``last`` at it.

    Raises:
        RunError: the disk is full or the folder cannot be written; earlier checkpoints stay as they are.
    """
    final = run / f"checkpoint-{step}"
    temporary = run / f".checkpoint-{step}.tmp-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "train").mkdir(parents=True)
        save_file(_unique_tensors(model), temporary / "model.safetensors")
        save_file(optimizer_tensors(optimizer), temporary / "train/optimizer.safetensors")
        if ema is not None:
            save_file({name: tensor.contiguous() for name, tensor in ema.items()}, temporary / "train/ema.safetensors")
        share(temporary)
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": _digest(path)} for path in files
        }
        (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for path in [*files, temporary / "MANIFEST.json"]:
            sync_path(path)
        (temporary / "COMPLETE").write_text("")
        for folder in (temporary / "train", temporary):
            sync_path(folder)
        discard(final)
        os.rename(temporary, final)
        sync_path(run)
        link = run / ".last.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, run / "last")
    except Exception as error:
        # safetensors reports a full disk as its own error class; whatever it was, nothing half-written stays
        shutil.rmtree(temporary, ignore_errors=True)  # before the room is measured
        free = shutil.disk_usage(run).free
        raise RunError(
            f"{final}: could not be written ({error}); {free / 1e6:.0f} MB are free, earlier checkpoints stay; "
            "free space and run again to resume"
        ) from error
    finally:  # also when a second Ctrl+C ends it
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    if not (folder / "COMPLETE").exists():
        return "it has no COMPLETE mark"
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
    except (OSError, ValueError) as error:
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
    return None


def listed(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("checkpoint-")))


def newest(run: Path, warn) -> Path | None:
    """The newest checkpoint that verifies; ``warn(line)`` is told of every one skipped."""
    for folder in listed(run):
        reason = verify(folder)
        if reason is None:
            return folder
        warn(f"WARNING: {folder} is skipped: {reason}; going on from the next older checkpoint")
    return None


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict[str, Tensor] | None]:
    """Puts weights and optimizer back; returns the state and the EMA (None if there is none)."""
    tensors = load_file(folder / "model.safetensors")
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    missing = _unique_tensors(model).keys() - tensors.keys()
    if unexpected or missing:
        raise RunError(
            f"{folder}: {len(missing)} tensors missing, {len(unexpected)} unexpected; "
            "it was made with another model, start a new output_dir"
        )
    restore_optimizer(optimizer, load_file(folder / "train/optimizer.safetensors"))
    ema = folder / "train/ema.safetensors"
    return json.loads((folder / "state.json").read_text()), load_file(ema) if ema.exists() else None


def rotate(run: Path, keep: int) -> None:
    for folder in listed(run)[keep:]:
        discard(folder)


def remove_stale(run: Path) -> None:
    """Removes temporary folders that a killed run left (the run lock is held, so nobody is writing them)."""
    for folder in run.glob(".*.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)
