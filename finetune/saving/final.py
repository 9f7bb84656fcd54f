"""``final/`` of a run: a plain ``from_pretrained`` folder that needs nothing of the run beside it."""

import json
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from finetune.lora import merged, save_adapter
from finetune.recipe import FinetuneRecipe
from finetune.saving import checkpoint
from finetune.scale.engines import Engine
from finetune.scale.ranks import Ranks
from finetune.scratch import own_record, trained_config
from jam.errors import RunError
from jam.models.load import Bundle, quiet_transformers
from jam.recipe import dump_recipe
from jam.shards import sync_path

DTYPES = ("float32", "bfloat16", "float16", "float64")


def _model_card(bundle: Bundle, recipe: FinetuneRecipe, tokens: int) -> str:
    """README.md of ``final/``: that of the model it was trained from would speak of an untrained merge."""
    mix = ", ".join(f"{name} {entry.weight:g}" for name, entry in recipe.data.mix.items())
    lines = ["---", "library_name: transformers", "tags: [jam]", "---", "", f"# {bundle.path.name}, trained", ""]
    kind = type(bundle.model).__name__
    if recipe.scratch is not None:
        lines[-2] = f"# {Path(recipe.output_dir).name}, trained from nothing"
    lines += [f"`{kind}`, {tokens:,} predicted tokens in sequences of {recipe.data.seq_len}; mix: {mix}.", ""]
    lines += ["`finetune.yaml` is the recipe; `merge.yaml` and `report.json`, where present, are of the merge.", ""]
    return "\n".join(lines)


def final_dtype(bundle: Bundle, recipe: FinetuneRecipe) -> torch.dtype:
    """The type of the weights in ``final/``: what config.json says.

    Raises:
        RunError: it names no type that holds weights; integers would cut every one of them to 0.
    """
    config = trained_config(bundle, recipe)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise RunError(
            f"{bundle.path}: dtype is {name!r:.60}; one of {', '.join(DTYPES)} is required to write the trained "
            "weights, mend config.json (or scratch.config)"
        )
    return getattr(torch, name)


def write_final(
    run: Path,
    bundle: Bundle,
    recipe: FinetuneRecipe,
    tokens: int,
    engine: Engine,
    ranks: Ranks,
    adapted: PeftModel | None = None,
) -> Path:
    """``final/``: weights in the parent checkpoint's dtype and every side file, appearing by rename; of adapters the
    merged weights, and ``adapter/`` for peft.

    For every rank at once: the first one gathers the weights into its main memory, in that dtype, and writes.

    Raises:
        RunError: the folder cannot be written; a weight that is no number.
    """
    final = run / "final"
    config, dtype = trained_config(bundle, recipe), final_dtype(bundle, recipe)
    state = {} if adapted is not None else _weights(bundle, dtype, engine, ranks.first)
    with ranks.together():
        if ranks.first:
            temporary = run / f".final.tmp-{os.getpid()}"
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                _side_files(temporary, bundle, recipe, tokens)
                if adapted is not None:
                    save_adapter(adapted, temporary / "adapter")
                    bundle.model = merged(adapted)
                    state = _weights(bundle, dtype, engine, True)
                _check_finite(final, state)
                with quiet_transformers():
                    bundle.model.save_pretrained(temporary, state_dict=state)
                _share(temporary)
                (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # no setting is changed
                if recipe.scratch is not None:
                    own_record(temporary)
                for path in (*temporary.rglob("*"), temporary):
                    sync_path(path)  # a name that is on disk before its content would look whole after a power cut
                checkpoint.discard(final)
                os.rename(temporary, final)
                sync_path(run)
            except RunError:
                raise
            except Exception as error:
                first = error.args[0][0][-1] if isinstance(error, shutil.Error) else error  # copytree lists every file
                reason = " ".join(str(first).split())
                raise RunError(
                    f"{final}: could not be written ({reason}); free space or permissions, then run again"
                ) from error
            finally:  # also when Ctrl+C ends it
                shutil.rmtree(temporary, ignore_errors=True)
    return final


def _weights(bundle: Bundle, dtype: torch.dtype, engine: Engine, keep: bool) -> dict[str, Tensor]:
    """The state dict, gathered tensor by tensor; tied tensors stay one. Empty where it is not kept."""
    read: dict[int, Tensor] = {}
    state = bundle.model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in read:
            full = engine.weight(tensor).read()
            read[id(tensor)] = full.to(dtype) if keep else full.new_empty(0)
    return {name: read[id(tensor)] for name, tensor in state.items()} if keep else {}


def _check_finite(final: Path, state: dict[str, Tensor]) -> None:
    """Raises RunError: the last step broke a weight, or it is too great for the type that it is written in."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise RunError(
                f"{final}: {name} has numbers that are not finite as {str(tensor.dtype).removeprefix('torch.')}; "
                "weights must be, nothing was written, checkpoints stay: lower optim.lr, or write a wider dtype into "
                "the model's config.json"
            )


def _side_files(folder: Path, bundle: Bundle, recipe: FinetuneRecipe, tokens: int) -> None:
    folder.mkdir()
    for item in sorted(bundle.path.iterdir()):
        if item.is_dir() and item.name == "adapter":
            continue  # of an earlier training
        if item.is_dir():
            shutil.copytree(item, folder / item.name)
        elif not item.name.startswith("model") and item.suffix != ".safetensors":
            shutil.copy2(item, folder / item.name)
    (folder / "finetune.yaml").write_text(dump_recipe(recipe))
    (folder / "README.md").write_text(_model_card(bundle, recipe, tokens))


def _share(folder: Path) -> None:
    """Gives safetensors files, which are written for their owner alone, the mode that the umask gives others."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)
