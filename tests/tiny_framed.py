"""Tiny models whose images carry a size and row ends: 2 x 2 codes by default, any number of rows and columns.

``text`` writes the size as Emu3 does and has its image network (2 px a code); ``tokens`` writes it as Lumina-mGPT does
(2, 3, 4 or 5 rows or columns) and has jam's own (4 px a code).
"""

import json
from pathlib import Path

import torch
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from jam.models.cross import JamCrossForCausalLM
from jam.models.cross_config import JamCrossConfig
from jam.models.load import load_bundle
from jam.models.tower import network_class
from jam.tokens.vocabulary import JamFile, Span, Vocabulary
from jam.tokens.vq import VQModel
from tests.decode.bundles import EagerBundle, eager
from tests.tiny import CODES, CONTROLS, MERGES, VQ, _write_tokenizer, randomize, tiny_config, tiny_tokenizer

TEXT_STOP = len(CONTROLS) + 256 + len(MERGES)
SPARE = 8  # controls after the text
SPANS = (
    Span("control", 0, len(CONTROLS)),
    Span("text", len(CONTROLS), TEXT_STOP),
    Span("control", TEXT_STOP, TEXT_STOP + SPARE),
    Span("image", TEXT_STOP + SPARE, TEXT_STOP + SPARE + CODES),
)
SHARED = {"bos": 0, "pad": 1, "eos": 2, "mask": 3, "infill": 4, "begin_image": 5, "user": 6, "assistant": 7}
SHARED |= {"end_image": TEXT_STOP, "end_row": TEXT_STOP + 1}
OWN = {
    "text": {"begin_codes": TEXT_STOP + 2, "end_frame": TEXT_STOP + 3},
    "tokens": {f"size_{side}": TEXT_STOP + 2 + side for side in (2, 3, 4, 5)},
}
EMU3 = {
    "codebook_size": CODES,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "hidden_size": 64,
    "attn_resolutions": [1],
}
EMU3_SIZES = {"resolution": 4, "min_pixels": 24, "max_pixels": 64}


def framed_vocabulary(kind: str) -> Vocabulary:
    return Vocabulary(SPANS, SHARED | OWN[kind], 4)


def write_network(folder: Path, kind: str, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "tokens":
            VQModel(VQ).save(folder)
            return
        network = Emu3VQVAE(Emu3VQVAEConfig(**EMU3))
    randomize(network, seed)
    network.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | EMU3_SIZES))


def framed_parent(folder: Path, kind: str, seed: int = 1, family: str = "llama", **changes) -> Path:
    """A checkpoint folder with jam.json and an image tokenizer."""
    vocabulary = framed_vocabulary(kind)
    model = network_class(family)(tiny_config(family, vocab_size=vocabulary.size, **changes)).to(torch.float32)
    randomize(model, seed)
    model.save_pretrained(folder)
    _write_tokenizer(folder, tiny_tokenizer())
    JamFile(vocabulary, image_tokenizer="image_tokenizer").write(folder)
    write_network(folder / "image_tokenizer", kind, seed)
    return folder


def framed_bundle(folder: Path, kind: str, dtype: torch.dtype = torch.float64, **changes) -> EagerBundle:
    return eager(load_bundle(framed_parent(folder, kind, **changes), dtype))


def framed_cross_bundle(folder: Path, kind: str, dtype: torch.dtype = torch.float64) -> EagerBundle:
    """Two towers, the image one wider, gates far from zero."""
    bundle = load_bundle(framed_parent(folder, kind), dtype)
    tower = bundle.model.config.to_dict()
    config = JamCrossConfig(
        text_config=tower,
        image_config=tower | {"hidden_size": 48, "head_dim": 12},
        exchanges=[[2, 2], [4, 4]],
        vocabulary=bundle.vocabulary.to_json(),
        vocab_size=bundle.vocabulary.size,
    )
    bundle.model = JamCrossForCausalLM(config).to(dtype).eval()
    randomize(bundle.model, 7)
    return eager(bundle)
