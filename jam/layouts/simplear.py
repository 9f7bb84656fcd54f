"""SimpleAR (0.5B and 1.5B): Qwen2 with 64,000 rows for the codes of Cosmos-Tokenizer-DV8x16x16 after its tokens.

Its training code (wdrink/SimpleAR) writes ``<|t2i|> text <|soi|> codes`` and stops; no condition is
``<|t2i|> <|soi|>``. It has no token that closes an image: ``<|vtokens|>``, the stand-in for codes in its templates,
never reaches the network and is named so here. The released models draw at 1,024 px, 4,096 codes.
"""

from jam.layouts.appended import Appended

SIMPLEAR = Appended(
    name="SimpleAR",
    model_type="qwen2",
    controls={"bos": "<|t2i|>", "begin_image": "<|soi|>", "end_image": "<|vtokens|>"},
    unconditional=("bos", "begin_image"),
    codes=64_000,
    codes_per_image=4096,
    notes=(
        "SimpleAR opens every prompt with <|t2i|>, which is named bos, and closes no image: its stand-in <|vtokens|>, "
        "a row that it never trained, is named end_image",
        "codes_per_image is 4096, the 1024 px of the released models; a 512 px stage has 1024, write jam.json for it",
    ),
    lacks="its pictures are made by NVIDIA's Cosmos tokenizer (DV8x16x16), which jam does not have: it draws codes",
    # defaults of the owner's generate.py (d56b6e5); its top-k of 64,000 is every code
    sampling={"image_temperature": 1.0, "image_top_p": 1.0, "guidance_scale": 6.0},
)
