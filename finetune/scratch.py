"""A network trained from nothing: vocabulary and tokenizers of a folder, shape of the recipe, weights drawn afresh.

Stages: config.json of ``model`` with the recipe's shape laid over it -> the family's own class -> its weights, by the
class's initialisation or by CM3Leon's, under the recipe's seed alone, so that every rank and every resumed run draws
the same -> the side files of ``final/``. The folder's own weights are not read and may be absent.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from finetune.recipe import FinetuneRecipe, ScratchSection
from finetune.rows import fresh_rows
from jam.checkpoint import read_json
from jam.errors import RunError
from jam.models.families import FAMILIES
from jam.models.family import Family
from jam.models.load import Bundle, load_bundle
from jam.models.tower import network_class
from jam.tokens.belong import check_tokenizers
from jam.tokens.image import ImageTokenizer
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import JamFile, Vocabulary

CM3LEON_STD = 0.006  # CM3Leon, arXiv 2309.02591, section 2.3
POSITION_SHARE = 30  # of a position's standard deviation in the others': 0.0002 there
_RESIDUAL = ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")  # what a block adds goes through it
_BY_LAYER = ("layer_types", "no_rope_layers")  # lists that belong to the folder's depth; the class makes them anew
NOT_FROM_THE_FOLDER = ("finetune.yaml", "log.jsonl", "merge.yaml", "report.json")  # they speak of its weights


def starting_bundle(recipe: FinetuneRecipe, hollow: bool = False) -> Bundle:
    """What a run begins with, in float32: the recipe's model or new weights, and rows that begin anew.

    Args:
        hollow: parameters on the meta device, for a rank that gets them from the first one.

    Raises:
        CheckpointError: as ``jam.models.load.load_bundle`` or :func:`scratch_bundle`.
        RunError: as :func:`scratch_bundle` or ``finetune.rows.fresh_rows``.
    """
    if recipe.scratch is None:
        bundle = load_bundle(Path(recipe.model), dtype=torch.float32, hollow=hollow)
    else:
        bundle = scratch_bundle(Path(recipe.model), recipe.scratch, recipe.seed, hollow)
    if not hollow:
        fresh_rows(bundle.model, recipe.optim, recipe.seed)
    return bundle


def trained_config(bundle: Bundle, recipe: FinetuneRecipe) -> dict:
    """config.json of the network that is trained: the model's own, or that of the recipe's shape."""
    if recipe.scratch is None:
        return read_json(bundle.path / "config.json")
    return scratch_config(bundle.path, recipe.scratch, bundle.vocabulary)


def scratch_config(folder: Path, section: ScratchSection, vocabulary: Vocabulary) -> dict:
    """config.json of the new network.

    Raises:
        CheckpointError: no config.json, or one that does not read.
        RunError: a model type that is no single network of a known family, a key that its configuration does not have,
            sizes that do not divide.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise RunError(
            f"scratch: {folder} is a {kind}; one network of {', '.join(FAMILIES)} can be trained from nothing, name a "
            "folder of one"
        )
    family, default = FAMILIES[kind], AutoConfig.for_model(kind)
    own, known = {"model_type", "vocab_size", *_shape(family, section)}, default.to_dict()
    for key in section.config:
        if key in own or key not in known:
            why = "is set by other keys" if key in own else f"is no setting of a {kind} model"
            raise RunError(f"scratch.config: {key} {why}; remove it")
    if section.hidden_size % section.num_attention_heads:
        raise RunError(
            f"scratch: hidden_size {section.hidden_size} is no multiple of num_attention_heads "
            f"{section.num_attention_heads}; choose one that divides it"
        )
    config = {key: value for key, value in config.items() if key not in (*_BY_LAYER, "transformers_version")}
    config |= _shape(family, section) | section.config
    config |= {"architectures": [family.architecture], "vocab_size": vocabulary.size}
    if section.init_std is not None:
        config["init_std" if "init_std" in known else "initializer_range"] = section.init_std
    return config


def _shape(family: Family, section: ScratchSection) -> dict[str, int]:
    """The section's sizes under the family's own keys."""
    found = {
        family.keys["layers"]: section.num_hidden_layers,
        family.keys["model"]: section.hidden_size,
        family.keys["heads"]: section.num_attention_heads,
        family.keys["ffn"]: section.intermediate_size,
        family.keys["positions"]: section.max_position_embeddings,
    }
    if family.model_type == "opt":
        return found | {"word_embed_proj_dim": section.hidden_size}
    found["num_key_value_heads"] = section.num_key_value_heads or section.num_attention_heads
    if family.reads_head_dim:
        found["head_dim"] = section.head_dim or section.hidden_size // section.num_attention_heads
    return found


def fresh_network(config: dict, section: ScratchSection, seed: int, hollow: bool = False) -> PreTrainedModel:
    """The family's class in float32, its weights drawn under ``seed``; torch's own generator is left as it was.

    Args:
        hollow: nothing is drawn, parameters are on the meta device.

    Raises:
        RunError: transformers refuses the configuration.
    """
    kind = config["model_type"]
    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    with torch.random.fork_rng(devices=[]), init_empty_weights(False) if hollow else nullcontext():
        torch.manual_seed(seed)
        try:
            built: PreTrainedConfig = AutoConfig.for_model(kind, **settings)
            model = network_class(kind)(built).to(torch.float32)
            if not hollow:  # a dropout of 2 is found out here, not in the first step
                with torch.no_grad():
                    model.train()(torch.zeros(1, 1, dtype=torch.int64))
        except (
            *(AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
            StrictDataclassError,
        ) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"scratch: transformers refuses the configuration ({reason[:300]}); mend it") from error
    if hollow:
        model.tie_weights()
    elif section.init == "cm3leon":
        cm3leon_weights(model, CM3LEON_STD if section.init_std is None else section.init_std, seed)
    return model.eval()


@torch.no_grad()
def cm3leon_weights(model: PreTrainedModel, std: float, seed: int) -> None:
    """CM3Leon's initialisation (arXiv 2309.02591, section 2.3): truncated normal, cut at 3 ``std``; output layers zero;
    learned positions normal with ``std`` / 30.

    Which layers "output layers" means is not said there: here those that a block's sum goes through, as metaseq's
    switches have it, so that every block starts as the identity. Vectors (norms) stay as the class makes them.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(_RESIDUAL):
            parameter.zero_()
        elif "embed_positions" in name:
            parameter.normal_(std=std / POSITION_SHARE, generator=generator)
        elif parameter.dim() >= 2:
            nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)
    if model.config.pad_token_id is not None:
        model.get_input_embeddings().weight[model.config.pad_token_id].zero_()


def scratch_bundle(folder: Path, section: ScratchSection, seed: int, hollow: bool = False) -> Bundle:
    """A fresh network with the folder's vocabulary, tokenizers and image tokenizer, on the CPU.

    Raises:
        CheckpointError: no jam.json, config.json or tokenizer, or parts that do not belong together.
        RunError: as :func:`scratch_config` and :func:`fresh_network`.
    """
    record = JamFile.read(folder)
    text = TextTokenizer.load(folder)
    image = None if record.image_tokenizer is None else ImageTokenizer.load(folder / record.image_tokenizer)
    check_tokenizers(folder, record.vocabulary, text, image)
    model = fresh_network(scratch_config(folder, section, record.vocabulary), section, seed, hollow)
    return Bundle(folder, model, record.vocabulary, text, image, record.unconditional, record.sampling)


def own_record(folder: Path) -> None:
    """Takes out of a copied folder what speaks of the weights that it had."""
    for name in NOT_FROM_THE_FOLDER:
        (folder / name).unlink(missing_ok=True)
    record = JamFile.read(folder)
    JamFile(record.vocabulary, record.image_tokenizer, record.unconditional).write(folder)
