"""An image tokenizer's folder in the place of an image parent: codes and the controls around them, no network.

For ``merge.extend``, which takes nothing else of an image parent, and for whom there is none: an LLM and a VQGAN are
what most users have.
"""

from pathlib import Path

from jam.checkpoint import open_checkpoint
from jam.layouts import ModelFolder
from jam.models.family import Family, Sizes
from jam.tokens.vocabulary import JamFile, Span, Vocabulary
from jam.tokens.vq_config import VQConfig
from merge.image_network import given_network
from merge.plan import Parent

MODEL_TYPE = "vqgan"
CONTROLS = ("mask", "infill", "image", "user", "assistant")  # one id opens and closes an image, as CM3Leon's <break>
_FAMILY = Family(MODEL_TYPE, "VQModel", {}, {}, (), (), (), "")


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder is an image tokenizer's and nothing else. Raises CheckpointError for a damaged one."""
    path = Path(folder)
    if (path / "jam.json").exists() or (path / "tokenizer.json").exists() or not (path / "config.json").is_file():
        return False
    return open_checkpoint(path).config.get("model_type") == MODEL_TYPE


def tokenizer_parent(folder: Path) -> Parent:
    """The image parent that an image tokenizer's folder amounts to.

    Raises:
        CheckpointError: a damaged folder, or a configuration that is none.
        MergeError: its codebook is not that of its configuration.
    """
    source = open_checkpoint(folder)
    config = VQConfig.from_json({k: v for k, v in source.config.items() if k != "model_type"}, f"{folder}/config.json")
    jam = JamFile(_vocabulary(config))
    network = given_network(folder, ModelFolder(source, jam))
    sizes = Sizes(
        layers=0, heads=1, kv_heads=1, head_dim=0, model=0, ffn=0, vocab=jam.vocabulary.size, positions=0, tied=True
    )
    return Parent("image", network.source, _FAMILY, sizes, {}, jam, network, network.source)


def _vocabulary(config: VQConfig) -> Vocabulary:
    ids = {name: number for number, name in enumerate(CONTROLS)}
    broken = ids.pop("image")
    codes = Span("image", len(CONTROLS), len(CONTROLS) + config.n_embed)
    controls = ids | {"begin_image": broken, "end_image": broken}
    return Vocabulary((Span("control", 0, len(CONTROLS)), codes), controls, config.codes_per_image)
