"""How to reply: one frozen record of checked settings, and a model's own defaults under what a user says."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from jam.decode.grammar import MODES, Mode
from jam.decode.sampling import MAX_SEED
from jam.errors import GenerationError
from jam.models.load import Bundle

Guidance = Literal["cfg", "cd_k"]

_TYPES: dict[object, tuple[tuple[type, ...], str]] = {
    Mode: ((str,), "a word"),
    Guidance: ((str,), "a word"),
    tuple[str, ...]: ((tuple,), "a list of words"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str | None: ((str, type(None)), "a word or none"),
    int | None: ((int, type(None)), "a whole number or none"),
    float | None: ((int, float, type(None)), "a number or none"),
}
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True)
class SamplingOptions:
    """How to reply. ``max_tokens`` counts every token of the reply, image codes and controls included; None is 400 and
    room for ``max_images`` images, four in mode ``free``.

    Mode ``image`` makes at least one image and no text; ``free`` leaves the number of images to the model. A reply ends
    before a string of ``stop`` in its text, once the images that it owes are made. ``image_beams`` above 1 searches for
    the likeliest image (needs ``image_temperature`` 0) in so many lanes of the batch. ``image_size`` is "WIDTHxHEIGHT"
    in pixels, for models whose images may have any; None is the model's own square.

    Guidance of images compares the prompt with nothing. ``guidance`` "cfg" blends by ``guidance_scale`` (1 is off and
    costs nothing); with ``image_guidance_scale`` a third stream keeps the prompt's images and drops its text, and the
    two scales pull towards either (``jam.decode.sampling.cfg3``). "cd_k" is contrastive decoding with the ``cd_k``-th
    probability as its measure, ``cd_alpha`` times which a code must reach.

    ``jacobi_window`` above 1 guesses so many codes of an image ahead and scores them in one forward
    (``jam.decode.jacobi``); their distribution stays, the codes that a seed draws do not. One reply at a time.

    Repetition penalties count the text of the prompt and the reply, and the codes of the image at hand; 1 is off.

    Raises:
        GenerationError: a value outside its range; the message gives it.
    """

    mode: Mode = "interleaved"
    max_tokens: int | None = None
    max_images: int = 4
    min_images: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    text_temperature: float = 0.7
    text_top_p: float = 0.9
    text_top_k: int | None = None
    text_repetition_penalty: float = 1.0
    image_temperature: float = 1.0
    image_top_p: float = 0.95
    image_top_k: int | None = None
    image_repetition_penalty: float = 1.0
    image_beams: int = 1
    image_size: str | None = None
    guidance: Guidance = "cfg"
    guidance_scale: float = 3.0
    image_guidance_scale: float | None = None
    cd_alpha: float = 0.6
    cd_k: int = 2
    jacobi_window: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, list):  # as JSON has it
            object.__setattr__(self, "stop", tuple(self.stop))
        for field in fields(self):
            value, (kinds, words) = getattr(self, field.name), _TYPES[field.type]
            _check(field.name, value, isinstance(value, kinds) and not isinstance(value, bool), words)
        _check("mode", self.mode, self.mode in MODES, f"one of {', '.join(MODES)}")
        for name in ("min_images", "max_images"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("text_temperature", "image_temperature"):
            value = getattr(self, name)
            # beyond these bounds float32 scores overflow to numbers that are none
            _check(name, value, value == 0 or 1e-4 <= value <= 1000, "0 (greedy), or a number from 0.0001 to 1000")
        for name in ("guidance_scale", "image_guidance_scale"):
            value = getattr(self, name)
            _check(name, value, value is None or 0 <= value <= 1000, "a number from 0 to 1000")
        for name in ("text_top_p", "image_top_p"):
            _check(name, getattr(self, name), 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        for name in ("text_top_k", "image_top_k"):
            _check(
                name,
                getattr(self, name),
                getattr(self, name) is None or getattr(self, name) >= 1,
                "at least 1, or none",
            )
        for name in ("text_repetition_penalty", "image_repetition_penalty"):
            value = getattr(self, name)
            _check(name, value, 0.01 <= value <= 100, "a number from 0.01 to 100; 1 is off")
        _check("guidance", self.guidance, self.guidance in ("cfg", "cd_k"), "cfg or cd_k")
        _check("cd_alpha", self.cd_alpha, 0 <= self.cd_alpha <= 1, "from 0 to 1")
        _check("cd_k", self.cd_k, self.cd_k >= 1, "at least 1; 1 is plain contrastive decoding")
        _check("image_beams", self.image_beams, 1 <= self.image_beams <= 64, "from 1 (no search) to 64")
        sized = self.image_size is None or _SIZE.fullmatch(self.image_size)
        _check("image_size", self.image_size, bool(sized), "WIDTHxHEIGHT in pixels, as 768x512, or none")
        _check(
            "image_temperature",
            self.image_temperature,
            self.image_beams == 1 or self.image_temperature == 0,
            f"0 with image_beams {self.image_beams}, which search for the likeliest image and draw nothing by chance",
        )
        _check(
            "image_repetition_penalty",
            self.image_repetition_penalty,
            self.image_beams == 1 or self.image_repetition_penalty == 1,
            f"1 with image_beams {self.image_beams}, whose images are compared by likelihood alone",
        )
        _check("jacobi_window", self.jacobi_window, 1 <= self.jacobi_window <= 1024, "from 1 (no guesses) to 1024")
        searched = self.image_beams > 1 or self.image_repetition_penalty != 1
        _check(
            "jacobi_window",
            self.jacobi_window,
            self.jacobi_window == 1 or not searched,
            "1 with image_beams, and with an image_repetition_penalty, which want each code before the next",
        )
        _check(
            "image_guidance_scale",
            self.image_guidance_scale,
            self.image_guidance_scale is None or self.guidance == "cfg",
            "none with guidance cd_k, which compares two streams",
        )
        words = len(self.stop) <= 64 and all(isinstance(word, str) and word for word in self.stop)
        _check("stop", self.stop, words, "at most 64 strings that are not empty")
        _check("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        _check("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}")

    @property
    def guided(self) -> bool:
        """Whether an image needs a stream without the prompt."""
        return self.guidance == "cd_k" or self.guidance_scale != 1 or self.keeps_images

    @property
    def image_sides(self) -> tuple[int, int] | None:
        """``image_size`` as numbers: width and height in pixels."""
        read = None if self.image_size is None else _SIZE.fullmatch(self.image_size)
        return None if read is None else (int(read[1]), int(read[2]))

    @property
    def keeps_images(self) -> bool:
        """Whether an image needs a stream that drops the text alone."""
        return self.image_guidance_scale is not None


def default_options(bundle: Bundle, **said: float | str | None) -> SamplingOptions:
    """The model's own defaults (``sampling`` in its jam.json) under what is said; None is not said.

    A default gives way to what is said where the two exclude each other: an image temperature, a penalty of images or
    guesses ahead turn the search off (guesses for chance); beams turn chance, the penalty and the guesses off; the last
    two turn each other off; cd_k or a guidance scale of 1 the guidance by images apart; and text alone, or no images,
    owes none.

    Raises:
        GenerationError: a value out of its range, or a default that is no option.
    """
    said = {name: value for name, value in said.items() if value is not None}
    try:
        SamplingOptions(**bundle.sampling)
    except (TypeError, GenerationError) as error:
        known = ", ".join(field.name for field in fields(SamplingOptions))
        raise GenerationError(
            f"{bundle.path}: jam.json's sampling {bundle.sampling} does not hold ({error}); names are {known}, mend it"
        ) from None
    defaults = dict(bundle.sampling)
    searches, guesses = said.get("image_beams", 1) > 1, said.get("jacobi_window", 1) > 1
    penalizes = said.get("image_repetition_penalty", 1) != 1
    away: list[str] = []  # defaults that what is said excludes
    if searches:
        away += ["image_repetition_penalty", "jacobi_window"]
        defaults["image_temperature"] = 0.0
    if "image_temperature" in said or guesses or penalizes:
        away.append("image_beams")
    if guesses:
        away.append("image_repetition_penalty")
        if defaults.get("image_beams", 1) > 1:
            away.append("image_temperature")  # 0, as the search wants it: guesses are of images by chance
    if penalizes:
        away.append("jacobi_window")
    if said.get("guidance") == "cd_k" or said.get("guidance_scale") == 1:
        away.append("image_guidance_scale")
    if said.get("mode") in ("text", "free") or said.get("max_images") == 0:
        away.append("min_images")
    return SamplingOptions(**({name: value for name, value in defaults.items() if name not in away} | said))


def _check(name: str, value: float | str | None, holds: bool, required: str) -> None:
    if not holds:
        raise GenerationError(f"{name} is {value!r}; required: {required}; change it")
