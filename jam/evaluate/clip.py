"""A CLIP in a folder as the judge of candidates: how near each image is to the prompt's words.

Two formats are read: open_clip's (``open_clip_config.json`` and ``open_clip_model.safetensors``) and transformers'
(``config.json`` of model type ``clip``, safetensors, tokenizer and ``preprocessor_config.json``). Either library is
given the folder alone: no hub is asked and no pickle is opened. What does not lie in the folder is refused.

Shapes: B images of a batch, D features.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from jam.checkpoint import check_place, open_checkpoint, read_json
from jam.decode.candidates import Judge
from jam.errors import CheckpointError, GenerationError
from jam.header import read_header
from jam.models.load import quiet_transformers

BATCH = 16  # images that are looked at in one go; at 336 px a large CLIP takes about a gigabyte for them
OPEN_CONFIG, OPEN_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
PREPARATIONS = ("preprocessor_config.json", "processor_config.json")

Features = Callable[[str, Sequence[Image]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ClipJudge:
    """A loaded CLIP. ``features`` gives a text's, [D], and images', [B, D]; words beyond its context are cut off."""

    folder: Path
    features: Features

    @classmethod
    def load(cls, folder: Path) -> "ClipJudge":
        """
        Raises:
            CheckpointError: no such folder, none of both formats, weights that are missing, damaged or a pickle, a
                part that only a hub has, or a folder that its library cannot load.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give the folder of a CLIP")
        return cls(folder, (_open_clip if (folder / OPEN_CONFIG).is_file() else _transformers)(folder))

    @torch.inference_mode()
    def scores(self, text: str, images: Sequence[Image]) -> list[float]:
        """100 times the cosine of each image with the text. Raises GenerationError for features that are no numbers."""
        found: list[float] = []
        for at in range(0, len(images), BATCH):
            text_D, images_BD = self.features(text, images[at : at + BATCH])
            found += (100 * torch.cosine_similarity(images_BD.double(), text_D.double(), dim=-1)).tolist()
        if not all(map(math.isfinite, found)):
            raise GenerationError(f"{self.folder}: its features are no finite numbers; use another CLIP")
        return found

    def of(self, text: str) -> Judge:
        """The judge of images that were asked for in these words. Raises GenerationError where there are none."""
        if not text.strip():
            raise GenerationError("the prompt has no words for CLIP to judge by; say some, or leave the judge out")
        return partial(self.scores, text)


def _open_clip(folder: Path) -> Features:
    import open_clip  # with torchvision it takes seconds

    check_place(folder, folder / OPEN_CONFIG)
    settings = read_json(folder / OPEN_CONFIG).get("model_cfg")
    weights = folder / OPEN_WEIGHTS
    if not weights.is_file():
        raise _unweighed(folder, OPEN_WEIGHTS)
    check_place(folder, weights)
    read_header(weights)
    for foreign in _foreign(settings):
        raise CheckpointError(
            f"{folder / OPEN_CONFIG}: {foreign} comes from a hub, which is not asked; use a CLIP of open_clip's own "
            "towers, or one in transformers' format"
        )
    where = f"local-dir:{folder}"
    try:
        model, prepare = open_clip.create_model_from_pretrained(where)
        words = open_clip.get_tokenizer(where)
    except Exception as error:  # it raises whatever a configuration led to
        raise _unreadable(folder, "open_clip", error) from error
    model.eval()

    def features(text: str, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        return model.encode_text(words([text]))[0], model.encode_image(torch.stack([prepare(one) for one in images]))

    return features


def _foreign(settings: object) -> Iterable[str]:
    """Parts of an open_clip configuration that name a place on a hub."""
    towers = settings if isinstance(settings, dict) else {}
    for tower, name in (("text_cfg", "hf_model_name"), ("vision_cfg", "timm_model_name")):
        value = towers[tower].get(name) if isinstance(towers.get(tower), dict) else None
        if value and (name == "hf_model_name" or ":" in str(value)):  # timm's own names have no schema
            yield f"{tower}.{name} {value!r:.100}"


def _transformers(folder: Path) -> Features:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: neither {OPEN_CONFIG} nor config.json; the folder of a CLIP in open_clip's or transformers' "
            "format is required"
        )
    if (found := read_json(folder / "config.json").get("model_type")) != "clip":
        raise CheckpointError(f"{folder}: model_type is {found!r:.100}; a CLIP (clip) is required to judge images")
    if not list(folder.glob("model*.safetensors*")):
        raise _unweighed(folder, "model.safetensors")
    open_checkpoint(folder)  # whole, and within the folder
    needed = {
        "a tokenizer (tokenizer.json)": any(all((folder / name).is_file() for name in names) for names in TOKENIZERS),
        PREPARATIONS[0]: any((folder / name).is_file() for name in PREPARATIONS),
    }
    if missing := next((name for name, there in needed.items() if not there), None):
        raise CheckpointError(f"{folder}: no {missing}; a whole CLIP folder is required, restore it")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            model, info = CLIPModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
            )
            prepare = CLIPProcessor.from_pretrained(folder, **local)
    except Exception as error:  # as above
        raise _unreadable(folder, "transformers", error) from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{folder}: {len(info['missing_keys'])} tensors are missing, {sorted(info['missing_keys'])[0]} among them; "
            "a whole CLIP is required, restore it"
        )
    longest = model.config.text_config.max_position_embeddings
    model.eval()

    def features(text: str, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        given = prepare(
            text=[text], images=list(images), truncation=True, max_length=longest, padding=True, return_tensors="pt"
        )
        out = model(**given)
        return out.text_embeds[0], out.image_embeds

    return features


def _unweighed(folder: Path, wanted: str) -> CheckpointError:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder}: weights only as {pickles[0]}, a pickle, which can run code when opened; {wanted} is required, "
            "get that release of the CLIP"
        )
    return CheckpointError(f"{folder}: no {wanted}; a CLIP with its weights is required, restore it")


def _unreadable(folder: Path, library: str, error: Exception) -> CheckpointError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return CheckpointError(f"{folder}: {library} cannot load it ({reason[:300]}); use a whole CLIP folder")
