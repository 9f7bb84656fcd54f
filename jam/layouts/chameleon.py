"""Chameleon as transformers ships it: Chameleon-7B and 30B, Anole, MedMax, Lumina-mGPT.

One folder holds the decoder, the image encoder (``model.vqmodel``) and, in config.json, ``vocabulary_map``. An image
token is named ``IMGIMG``, its code in letters for digits (A is 0), ``Z``; ids need not be in the order of the codes.
``<racm3:break>`` opens an image, ``<eoss>`` closes it, ``<reserved08706>`` ends a turn; the unconditional prompt is
``<s> <racm3:break>``, as Meta's sampler has it. transformers carries no decoder of the image network: such a folder
reads images and draws codes, not pixels.

Lumina-mGPT (``mask_image_logits`` in its configuration) writes, after the token that opens an image, one token each for
its height and its width, ``<reserved08800>`` and the number of 32 px, and a ``<reserved08799>`` after each row of codes
(github.com/Alpha-VLLM/Lumina-mGPT, lumina_mgpt/data/item_processor.py).
"""

import re

import numpy as np

from jam.checkpoint import Checkpoint
from jam.errors import CheckpointError
from jam.header import shown
from jam.layouts import vqgan
from jam.layouts.view import ModelFolder, Owner, check_words, code_ids, split, unordered
from jam.tokens.vocabulary import CONTROL, IMAGE, MAX_IDS, TEXT, JamFile, Vocabulary

CONTROLS = {
    "bos": "<s>",
    "pad": "<pad>",
    "eos": "</s>",
    "begin_image": "<racm3:break>",
    "end_image": "<eoss>",
    "end_turn": "<reserved08706>",
}
REQUIRED = ("bos", "eos", "begin_image", "end_image")
ROW_END = "<reserved08799>"  # Lumina-mGPT's
UNCONDITIONAL = ("bos", "begin_image")
CODES_PER_IMAGE = 1024  # of the release: 512 px, 16 px a code
# defaults of the sampler in facebookresearch/chameleon, which Anole took over
SAMPLING = {
    **{"text_temperature": 0.7, "text_top_p": 0.9, "text_repetition_penalty": 1.2},
    **{"image_temperature": 0.7, "image_top_p": 0.9, "guidance_scale": 3.0, "image_guidance_scale": 1.2},
}
# defaults of lumina_mgpt/inference_solver.py (Alpha-VLLM/Lumina-mGPT, 250b9cf), with the temperature of its README,
# whose examples guide by 4
LUMINA_SAMPLING = {
    **{"text_temperature": 1.0, "text_top_p": 1.0, "text_top_k": 10},
    **{"image_temperature": 1.0, "image_top_p": 1.0, "image_top_k": 2000, "guidance_scale": 3.0},
}
SIZES, SIZE_CODES, MOST_SIZES = 8800, 2, 64  # Lumina-mGPT's: their first number, codes a step, up to 4:1 of 1024 px
LUMINA = (
    "images are squares of the image network's own resolution where no other --image-size is asked for, and in "
    "training: Lumina-mGPT-7B-768 was trained for 768x768, sides in steps of 32 px",
)
_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def chameleon_vocabulary(
    words: dict[str, int],
    size: int,
    codes_per_image: int = CODES_PER_IMAGE,
    rows: bool = False,
    where: str = "vocabulary_map",
) -> tuple[Vocabulary, np.ndarray]:
    """Chameleon's ids by the names of its tokens.

    Args:
        words: token to id.
        size: rows of the table.
        rows: name the tokens for an image's size and the end of a row (Lumina-mGPT).

    Returns:
        The vocabulary, and int64 [K]: the codebook index that each image id stands for, in the order of the ids.

    Raises:
        CheckpointError: a missing control, ids beyond the table or with two tokens, image tokens that are not one for
            each code.
    """
    check_words(words, where)
    numbered: dict[int, list[int]] = {}
    kinds = np.full(size, CONTROL, np.uint8)
    for name, index in words.items():
        if not 0 <= index < size:
            raise CheckpointError(
                f"{where}: token {shown(name)} has id {index}, the table {size} rows; a row for each is required, "
                "use the tokenizer of this model"
            )
        if name.startswith("IMGIMG"):
            spelled = _CODE.fullmatch(name)
            if spelled is None:
                raise CheckpointError(
                    f"{where}: image token {shown(name)}; IMGIMG, letters A to J and Z are required, restore the file"
                )
            numbered.setdefault(int(spelled[1].translate(_DIGITS)), []).append(index)
        elif not (len(name) > 2 and name.startswith("<") and name.endswith(">")):  # as Meta tells its specials
            kinds[index] = TEXT
    span, order = code_ids(numbered, "IMGIMG...Z", where)
    kinds[span.start : span.stop] = IMAGE
    named = CONTROLS
    if rows:
        numbers = range(1, MOST_SIZES + 1)
        sizes = {f"size_{SIZE_CODES * number}": f"<reserved{SIZES + number:05d}>" for number in numbers}
        named = CONTROLS | {"end_row": ROW_END} | sizes
    controls = {control: words[name] for control, name in named.items() if name in words}
    if missing := next((control for control in REQUIRED if control not in controls), None):
        raise CheckpointError(
            f"{where}: no token {CONTROLS[missing]}, Chameleon's {missing}; use the tokenizer of this model or write "
            "jam.json"
        )
    return Vocabulary.of_kinds(kinds, controls, codes_per_image), order


def fits(owner: Owner) -> bool:
    return owner.config.get("model_type") == "chameleon"


def view(owner: Owner) -> ModelFolder:
    """Raises CheckpointError for a vocabulary, configuration or image network that is not whole."""
    where, size = str(owner.path), owner.config.get("vocab_size")
    if type(size) is not int or not 1 <= size <= MAX_IDS:
        found = size if size is None else f"a {type(size).__name__} that is none or out of range"
        raise CheckpointError(
            f"{where}/config.json: vocab_size is {found}; a whole number from 1 to {MAX_IDS} is required, restore it"
        )
    network = vqgan.tokenizer_config(owner.config.get("vq_config"), f"{where}/config.json")
    lumina = "mask_image_logits" in owner.config
    vocabulary, order = chameleon_vocabulary(
        owner.named_words, size, vqgan.side(network) ** 2, rows=lumina, where=where
    )
    if vocabulary.codebook_size != network["n_embed"]:
        raise CheckpointError(
            f"{where}: {vocabulary.codebook_size} image tokens, vq_config has {network['n_embed']} codes; they must "
            "agree, use the tokenizer of this model"
        )
    decoder, passengers = split(owner, ("model.vqmodel.", "vqmodel."), {})
    # ids of another vocabulary and an encoder that is elsewhere would mislead whoever loads the decoder
    dropped = ("vocabulary_map", "vq_config", "image_token_id", "mask_image_logits")
    config = {key: value for key, value in owner.config.items() if key not in dropped}
    found = Checkpoint(owner.path, network, passengers) if passengers else None
    lacks = "the folder has no image network"
    if found is not None:
        vqgan.check_network(found, where)
        lacks = "its image network has no decoder: it reads pictures and draws codes"
    return ModelFolder(
        Checkpoint(owner.path, config, decoder),
        JamFile(vocabulary, None, UNCONDITIONAL, sampling=dict(LUMINA_SAMPLING if lumina else SAMPLING)),
        "Lumina-mGPT" if lumina else "Chameleon",
        found,
        unordered(order),
        LUMINA if lumina else (),
        f"{lacks}; to make pictures give image_tokenizer a folder made of Meta's vqgan.ckpt",
    )
