"""Write the two mini parents, untrained: CM3Leon's architecture and initialisation at d = 256.

CM3Leon (arXiv 2309.02591, section 2.3) is OPT without biases, dropout and learnable layer norms, with learned
positions; weights are truncated normal (0.006, cut at 3 sigma), the attention output and second FFN matrices zero,
positions normal (0.0002). Both parents share the tokenizer; the image parent appends one id per image code.

    python recipes/mini/init_parents.py --out runs/mini --vq runs/vq/vq
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from finetune.scratch import CM3LEON_STD, cm3leon_weights
from jam.assets import MINI
from jam.tokens.vocabulary import JamFile, Span, Vocabulary
from jam.tokens.vq import VQModel

TEXT_IDS, CONTROL_IDS = 4096, 8
TEXT_CONTROLS = {"bos": 0, "pad": 1, "eos": 2}
ALL_CONTROLS = TEXT_CONTROLS | {"mask": 3, "infill": 4, "begin_image": 5, "end_image": 5, "user": 6, "assistant": 7}


# of what was tried on the tuned model, what showed the asked label most often (docs/log.md, *How to draw*)
SAMPLING = {"image_temperature": 0.0, "image_beams": 4, "guidance_scale": 1.0}


def config(vocab_size: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        word_embed_proj_dim=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        ffn_dim=1024,
        max_position_embeddings=1024,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def write(folder: Path, vocabulary: Vocabulary, vq: Path | None, seed: int) -> None:
    model = OPTForCausalLM(config(vocabulary.size))
    cm3leon_weights(model, CM3LEON_STD, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MINI / "tokenizer" / name, folder / name)
    if vq:
        VQModel.load(vq)  # refuses a damaged one
        shutil.copytree(vq, folder / "image_tokenizer", dirs_exist_ok=True)
    JamFile(vocabulary, "image_tokenizer" if vq else None, sampling=SAMPLING if vq else {}).write(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="gets text/ and image/")
    parser.add_argument("--vq", type=Path, required=True, help="the trained image tokenizer's folder")
    args = parser.parse_args()
    text_spans = (Span("control", 0, CONTROL_IDS), Span("text", CONTROL_IDS, TEXT_IDS))
    tokenizer = VQModel.load(args.vq).config
    codes = Span("image", TEXT_IDS, TEXT_IDS + tokenizer.n_embed)
    write(args.out / "text", Vocabulary(text_spans, TEXT_CONTROLS), None, seed=1)
    joint = Vocabulary((*text_spans, codes), ALL_CONTROLS, tokenizer.codes_per_image)
    write(args.out / "image", joint, args.vq, seed=2)


if __name__ == "__main__":
    main()
