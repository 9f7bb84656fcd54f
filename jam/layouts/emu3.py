"""Emu3 as transformers ships it (Emu3-Gen-hf, Emu3-Chat-hf), or its language model alone.

``Emu3ForConditionalGeneration`` keeps the decoder's configuration under ``text_config`` and saves its tensors as
``text_model.*`` (as ``model.text_model.*`` where names are not converted back), the image network as ``vqmodel.*``. An
image token is named ``<|visual token 000000|>``. An image is

    begin, its size in text ("90*90"), <|image token|>, rows of codes that each end in <|extra_200|>, <|extra_201|>, end

with the rows and columns of its codes for a size (``jam.tokens.frame``).
"""

import re

from jam.checkpoint import Checkpoint, read_json
from jam.errors import CheckpointError
from jam.header import shown
from jam.layouts.view import ModelFolder, Owner, check_words, code_ids, split, unordered, vocabulary_of
from jam.tokens.vocabulary import JamFile
from jam.tokens.vq_config import CODEBOOK

CONTROLS = {
    "begin_image": "<|image start|>",
    "end_image": "<|image end|>",
    "begin_codes": "<|image token|>",
    "end_row": "<|extra_200|>",
    "end_frame": "<|extra_201|>",
}
RESOLUTION = 720  # pixels a side: a square of the area that Emu3's processor draws by default
# values of transformers' Emu3TextConfig and Emu3VQVAEConfig: it leaves keys out that have them
_TEXT = {
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 9216,
    "pad_token_id": 151643,
    "bos_token_id": 151849,
    "eos_token_id": 151850,
}
_NETWORK = {"codebook_size": 32768, "embed_dim": 4, "channel_multiplier": [1, 2, 2, 4]}
AREA = {"min_pixels": 512 * 512, "max_pixels": 1024 * 1024}  # of transformers' Emu3ImageProcessor
NOTES = (
    f"images are squares of {RESOLUTION} px where no other --image-size is asked for, and in training, which needs the "
    "context for them",
)
# the owner's image_generation.py (baaivision/Emu3, 005719f), where what it leaves out is transformers' default
SAMPLING = {"image_temperature": 1.0, "image_top_p": 1.0, "image_top_k": 2048, "guidance_scale": 3.0}
_CODE = re.compile(r"<\|visual token (\d{6})\|>")


def fits(owner: Owner) -> bool:
    if owner.config.get("model_type") == "emu3":
        return True
    return owner.config.get("model_type") == "emu3_text_model" and owner.has("<|visual token 000000|>")


def view(owner: Owner) -> ModelFolder:
    """Raises CheckpointError for a vocabulary, configuration or image network that is not whole."""
    where, composite = str(owner.path), owner.config.get("model_type") == "emu3"
    if owner.words is None:
        raise CheckpointError(f"{where}: no tokenizer.json; save the model's fast tokenizer into this folder")
    numbered: dict[int, list[int]] = {}
    words = owner.named_words
    check_words(words, where)
    for name, index in words.items():
        if spelled := _CODE.fullmatch(name):
            numbered.setdefault(int(spelled[1]), []).append(index)
    span, order = code_ids(numbered, "<|visual token 000000|>", where)
    if missing := next((name for name in CONTROLS.values() if name not in words), None):
        raise CheckpointError(f"{where}: no token {missing}; use the tokenizer of this model or write jam.json")
    config = dict(owner.config)
    if composite:
        inner = owner.config.get("text_config")
        config = _TEXT | (inner if isinstance(inner, dict) else {})
        config |= {"model_type": "emu3_text_model", "architectures": ["Emu3ForCausalLM"]}
        config["tie_word_embeddings"] = bool(owner.config.get("tie_word_embeddings", config.get("tie_word_embeddings")))
    given = owner.config.get("vq_config") or {}
    if not isinstance(given, dict):
        raise CheckpointError(
            f"{where}/config.json: vq_config is a {type(given).__name__}; a mapping is required, restore the file"
        )
    network = _NETWORK | given | {"model_type": "emu3_vqgan", "resolution": RESOLUTION} | _area(owner)
    renamed = {
        "text_model.model.": "model.",
        "text_model.lm_head.": "lm_head.",
        "model.text_model.": "model.",
    }
    decoder, passengers = split(owner, ("model.vqmodel.", "vqmodel."), renamed)
    found = Checkpoint(owner.path, network, passengers) if passengers else None
    if found is not None:
        _check_network(found, len(span), where)
    levels = network["channel_multiplier"]
    if not (isinstance(levels, list | tuple) and 1 <= len(levels) <= 9 and all(type(level) is int for level in levels)):
        raise CheckpointError(
            f"{where}/config.json: vq_config's channel_multiplier is {levels!r:.60}; a list of 1 to 9 whole numbers is "
            "required, restore it"
        )
    factor = 2 ** (len(levels) - 1)
    controls = {control: words[name] for control, name in CONTROLS.items()}
    vocabulary = vocabulary_of(owner, config, span, controls, (RESOLUTION // factor) ** 2)
    jam = JamFile(vocabulary, None, ("bos", "begin_image"), sampling=dict(SAMPLING))
    return ModelFolder(Checkpoint(owner.path, config, decoder), jam, "Emu3", found, unordered(order), NOTES)


def square_codes(network: dict) -> int | None:
    """Codes of the square that an image tokenizer folder makes; None for a config.json that is none of its class."""
    levels, side = network.get("channel_multiplier", _NETWORK["channel_multiplier"]), network.get("resolution", 512)
    if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= 9 or type(side) is not int:
        return None
    return (side // 2 ** (len(levels) - 1)) ** 2


def _area(owner: Owner) -> dict[str, int]:
    """Between how many pixels the owner's image processor brings what it reads. Raises CheckpointError for none."""
    found = dict(AREA)
    for name in ("preprocessor_config.json", "processor_config.json"):  # alone, or with the rest of the processor
        file = owner.path / name
        raw = read_json(file) if file.is_file() else {}
        inner = raw.get("image_processor", raw)
        found |= {key: inner[key] for key in AREA if isinstance(inner, dict) and key in inner}
    if any(type(size) is not int for size in found.values()) or not 1 <= found["min_pixels"] <= found["max_pixels"]:
        raise CheckpointError(
            f"{owner.path}: the image processor's min_pixels and max_pixels are {shown(list(found.values()))}; whole "
            "numbers in order are required, restore its file"
        )
    return found


def _check_network(network: Checkpoint, codes: int, where: str) -> None:
    """The codebook alone is looked at: the rest is transformers' own class, which checks it when it loads."""
    wanted = (network.config["codebook_size"], network.config["embed_dim"])
    if CODEBOOK not in network.tensors:
        raise CheckpointError(
            f"{where}: the image network's {CODEBOOK} {list(wanted)} is missing; a whole network is required, "
            "restore it"
        )
    info = network.tensors[CODEBOOK]
    if info.shape != wanted:
        raise CheckpointError(
            f"{where}: tensor {info.name} is {list(info.shape)}, vq_config asks for {list(wanted)}; they must agree, "
            "restore the folder"
        )
    if codes != wanted[0]:
        raise CheckpointError(
            f"{where}: {codes} image tokens, vq_config has {wanted[0]} codes; they must agree, use the tokenizer of "
            "this model"
        )
