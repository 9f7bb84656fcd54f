"""Going on from a checkpoint: which one, whether this recipe and data made it, and the state put back."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import ValidationError

from finetune.data.inputs import changed_inputs, refused
from finetune.loop import StepReport, Trainer
from finetune.order.plan import ORDER
from finetune.recipe import FinetuneRecipe
from finetune.saving import checkpoint, tally
from jam.errors import RunError

# settings that a resumed run may not change
FIXED = ("model", "seed", "data", "objective", "loss", "scratch", "lora", "optim", "train")

# changes after which a step stands at other data
MOVES = ("data.", "content.data.", "objective.cm3", "objective.spans", "objective.clamp", "objective.condition_drop")
MOVES += ("train.global_batch_size",)


def fixed_settings(recipe: FinetuneRecipe) -> dict:
    """What a checkpoint is made under; the order of the data is not for a recipe to say, and fixed as well."""
    return {key: value for key, value in recipe.model_dump(mode="json").items() if key in FIXED} | {"order": ORDER}


def differences(old: object, new: object, at: str = "") -> list[str]:
    """``name: was a, is b`` of whatever differs between two trees of settings."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    return [] if old == new else [f"{at}: was {old}, is {new}"]


def changed_settings(recorded: dict, recipe: FinetuneRecipe) -> list[str]:
    """``name: was a, is b`` of every setting that differs; one that is newer than the record had its default."""
    order = recorded.get("order", "shuffled")  # before it was recorded
    recorded = {key: value for key, value in recorded.items() if key != "order"}
    with suppress(ValidationError):  # a setting that is gone: it is named as it stands
        recorded = fixed_settings(FinetuneRecipe.model_validate(recipe.model_dump(exclude=set(FIXED)) | recorded))
    return differences(recorded | {"order": order}, fixed_settings(recipe))


def resume(
    run: Path, recipe: FinetuneRecipe, trainer: Trainer, tell: Callable[[str], None], inputs: dict[str, str]
) -> list[StepReport]:
    """Puts the trainer where the newest good checkpoint left off, which the first rank finds for all; returns the steps
    that no line of the log tells of yet.

    Raises:
        RunError: none is whole; it was made under other settings, from other data or by another model.
    """
    ranks = trainer.ranks
    with ranks.together():
        found = _checkpoint(run, recipe, tell, inputs) if ranks.first else None
    found = ranks.told(found)
    if found is None:
        return []
    with ranks.together():
        state, ema = checkpoint.load(found, trainer.bundle.model, trainer.engine)
        averaged = trainer.ema is not None and state["settings"]["train"].get("ema") is not None
        if averaged and (ema or {}).keys() != trainer.ema.keys():
            raise RunError(
                f"{found}/train/ema.safetensors has {len(ema or {})} averages of {len(trainer.ema)} tensors; restore "
                "it, or remove the folder to go on from an older one"
            )
    if state["step"] > trainer.steps:  # resume_allow lets a run be shortened
        raise RunError(
            f"{found} is {state['step']} steps into a run of {trainer.steps}; as many at least are required, raise "
            "train.steps or train.tokens, or choose another output_dir"
        )
    trainer.step, trainer.tokens = state["step"], state["tokens"]
    if trainer.ema is not None:  # resume_allow lets an average come and go
        trainer.ema = ema
        if ema is None:
            trainer.start_average()  # from the checkpoint's weights, no longer the base's
    if (state["settings"], state.get("inputs")) == (fixed_settings(recipe), inputs):
        for source, walked in zip(trainer.plan.sources, state.get("walked", ()), strict=False):
            source.walk_from(*walked)
    read = state.get("read", [])
    same = len(read) == len(trainer.plan.sources)
    if same:
        trainer.read = torch.tensor(read, dtype=torch.float64)
    else:  # an older checkpoint, or sources came or went (resume_allow)
        tell(f"{found} does not say what was read of these sources; shares count from here on")
    tell(f"resuming from {found} (step {trainer.step} of {trainer.steps})")
    return tally.from_json(state["pending"]) if same else []


def _checkpoint(run: Path, recipe: FinetuneRecipe, tell: Callable[[str], None], inputs: dict[str, str]) -> Path | None:
    """The newest good checkpoint, made under this recipe from these inputs; None to start afresh."""
    found = None if recipe.resume == "never" else checkpoint.newest(run, tell)
    if found is None:
        if recipe.resume == "must":
            raise RunError(f"resume: must, but {run} holds no usable checkpoint; use resume: auto to start afresh")
        if recipe.resume == "auto" and checkpoint.listed(run):
            raise RunError(f"{run} holds checkpoints, but none verifies; move them away or choose another output_dir")
        if recipe.resume == "never" and checkpoint.listed(run):
            raise RunError(f"resume: never, but {run} holds checkpoints; move them away or choose another output_dir")
        return None
    recorded = json.loads((found / "state.json").read_text())
    changed = changed_settings(recorded["settings"], recipe) + changed_inputs(recorded.get("inputs", {}), inputs)
    if kept := refused(changed, recipe.resume_allow):
        raise RunError(
            f"{found} was made under other settings or from other data ({'; '.join(kept)}); resume with the old ones, "
            "choose another output_dir, or name in resume_allow what may differ"
        )
    if changed:
        tell(f"going on with what resume_allow names: {'; '.join(changed)}")
        if any(change.startswith(MOVES) for change in changed):
            tell(f"step {recorded['step']} is counted under these: some data may be read again and some left out")
    if "inputs" not in recorded:
        tell(f"{found} does not record its data and model; whether they are the same could not be checked")
    return found
