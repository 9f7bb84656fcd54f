"""The encoder of Chameleon's VQGAN as transformers saves it: the image tokenizer's config.json, and its tensors.

Names are those of ``jam.tokens.vq``, so that tensors go over as they are. The half that draws is not in such a folder.
"""

from dataclasses import asdict

from jam.checkpoint import Checkpoint
from jam.errors import CheckpointError
from jam.tokens.vq_config import CODEBOOK, chameleon_config


def tokenizer_config(vq: object, where: str) -> dict:
    """config.json of the image tokenizer from ``vq_config``.

    Raises:
        CheckpointError: a setting that jam's network does not have, or a size that is no whole number.
    """
    found = chameleon_config(vq if isinstance(vq, dict) else {}, f"{where}: vq_config")
    sizes = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(found).items()}
    return {"model_type": "vqgan"} | sizes


def side(config: dict) -> int:
    """Codes along one side of the grid."""
    return config["resolution"] // config["patch"] // 2 ** (len(config["ch_mult"]) - 1)


def check_network(network: Checkpoint, where: str) -> None:
    """Raises CheckpointError for a tensor that is missing, unknown or of another shape than the configuration says."""
    wanted = encoder_shapes(network.config)
    for name, info in network.tensors.items():
        if name not in wanted:
            raise CheckpointError(
                f"{where}: tensor {info.name} {list(info.shape)} is no part of the image encoder of vq_config; the "
                "configuration must describe every tensor, mend it or use another checkpoint"
            )
    for name, shape in wanted.items():
        if name not in network.tensors:
            raise CheckpointError(
                f"{where}: the image network's {name} {list(shape)} is missing; a whole network is required, restore it"
            )
        if network.tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {network.tensors[name].name} is {list(network.tensors[name].shape)}, vq_config asks "
                f"for {list(shape)}; they must agree, restore the folder"
            )


def encoder_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the encoder, the codebook and the convolutions around it."""
    shapes: dict[str, tuple[int, ...]] = {CODEBOOK: (config["n_embed"], config["embed_dim"])}

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        shapes.update({f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)})

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    def block(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        convolution(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        convolution(f"{name}.conv2", out, out, 3)
        if into != out:
            convolution(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", channels, channels, 1)

    channels, pixels = config["ch"], config["resolution"]
    convolution("encoder.conv_in", channels, 3, 3)
    for level, multiplier in enumerate(config["ch_mult"]):
        for number in range(config["num_res_blocks"]):
            block(f"encoder.down.{level}.block.{number}", channels, config["ch"] * multiplier)
            channels = config["ch"] * multiplier
            if pixels in config["attn_resolutions"]:
                attention(f"encoder.down.{level}.attn.{number}", channels)
        if level + 1 < len(config["ch_mult"]):
            convolution(f"encoder.down.{level}.downsample.conv", channels, channels, 3)
            pixels //= 2
    for number in (1, 2):
        block(f"encoder.mid.block_{number}", channels, channels)
    if config["mid_attention"]:
        attention("encoder.mid.attn_1", channels)
    norm("encoder.norm_out", channels)
    convolution("encoder.conv_out", config["z_channels"], channels, 3)
    convolution("quant_conv", config["embed_dim"], config["z_channels"], 1)
    convolution("post_quant_conv", config["z_channels"], config["embed_dim"], 1)
    return shapes
