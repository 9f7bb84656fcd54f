"""Sizes of a VQGAN, and how other projects write them down. Imports no torch.

One network, four spellings: taming-transformers' and Meta's Chameleon's yaml (``taming_config``), transformers'
``ChameleonVQVAEConfig`` (``chameleon_config``) and open-muse's, which LVM uses (``muse_config``). A setting that the
network of ``jam.tokens.vq`` does not have is refused by name. Parameter names are the same everywhere;
``own_name`` says which of a checkpoint's tensors belong to the tokenizer.
"""

from dataclasses import dataclass, fields

from jam.errors import CheckpointError
from jam.header import shown

PARTS = ("encoder.", "decoder.", "quantize.embedding.", "quant_conv.", "post_quant_conv.")
MAX_SIZE, MAX_BLOCKS, MAX_LEVELS = 1_000_000, 64, 16  # far above any real network: what is built grows with them
CODEBOOK = "quantize.embedding.weight"


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQGAN, under taming's names.

    ``resolution`` is the image side in pixels. ``patch`` folds patch x patch pixels into channels before the first
    convolution and unfolds them after the last (1 is the lineage's network; 2 removes the finest level, where a CPU
    spends most of its time). The grid has ``resolution / patch / 2 ** (len(ch_mult) - 1)`` codes a side;
    ``attn_resolutions`` are sides after folding. ``local`` swaps the encoder for ``LocalEncoder``
    and the decoder's norms for ``PositionNorm``; the decoder keeps its attention.

    ``decoder`` is False for a tokenizer that only reads images (transformers ships Chameleon's so). ``mid_attention``
    is False and ``unit_pixels`` True for open-muse's: no attention on the coarsest grid, and a network that was trained
    on pixels in [0, 1]; pixels outside the network are in [-1, 1] all the same.
    """

    resolution: int = 64
    patch: int = 2
    ch: int = 64
    ch_mult: tuple[int, ...] = (1, 2, 3)
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = (8,)
    z_channels: int = 192
    embed_dim: int = 32
    n_embed: int = 1024
    local: bool = False
    decoder: bool = True
    mid_attention: bool = True
    unit_pixels: bool = False

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "VQConfig":
        """Raises CheckpointError for a key that is none of these, of another type or out of bounds."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        if unknown := sorted(raw.keys() - kinds.keys()):
            raise CheckpointError(
                f"{where}: {shown(unknown[0])} is no setting of an image tokenizer; {', '.join(kinds)} are, restore it"
            )
        found: dict = {}
        for key in raw:
            if kinds[key] is bool and type(raw[key]) is not bool:
                raise CheckpointError(f"{where}: {key} is {_shown(raw[key])}; true or false is required, restore it")
            read = {int: _number, tuple: _numbers}.get(kinds[key])
            found[key] = raw[key] if read is None else read(raw, key, where)
        return cls(**found)

    @property
    def grid(self) -> int:
        return self.resolution // self.patch // 2 ** (len(self.ch_mult) - 1)

    @property
    def codes_per_image(self) -> int:
        return self.grid**2


def taming_config(raw: dict, where: str) -> VQConfig:
    """``model.params`` of a taming yaml: ``ddconfig``, ``embed_dim``, ``n_embed``.

    Raises:
        CheckpointError: a size is missing or no whole number, or the network is a variant that jam does not have.
    """
    params = _mapping(_mapping(raw, "model", where), "params", where)
    inner = _mapping(params, "ddconfig", where)
    attention = str(inner.get("attn_type", "vanilla"))
    _require(params, {"remap": (None,)}, where)
    _require(
        inner,
        {
            "double_z": (False,),
            "in_channels": (3,),
            "out_ch": (3,),
            "resamp_with_conv": (True, None),
            "attn_type": ("vanilla", "none", None),
            "use_linear_attn": (False, None),
            "tanh_out": (False, None),
            "give_pre_end": (False, None),
        },
        where,
    )
    return VQConfig(
        resolution=_number(inner, "resolution", where),
        patch=1,
        ch=_number(inner, "ch", where),
        ch_mult=_numbers(inner, "ch_mult", where),
        num_res_blocks=_number(inner, "num_res_blocks", where),
        attn_resolutions=_numbers(inner, "attn_resolutions", where) if attention == "vanilla" else (),
        z_channels=_number(inner, "z_channels", where),
        embed_dim=_number(params, "embed_dim", where),
        n_embed=_number(params, "n_embed", where),
        mid_attention=attention == "vanilla",
    )


def chameleon_config(raw: dict, where: str) -> VQConfig:
    """``vq_config`` of a transformers Chameleon, whose absent keys have its class's defaults; an encoder without a
    decoder. Raises CheckpointError as :func:`taming_config`."""
    defaults = {
        "resolution": 512,
        "base_channels": 128,
        "channel_multiplier": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": None,
        "latent_channels": 256,
        "embed_dim": 256,
        "num_embeddings": 8192,
    }
    raw = defaults | raw
    vanilla = raw.get("attn_type", "vanilla") == "vanilla"
    wanted = {"double_latent": (False, None), "in_channels": (3, None), "attn_type": ("vanilla", "None", None)}
    _require(raw, wanted, where)
    listed = raw["attn_resolutions"] is not None and vanilla
    return VQConfig(
        resolution=_number(raw, "resolution", where),
        patch=1,
        ch=_number(raw, "base_channels", where),
        ch_mult=_numbers(raw, "channel_multiplier", where),
        num_res_blocks=_number(raw, "num_res_blocks", where),
        attn_resolutions=_numbers(raw, "attn_resolutions", where) if listed else (),
        z_channels=_number(raw, "latent_channels", where),
        embed_dim=_number(raw, "embed_dim", where),
        n_embed=_number(raw, "num_embeddings", where),
        decoder=False,
        mid_attention=vanilla,
    )


def muse_config(raw: dict, where: str) -> VQConfig:
    """config.json of open-muse's ``VQGANModel`` (the tokenizer of LVM). Raises CheckpointError as
    :func:`taming_config`."""
    _require(raw, {"num_channels": (3, None), "resample_with_conv": (True, None)}, where)
    blocks, sides = _number(raw, "num_res_blocks", where), _numbers(raw, "attn_resolutions", where)
    if blocks == 1 and sides:
        raise CheckpointError(
            f"{where}: attn_resolutions {list(sides)} with one block a level; open-muse leaves that attention out, "
            "which jam does not imitate, use another tokenizer"
        )
    return VQConfig(
        resolution=_number(raw, "resolution", where),
        patch=1,
        ch=_number(raw, "hidden_channels", where),
        ch_mult=_numbers(raw, "channel_mult", where),
        num_res_blocks=blocks,
        attn_resolutions=sides,
        z_channels=_number(raw, "z_channels", where),
        embed_dim=_number(raw, "quantized_embed_dim", where),
        n_embed=_number(raw, "num_embeddings", where),
        mid_attention=not raw.get("no_attn_mid_block", False),
        unit_pixels=True,
    )


def own_name(name: str, where: str) -> str | None:
    """The tokenizer's tensor that a checkpoint's tensor is, or None for one of the training losses.

    >>> own_name("encoder.conv_in.weight", "x"), own_name("loss.discriminator.main.0.weight", "x")
    ('encoder.conv_in.weight', None)

    Raises:
        CheckpointError: the tensor belongs to another network.
    """
    if name.startswith(PARTS):
        return name
    if name.startswith("loss."):
        return None
    if name.startswith(("quantize.embed.", "quantize.proj.")):
        raise CheckpointError(
            f"{where}: tensor {name} is of a Gumbel quantizer, which picks codes by a learnt score; a codebook that is "
            "searched for the nearest entry (quantize.embedding.weight) is required, use the VQ variant"
        )
    raise CheckpointError(
        f"{where}: tensor {name} is no part of a VQGAN; {', '.join(PARTS)} and loss. are known, use another checkpoint"
    )


def _mapping(raw: dict, key: str, where: str) -> dict:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: {key} is {'missing' if value is None else f'a {type(value).__name__}'}; model.params.ddconfig, "
            "embed_dim and n_embed are required, give the yaml that belongs to the checkpoint with --config"
        )
    return value


def _number(raw: dict, key: str, where: str) -> int:
    value = raw.get(key)
    most = MAX_BLOCKS if key == "num_res_blocks" else MAX_SIZE
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(
            f"{where}: {key} is {_shown(value)}; a whole number from 1 to {most} is required, restore the file"
        )
    return value


def _numbers(raw: dict, key: str, where: str) -> tuple[int, ...]:
    value = raw.get(key)
    whole = isinstance(value, list | tuple) and all(type(item) is int and 0 < item <= MAX_SIZE for item in value)
    if not whole or len(value) > MAX_LEVELS or (not value and key != "attn_resolutions"):
        raise CheckpointError(
            f"{where}: {key} is {_shown(value)}; a list of whole numbers is required, {MAX_LEVELS} or fewer of 1 to "
            f"{MAX_SIZE}, restore the file"
        )
    return tuple(value)


def _shown(value: object) -> str:
    """A value in an error: its beginning, or its type for a number that Python does not write out."""
    huge = isinstance(value, int) and abs(value) > 10**18
    return f"a number of {value.bit_length()} bits" if huge else f"{value!r:.60}"


def _require(raw: dict, allowed: dict[str, tuple], where: str) -> None:
    for key, values in allowed.items():
        if raw.get(key) not in values:
            raise CheckpointError(
                f"{where}: {key} is {raw.get(key)!r}; {values[0]!r} is required, the network that jam has, use "
                "another image tokenizer"
            )
