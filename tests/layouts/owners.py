"""Tiny folders as the owners of image-text models ship them, written by their own transformers classes.

Every codebook has 16 codes. ``OWNERS`` names them; ``SMALL`` are the layouts with codebooks of that size, for owners
whose sizes are constants.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    PreTrainedModel,
)

from jam.layouts import chameleon, emu3
from jam.layouts.liquid import LIQUID
from jam.layouts.lvm import LVM
from jam.layouts.simplear import SIMPLEAR
from jam.models.tower import network_class
from tests.tiny import MERGES, randomize

CODES = 16
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
SMALL = (
    chameleon,
    emu3,
    replace(LIQUID, codes=CODES, codes_per_image=4),
    replace(SIMPLEAR, codes=CODES, codes_per_image=4),
    replace(LVM, codes=CODES, reserved=5, codes_per_image=4),
)


def write_tokenizer(folder: Path, first: list[str], added: tuple[str, ...], unused: tuple[str, ...] = ()) -> int:
    """Byte-level BPE whose tokens open with ``first``, of which ``added`` are special ones; returns its length."""
    pairs = [tuple(merge.split()) for merge in MERGES]
    words = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs), *unused]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(words)


def words_of(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(True)


def _save(model: PreTrainedModel, folder: Path, seed: int) -> Path:
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


def image_words(codes: int, seed: int) -> list[str]:
    """Chameleon's image tokens in an order of their own."""
    order = np.random.default_rng(seed).permutation(codes)
    return [f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z" for code in order]


def chameleon_owner(folder: Path, seed: int = 7, lumina: bool = False, **changes: object) -> Path:
    """ChameleonForConditionalGeneration: 16 px pictures, 4 codes each; ``lumina``: with tokens for sizes up to 6."""
    controls = ["<eoss>", "<racm3:break>", "<reserved08706>", "<image>", "<reserved08799>"]
    controls += [f"<reserved{8800 + number:05d}>" for number in range(4 * lumina)]  # the first stands for none
    first = ["<s>", "<pad>", "</s>", "<unk>", *image_words(CODES, 3), *controls]
    size = write_tokenizer(folder, first, ("<s>", "<pad>", "</s>", "<unk>"))
    network = {
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "latent_channels": 8,
        "embed_dim": 4,
        "num_embeddings": CODES,
        "resolution": 16,
    }
    own = {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 2, "vocabulary_map": words_of(folder)}
    config = ChameleonConfig(**(SIZES | own | {"vq_config": network} | changes))
    return _save(ChameleonForConditionalGeneration(config), folder, seed)


def emu3_owner(folder: Path, seed: int = 8) -> Path:
    """Emu3ForConditionalGeneration."""
    special = ("<|extra_203|>", "<|extra_204|>", "<|endoftext|>", *emu3.CONTROLS.values(), "<image>")
    images = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    size = write_tokenizer(folder, [*special, *images], special)
    text = SIZES | {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    network = {
        "codebook_size": CODES,
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "hidden_size": 64,
        "attn_resolutions": [1],
    }
    words = words_of(folder)
    config = Emu3Config(text_config=text | {"attention_dropout": 0.0}, vq_config=network, vocabulary_map=words)
    return _save(Emu3ForConditionalGeneration(config), folder, seed)


def plain(family: str, folder: Path, seed: int, size: int, **changes: object) -> Path:
    """A causal language model with rows for image codes."""
    config = AutoConfig.for_model(family, **(SIZES | {"vocab_size": size} | changes))
    return _save(network_class(family)(config), folder, seed)


def liquid_owner(folder: Path, seed: int = 9) -> Path:
    names = ("<pad>", "<eos>", "<bos>", "<boi>", "<eoi>", "<unconditional>")
    size = write_tokenizer(folder, list(names), names)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return plain("gemma", folder, seed, size + CODES, head_dim=16, tie_word_embeddings=True, **ids)


def simplear_owner(folder: Path, seed: int = 10) -> Path:
    names = ("<|endoftext|>", "<|im_end|>")
    added = ("<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>")
    size = write_tokenizer(folder, list(names), (*names, *added), unused=added)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return plain("qwen2", folder, seed, size + CODES, tie_word_embeddings=True, **ids)


def lvm_owner(folder: Path, seed: int = 11) -> Path:
    return plain("llama", folder, seed, CODES + 5)


OWNERS: dict[str, Callable[[Path], Path]] = {
    "Chameleon": chameleon_owner,
    "Emu3": emu3_owner,
    "Liquid": liquid_owner,
    "SimpleAR": simplear_owner,
    "LVM": lvm_owner,
}


@torch.inference_mode()
def raw_logits(name: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Scores [B, T, V] by the owner's own transformers class in float64, before Chameleon's mask over image ids."""
    classes = {"Chameleon": ChameleonForConditionalGeneration, "Emu3": Emu3ForConditionalGeneration}
    families = {"Liquid": "gemma", "SimpleAR": "qwen2", "LVM": "llama"}
    loader = classes.get(name) or network_class(families[name])
    model = loader.from_pretrained(folder, dtype=torch.float64).eval()
    if name == "Chameleon":
        return model.lm_head(model.model(ids).last_hidden_state)
    return model(ids).logits
