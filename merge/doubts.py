"""What is allowed in a merge and may still disappoint: said before it runs and in its report, never decided upon.

Lineage is read off a few blocks of weights: two models of one ancestor have nearly parallel matrices, two that were
trained apart have none. Everything else is read off the configurations.
"""

import math

import numpy as np

from jam.checkpoint import row_blocks
from jam.errors import CheckpointError
from jam.models.traits import trait
from merge.plan import Parent
from merge.union import Pair

SAMPLE = 1 << 15  # elements of a matrix that are compared
FRAME = 2  # controls that open and close an image
RELATED, APART = 0.5, 0.1  # correlations above and below which it is said


def doubts(pair: Pair, method: str) -> list[str]:
    """One line for each."""
    text, image = pair.sides
    found = []
    if method in ("uniform", "width"):
        found += _lineage(text, image)
        if text.sizes.positions != image.sizes.positions:
            fewer = min(text.sizes.positions, image.sizes.positions)
            found.append(f"positions are {text.sizes.positions} and {image.sizes.positions}: the result has {fewer}")
    elif method == "cross":
        for key in ("rope", "rms_norm_eps"):
            if all(key in side.family.alike for side in pair.sides):
                ours, theirs = (trait(side.config, key, f"{side.path}/config.json") for side in pair.sides)
                if ours != theirs:
                    found.append(f"{key} is {ours!r} and {theirs!r}: each tower keeps its own")
    context, theirs = text.sizes.positions, image.sizes.positions
    if method == "extend":
        theirs = context  # the image parent's network is no part of the result
    framed, codes = image.vocabulary.framed, image.vocabulary.codes_per_image
    least = codes + FRAME + (math.isqrt(codes) if framed else 0)
    if method == "cross" and context != theirs:
        found.append(f"positions are {context} and {theirs}: the result's context is {min(context, theirs)}")
    if min(context, theirs) < least:
        whose = "image parent has" if theirs < least and method != "extend" else "result has"
        fits = "no square of that size fits, smaller images do" if framed else "no whole image fits"
        around = "its two controls and row ends" if framed else "its two controls"
        found.append(f"an image takes {least} positions with {around}, and the {whose} {min(context, theirs)}: {fits}")
    if method != "extend" and text.checkpoint.dtypes != image.checkpoint.dtypes:
        ours, theirs = (", ".join(side.checkpoint.dtypes) for side in pair.sides)
        found.append(f"stored as {ours} and {theirs}: the coarser one's rounding stays in the result")
    return found


def agreements(pair: Pair, method: str) -> list[str]:
    """What a method requires and was looked at: no doubt, and of use to who reads a plan."""
    if method not in ("uniform", "width"):
        return []
    return [f"equal in both parents: {', '.join((*pair.text.family.alike, 'layers', 'head_dim'))}"]


def matrices(text: Parent, image: Parent) -> list[str]:
    """The first, the middle and the last matrix that both parents have in one shape, tables left out."""
    names = [
        name
        for name, axes in text.axes.items()
        if len(axes) == 2 and axes[0] not in ("vocab", "positions") and name in image.axes
        if text.shape(name) == image.shape(name)
    ]
    return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]])) if names else []


def _lineage(text: Parent, image: Parent) -> list[str]:
    correlations, spreads = [], []
    for name in matrices(text, image):
        block = next(row_blocks(text.shape(name), SAMPLE))
        try:
            ours, theirs = (side.checkpoint.read(name, block).astype(np.float64) for side in (text, image))
        except CheckpointError:  # the stream refuses such a tensor and counts over all of it
            continue
        sizes = [float(np.sqrt(np.square(values).sum())) for values in (ours, theirs)]
        if min(sizes) > 0:
            correlations.append(float((ours * theirs).sum()) / (sizes[0] * sizes[1]))
            spreads.append(sizes[0] / sizes[1])
    if not correlations:
        return ["lineage: no matrices of one shape with values in them, nothing is known"]
    shown = ", ".join(f"{value:.2f}" for value in correlations)
    if min(correlations) > RELATED:
        verdict = "the parents share an ancestor"
    elif max(correlations) < APART:
        verdict = "the parents were trained apart; what joins or averages their features is an initialisation at best"
    else:
        verdict = "the parents are related in part"
    found = [f"lineage: correlations of sampled matrices {shown}: {verdict}"]
    if max(spreads) > 2 or min(spreads) < 0.5:
        shown = ", ".join(f"{value:.2g}" for value in spreads)
        found.append(f"norms: the text parent's sampled matrices are {shown} times the image parent's")
    return found
