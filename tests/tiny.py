"""Tiny parents built in code: two checkpoint folders as users have them, random weights from fixed seeds.

``tiny_pair`` writes a text parent and an image parent (transformers config and fp32 weights, tokenizer.json of byte
level or of sentencepiece's kind, jam.json; the image parent also a VQ folder with 16 codes, 4 to an image). Weights
have a spread at which logits differ visibly: CM3Leon's own initialisation has zero output projections and would make
every law hold of itself.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from jam.document import CodesPart, Document, TextPart
from jam.models.tower import network_class
from jam.tokens.vocabulary import JamFile, Span, Vocabulary
from jam.tokens.vq import VQConfig, VQModel

CONTROLS = ("<s>", "<pad>", "</s>", "<mask>", "<infill>", "<break>", "<user>", "<assistant>")
MERGES = (
    *("Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "o n", "r e", "Ġ o", "a t", "i s", "Ġo f"),
    *("Ġa n", "Ġan d", "o r", "e n", "e s", "i t", "Ġ c", "a l", "Ġ s", "in g", "e d", "o u"),
)
CODES, CODES_PER_IMAGE = 16, 4
VQ = VQConfig(
    resolution=8,
    patch=2,
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    z_channels=8,
    embed_dim=4,
    n_embed=CODES,
)
_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
_OWN: dict[str, dict] = {
    "opt": {"ffn_dim": 64, "enable_bias": False, "layer_norm_elementwise_affine": False, "dropout": 0.0},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {},
    "olmo2": {},
    "emu3_text_model": {"attention_dropout": 0.0},
    "chameleon": {
        "vq_config": {"base_channels": 32, "embed_dim": 4, "num_embeddings": 8},
        "vocabulary_map": {"<image>": 4},
    },
}


def tiny_config(family: str, **changes) -> PreTrainedConfig:
    """A small configuration of any family; a change of depth drops what is listed by layer."""
    settings = _COMMON | _OWN[family] | changes
    if family == "opt":
        settings["word_embed_proj_dim"] = settings["hidden_size"]
        del settings["num_key_value_heads"], settings["intermediate_size"]
    if "num_hidden_layers" in changes:
        settings.pop("layer_types", None)
    return AutoConfig.for_model(family, **settings)


def tiny_tokenizer(merges: int = len(MERGES)) -> Tokenizer:
    """Byte-level BPE: ids 0-7 controls, 8-263 the bytes, then one id a merge."""
    words = [*CONTROLS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [tuple(merge.split()) for merge in MERGES[:merges]]
    words += ["".join(pair) for pair in pairs]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in CONTROLS])
    return tokenizer


LETTERS = ("▁", *"abcdefghijklmnopqrstuvwxyz")


def tiny_sentencepiece(merges: int = len(MERGES)) -> Tokenizer:
    """BPE of Llama 2's kind: ids 0-7 controls, 8-263 the bytes, then ``LETTERS``, then one id a merge; a word opens
    with ``▁``."""
    pairs = [tuple(merge.replace("Ġ", "▁").split()) for merge in MERGES[:merges]]
    words = [*CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, pairs, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in CONTROLS])
    return tokenizer


def tiny_vocabulary(images: bool, merges: int = len(MERGES), sentencepiece: bool = False) -> Vocabulary:
    """The text parent's (``images=False``) or the image parent's and joint vocabulary."""
    text_stop = len(CONTROLS) + 256 + merges + (len(LETTERS) if sentencepiece else 0)
    spans = (Span("control", 0, len(CONTROLS)), Span("text", len(CONTROLS), text_stop))
    controls = {"bos": 0, "pad": 1, "eos": 2}
    if not images:
        return Vocabulary(spans, controls)
    controls |= {"mask": 3, "infill": 4, "begin_image": 5, "end_image": 5, "user": 6, "assistant": 7}
    return Vocabulary((*spans, Span("image", text_stop, text_stop + CODES)), controls, CODES_PER_IMAGE)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every tensor from its own seeded stream: vectors near one, matrices and tables with a visible spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim == 1:
                parameter.copy_((0.1 * noise) + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise * (0.3 if "embed" in name else 0.17))


def tiny_parent(
    folder: Path,
    images: bool,
    seed: int,
    family: str = "opt",
    merges: int = len(MERGES),
    sentencepiece: bool = False,
    **changes,
) -> Path:
    """One parent in ``folder``; ``changes`` go to the transformers config."""
    vocabulary = tiny_vocabulary(images, merges, sentencepiece)
    config = tiny_config(family, vocab_size=vocabulary.size, **changes)
    model: PreTrainedModel = network_class(family)(config).to(torch.float32)
    randomize(model, seed)
    model.save_pretrained(folder)
    _write_tokenizer(folder, tiny_sentencepiece(merges) if sentencepiece else tiny_tokenizer(merges))
    JamFile(vocabulary, image_tokenizer="image_tokenizer" if images else None).write(folder)
    if images:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            VQModel(VQ).save(folder / "image_tokenizer")
    return folder


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    raw = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw, indent=2) + "\n")


def tiny_pair(tmp: Path, seed: int = 0, **changes) -> tuple[Path, Path]:
    """A text and an image parent under ``tmp``.

    Args:
        changes: keywords of :func:`tiny_parent` for both, or for one with the prefix ``text_`` or ``image_``
            (``image_hidden_size=48``, ``text_family="llama"``, ``image_merges=12`` for unequal tokenizers).
    """
    folders = []
    for offset, side in enumerate(("text", "image")):
        own = {
            name.removeprefix(f"{side}_"): value
            for name, value in changes.items()
            if not name.startswith(("text_", "image_"))
        }
        own |= {name.removeprefix(f"{side}_"): value for name, value in changes.items() if name.startswith(f"{side}_")}
        folders.append(tiny_parent(Path(tmp) / side, side == "image", 2 * seed + offset, **own))
    return folders[0], folders[1]


def edit_json(file: Path, change: dict) -> None:
    """Change values of a JSON file, each under its dotted path."""
    raw = json.loads(file.read_text())
    for path, value in change.items():
        *parts, last = path.split(".")
        at = raw
        for part in parts:
            at = at[part]
        at[last] = value
    file.write_text(json.dumps(raw))


def tiny_document(seed: int = 0, images: int = 1) -> Document:
    """A caption, ``images`` images with random codes, and a closing word."""
    generator = torch.Generator().manual_seed(seed)
    parts: list = [TextPart("a red cat")]
    for _ in range(images):
        codes = torch.randint(CODES, (CODES_PER_IMAGE,), generator=generator)
        parts += [CodesPart(tuple(codes.tolist())), TextPart(" and the end")]
    return Document(tuple(parts))
