"""Low-rank adapters through peft: what they are laid over, the rows that learn beside them, and the folder they leave.

The network is changed in place, so that everything else goes on calling it as before. Frozen weights stay the parent's:
a run starts as the base bit for bit, and its checkpoints hold the adapter alone. LoRA (arXiv 2106.09685), rsLoRA (arXiv
2312.03732) and DoRA (arXiv 2402.09353) only: the others start elsewhere than at the base.
"""

import re
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from finetune.recipe import LoraSection
from jam.errors import RunError
from jam.models.cross import JamCrossForCausalLM
from jam.models.load import Bundle
from jam.models.span_head import owned_slices
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD
from jam.tokens.vocabulary import TEXT, Vocabulary


def targets(model: nn.Module, pattern: str | None) -> list[str]:
    """Names of the linear maps that get an adapter: all but heads and what the towers of a shared table read it by.

    Raises:
        RunError: none is left, or blocks of cross-attention whose gates are closed, which no adapter opens.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inner = [name for name in linear if name.split(".")[-1] != "lm_head" and not name.startswith("shared.")]
    found = [name for name in inner if pattern is None or re.search(pattern, name)]
    if not found:
        raise RunError(
            f"lora.targets: {pattern!r} matches no linear map inside the network, such as {inner[0]}; tables and heads "
            "have lora.new_rows; mend the pattern"
        )
    modules = dict(model.named_modules())
    for block in sorted({name.rpartition(".")[0] for name in found if name.startswith("cross.")}):
        if not modules[block].gate.any():
            raise RunError(
                f"lora: the gate of {block} is zero and frozen, so that its adapters would never learn; train the "
                "cross blocks first (recipes/cross_only.yaml), or leave them out by lora.targets"
            )
    return found


def new_rows(model: nn.Module, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Ids of controls and image codes by the table or head whose rows of them learn; of a tower's own head, its own."""
    kinds = np.full(model.config.vocab_size, TEXT)
    kinds[: vocabulary.size] = vocabulary.kinds()
    ids = set(np.flatnonzero(kinds != TEXT).tolist())
    if not isinstance(model, JamCrossForCausalLM):
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        chosen = {table: ids} if head.weight is table.weight else {table: ids, head: ids}  # peft ties what is tied
    elif model.config.tables == "shared":
        chosen = {model.shared.embed: ids}
    else:
        chosen = {tower.get_input_embeddings(): ids for tower in (model.text, model.image)}
        for tower, kind in ((model.text, TEXT_HEAD), (model.image, IMAGE_HEAD)):
            own = {id for part in owned_slices(vocabulary, kind) for id in range(part.start, part.stop)}
            chosen[tower.lm_head] = ids if _tied(tower) else ids & own
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: sorted(rows) for module, rows in chosen.items()}


def _towers(model: nn.Module) -> list[nn.Module]:
    separate = isinstance(model, JamCrossForCausalLM) and model.config.tables == "separate"
    return [model.text, model.image] if separate else []


def _tied(tower: nn.Module) -> bool:
    return tower.lm_head.weight is tower.get_input_embeddings().weight


def adapt(bundle: Bundle, lora: LoraSection, seed: int) -> PeftModel:
    """Lays adapters over the bundle's network, in place; what it returns saves and merges them.

    Raises:
        RunError: as :func:`targets`; a rank that no map has; ``new_rows`` of a vocabulary of text alone.
    """
    model = bundle.model
    rows = new_rows(model, bundle.vocabulary) if lora.new_rows else None
    names = targets(model, lora.targets)
    widest = max(min(model.get_submodule(name).weight.shape) for name in names)
    if lora.r > widest:
        raise RunError(f"lora.r is {lora.r}, and no map that it adapts has a rank above {widest}; lower lora.r")
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        use_rslora=lora.method == "rslora",
        use_dora=lora.method == "dora",
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # every rank draws the same
        tied = [tower for tower in _towers(model) if rows and _tied(tower)]
        adapted = get_peft_model(model, config)
    for tower in tied:  # peft ties a model's own table and head, and knows of no towers
        table, head = (m.token_adapter.trainable_tokens_delta for m in (tower.get_input_embeddings(), tower.lm_head))
        head["default"] = table["default"]
    return adapted


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """The folder that peft loads onto the base."""
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form, unfilled


def merged(adapted: PeftModel) -> nn.Module:
    """The plain network with the adapters in its weights, added in float32; the adapters are gone."""
    return adapted.float().merge_and_unload()
