"""Codes guessed ahead (``jam.decode.jacobi``) against one by one: forwards and seconds an image, and do they agree?

Images of the shipped model by chance (temperature 0.7, nucleus 0.9, guidance 2). Sides take turns prompt by prompt.
Their agreement in distribution is looked for in the nats a code that the model itself gives the images, each given its
prompt: means, and how many standard errors of their difference the sides lie apart (beyond 3 something is wrong).

    python -m benchmarks.jacobi             # 20 seeds of 6 prompts
    python -m benchmarks.jacobi --quick     # 2 seeds (under a minute)
"""

import argparse
import math
import statistics
import time
from dataclasses import replace

from jam.decode import slots
from jam.decode.engine import generate
from jam.decode.options import SamplingOptions
from jam.decode.stream import ReplyStream
from jam.document import Document, TextPart
from jam.evaluate.loss import caption_item, sum_nats
from jam.memory import keep_freed_memory
from jam.models.load import Bundle, load_bundle, quiet_transformers
from jam.shipped import model_folder

PROMPTS = [
    f"Draw {thing} in the {style} style."
    for thing, style in (
        ("a red apple", "flat"),
        ("a cat", "noto"),
        ("a smiling face", "twemoji"),
        ("a blue car", "fluent"),
        ("a green leaf", "noto"),
        ("a house", "flat"),
    )
]
OPTIONS = SamplingOptions(
    mode="image", max_images=1, image_temperature=0.7, image_top_p=0.9, image_beams=1, guidance_scale=2.0
)


class Counter:
    """Forwards of the decoder."""

    def __init__(self) -> None:
        self.forwards = 0
        for name in ("_forward", "ahead"):
            self._count(name)

    def _count(self, name: str) -> None:
        plain = getattr(slots.Slots, name)

        def counted(own: slots.Slots, *given):
            self.forwards += 1
            return plain(own, *given)

        setattr(slots.Slots, name, counted)


def draw(bundle: Bundle, prompt: Document, options: SamplingOptions) -> Document:
    stream = ReplyStream(bundle, [prompt], options)
    for step in generate(bundle, [prompt], options):
        stream.push(step)
    return stream.reply(0).document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=20)
    seeds = 2 if (given := parser.parse_args()).quick else given.seeds
    windows = (1, 8) if given.quick else (1, 2, 4, 8, 16)
    keep_freed_memory()
    with quiet_transformers():
        bundle = load_bundle(model_folder(None))
    bundle.pack()
    counter, took = Counter(), {window: 0.0 for window in windows}
    forwards, nats = dict.fromkeys(windows, 0), {window: [] for window in windows}
    prompts = [Document((TextPart(text, "user", 0.0),)) for text in PROMPTS]
    draw(bundle, prompts[0], OPTIONS)  # warm up
    for seed in range(seeds):
        for prompt in prompts:
            for window in windows:
                counter.forwards, began = 0, time.perf_counter()
                reply = draw(bundle, prompt, replace(OPTIONS, jacobi_window=window, seed=seed))
                took[window] += time.perf_counter() - began
                forwards[window] += counter.forwards
                item = caption_item(bundle, Document((*prompt.parts, *reply.parts)), bundle.max_positions)
                nats[window].append(sum_nats(bundle, [item]) / item.size)
    images = seeds * len(prompts)
    print(f"{images} images of {bundle.vocabulary.codes_per_image} codes\n")
    print("| window | forwards an image | s an image | one by one over it | nats a code | apart |")
    print("|---|---|---|---|---|---|")
    for window in windows:
        mean, spread = statistics.mean(nats[window]), statistics.variance(nats[window])
        error = math.sqrt((spread + statistics.variance(nats[1])) / images)
        print(
            f"| {window} | {forwards[window] / images:.1f} | {took[window] / images:.2f} "
            f"| {took[1] / took[window]:.2f} | {mean:.3f} | {abs(mean - statistics.mean(nats[1])) / error:.1f} |"
        )


if __name__ == "__main__":
    main()
