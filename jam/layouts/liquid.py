"""Liquid (Liquid_V1_7B): Gemma with 8,192 rows for the codes of Chameleon's VQGAN after its 256,000 tokens.

Three of Gemma's unused tokens are renamed ``<boi>``, ``<eoi>`` and ``<unconditional>``. Images are 512 px, 1,024 codes.
Its training data and sampler (FoundationVision/Liquid) write ``<bos> text <boi> codes <eoi> <eos>``, and
``<bos> <unconditional> <boi>`` for no condition.
"""

from jam.layouts.appended import Appended

LIQUID = Appended(
    name="Liquid",
    model_type="gemma",
    controls={"begin_image": "<boi>", "end_image": "<eoi>", "unconditional": "<unconditional>"},
    unconditional=("bos", "unconditional", "begin_image"),
    codes=8192,
    codes_per_image=1024,
    notes=(),
    lacks="Liquid ships no image network; to make pictures give image_tokenizer a folder made of Meta's vqgan.ckpt, "
    "whose codes are Liquid's in their own order",
    # defaults of the owner's evaluation/inference_t2i.py (4609c47); its demo page starts from 0.9 and top-p 0.99
    sampling={"image_temperature": 0.99, "image_top_p": 0.96, "image_top_k": 4096, "guidance_scale": 7.0},
)
