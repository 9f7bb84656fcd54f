"""A fused two-tower folder written tensor by tensor from two tiny parents, as the format says, without ``merge``.

The networks' laws then stand on their own: a mistake in the merge cannot hide one in the model, nor the reverse.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from jam.tokens.vocabulary import JamFile
from tests.tiny import randomize

TABLES = ("embed_tokens.weight", "lm_head.weight")


def tiny_cross(
    folder: Path,
    text: Path,
    image: Path,
    gate: float = 0.0,
    tables: str = "separate",
    exchanges: list[list[int]] | None = None,
    seed: int = 7,
) -> Path:
    """Fuses two parents of :func:`tests.tiny.tiny_pair` with equal tokenizers; every gate is ``gate``."""
    configs = {
        side: json.loads((path / "config.json").read_text()) for side, path in (("text", text), ("image", image))
    }
    record = JamFile.read(image)
    size = record.vocabulary.size
    depths = [configs[side]["num_hidden_layers"] for side in ("text", "image")]
    if exchanges is None:
        steps = min(depths) // 2
        exchanges = [
            [2 * depths[0] // min(depths) * (e + 1), 2 * depths[1] // min(depths) * (e + 1)] for e in range(steps)
        ]
    tensors: dict[str, torch.Tensor] = {}
    for side, path in (("text", text), ("image", image)):
        for name, tensor in load_file(path / "model.safetensors").items():
            if name.endswith(TABLES):
                mean = tensor.mean(0, keepdim=True)  # the row of an id that this parent never knew
                tensor = torch.cat([tensor, mean.expand(size - len(tensor), -1)])
            tensors[f"{side}.{name}"] = tensor
        configs[side]["vocab_size"] = size
    widths = {side: configs[side]["hidden_size"] for side in configs}
    if tables == "shared":
        _share(tensors, widths)
    tensors |= _fresh(widths, len(exchanges), seed, gate)
    config = {
        "model_type": "jam_cross",
        "architectures": ["JamCrossForCausalLM"],
        "text_config": configs["text"],
        "image_config": configs["image"],
        "exchanges": exchanges,
        "tables": tables,
        "ffn_ratio": 4,
        "vocabulary": record.vocabulary.to_json(),
        "vocab_size": size,
        "dtype": "float32",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(image / name, folder / name)
    shutil.copytree(image / "image_tokenizer", folder / "image_tokenizer")
    record.write(folder)
    return folder


def _fresh(widths: dict[str, int], count: int, seed: int, gate: float) -> dict[str, torch.Tensor]:
    """New tensors of every exchange: random matrices, norms of ones, the same gate everywhere."""
    blocks = torch.nn.Module()
    for index in range(count):
        for side, other in (("text", "image"), ("image", "text")):
            own, foreign = widths[side], widths[other]
            shapes = {
                "q_proj": (own, own),
                "k_proj": (own, foreign),
                "v_proj": (own, foreign),
                "out_proj": (own, own),
                "fc1": (4 * own, own),
                "fc2": (own, 4 * own),
            }
            for name, shape in shapes.items():
                blocks.register_parameter(f"{index}-{side}-{name}", torch.nn.Parameter(torch.empty(shape)))
    randomize(blocks, seed)
    tensors = {f"cross.{name.replace('-', '.')}.weight": value.data for name, value in blocks.named_parameters()}
    for index in range(count):
        for side, other in (("text", "image"), ("image", "text")):
            prefix = f"cross.{index}.{side}"
            tensors[f"{prefix}.norm_self.weight"] = torch.ones(widths[side])
            tensors[f"{prefix}.norm_other.weight"] = torch.ones(widths[other])
            tensors[f"{prefix}.norm_ffn.weight"] = torch.ones(widths[side])
            tensors[f"{prefix}.gate"] = torch.full((1,), gate)
    return tensors


def _share(tensors: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
    """Replaces both towers' tables by the text tower's, entered through a map and read through [I, 0]."""
    own = [name for name in tensors if name.endswith(TABLES)]
    table = next(tensors[name] for name in own if name.startswith("text.") and "embed" in name)
    for name in own:
        del tensors[name]
    tensors["shared.embed.weight"] = table
    tensors["shared.image_in.weight"] = torch.eye(widths["image"], widths["text"])
    tensors["shared.project.weight"] = torch.eye(widths["text"], widths["text"] + widths["image"])
