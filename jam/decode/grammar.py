"""Which ids may come next in a reply.

A row of the batch is a small machine:

    text:  text ids | <break> (if an image still fits) | </s> (if enough images were made)
    image: codes, exactly N, and what its frame forces: the closing control, in some models its size and row ends
    done:  after </s>, or when no room is left (``stop`` says which)

A reply that fills a hole is text up to ``</s>``, or the codes of one image, which is open from the start, and then
``</s>``, which is forced.

Room is what the context and the token budget leave. An image is opened only if its begin, its whole frame and one more
token fit, and images that are still owed (``min_images``) keep their room from the text before them; therefore
every state has a legal id and no image is ever cut short. Role, pad, mask, infill and bos ids are never legal in a
reply.

Nothing here knows logits; the head of a state is that of ``jam.models.heads``.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from jam.document import Hole
from jam.errors import GenerationError
from jam.tokens.frame import Frame, frame_of
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD
from jam.tokens.vocabulary import TEXT, Vocabulary

Mode = Literal["interleaved", "text", "image", "free"]
MODES = ("interleaved", "text", "image", "free")
StopReason = Literal["eos", "length", "stop"]


class Phase(Enum):
    TEXT = "text"
    IMAGE = "image"  # a code comes next
    FRAME = "frame"  # inside an image, what comes next is forced
    DONE = "done"


class Kind(Enum):
    """What a token of a reply is."""

    TEXT = "text"
    BEGIN = "begin"
    CODE = "code"
    FRAME = "frame"  # forced, and the image goes on
    END = "end"
    EOS = "eos"


@dataclass(frozen=True)
class Step:
    """One token of one reply; ``stop`` is set on the last one."""

    row: int
    position: int
    token: int
    kind: Kind
    stop: StopReason | None


@dataclass(frozen=True)
class Rules:
    """The grammar of all rows of a call.

    ``interleaved`` allows text and images, ``text`` text alone, ``image`` images alone (at least one); ``free`` leaves
    the number of images to the model and to the room, whatever ``max_images`` says. ``hole``: what the reply fills, of
    the same name as the mode. ``frame`` is that of every image; None takes the vocabulary's own, or no images at all
    where their size has to be written.

    Raises:
        GenerationError: an unknown mode, bounds that contradict each other, or images asked of a model without them.
    """

    vocabulary: Vocabulary
    mode: Mode = "interleaved"
    min_images: int = 0
    max_images: int = 4
    hole: Hole | None = None
    frame: Frame | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise GenerationError(f"mode is {self.mode!r}; required: one of {', '.join(MODES)}; choose one of them")
        if not 0 <= self.min_images <= self.max_images:
            raise GenerationError(
                f"min_images is {self.min_images} and max_images {self.max_images}; required: "
                "0 <= min_images <= max_images; change one of them"
            )
        if self.mode == "text" and self.min_images:
            raise GenerationError(
                f"mode is text and min_images {self.min_images}; text replies hold no image, "
                "use mode interleaved or min_images 0"
            )
        if self.mode == "free" and self.min_images:
            raise GenerationError(
                f"mode is free and min_images {self.min_images}; there the model alone decides, use mode interleaved "
                "or min_images 0"
            )
        if self.mode == "image" and not self.max_images:
            raise GenerationError("mode is image and max_images 0; required: at least 1; raise max_images")
        if self.hole == "image" and self.min_images > 1:
            raise GenerationError(f"min_images is {self.min_images} and a hole takes one image; leave min_images out")
        if self.needed_images and not self.can_draw:
            raise GenerationError(
                f"an image is asked for (mode {self.mode}, min_images {self.min_images}) and this model's vocabulary "
                "has no images; use mode text or a model that makes images"
            )
        if "eos" not in self.vocabulary.controls:
            raise GenerationError("this model's vocabulary has no 'eos' control to end a reply; name it in jam.json")

    @property
    def can_draw(self) -> bool:
        names = {"begin_image", "end_image"} & set(self.vocabulary.controls)
        known = self.frame is not None or not self.vocabulary.framed
        return bool(known and self.vocabulary.image_span and self.vocabulary.codes_per_image and len(names) == 2)

    @property
    def may_draw(self) -> bool:
        """Whether a reply may hold an image at all."""
        return self.can_draw and self.mode != "text" and self.most_images > 0

    @property
    def most_images(self) -> float:
        """Images that a reply may have, room aside."""
        if self.mode == "free":
            return math.inf
        return min(self.max_images, 1) if self.hole == "image" else self.max_images

    @property
    def needed_images(self) -> int:
        return max(1, self.min_images) if self.mode == "image" else self.min_images

    @cached_property
    def image(self) -> Frame:
        """The frame of an image; only where the model ``can_draw``. In a hole it is the codes, and the end of the
        reply."""
        whole = frame_of(self.vocabulary) if self.frame is None else self.frame
        if self.hole != "image":
            return whole
        return replace(whole, opening=(), closing=(self.vocabulary.controls["eos"],), spoken=0)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: begin, codes, end, and what else its frame holds; of one in a hole the codes, since the
        prompt has the controls; 0 where there are none."""
        if not self.can_draw:
            return 0
        return len(self.image) + (-1 if self.hole == "image" else 1)

    @property
    def needed_tokens(self) -> int:
        """The smallest room in which a reply with the needed images ends well; 1 if none are needed."""
        return self.needed_images * self.image_tokens + 1

    @cached_property
    def is_text(self) -> Tensor:
        return torch.from_numpy(self.vocabulary.kinds()) == TEXT

    @cached_property
    def codes(self) -> Tensor:
        """bool [V]: image codes."""
        mask = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        span = self.vocabulary.image_span
        if span is not None:
            mask[span.start : span.stop] = True
        return mask

    @cached_property
    def _alone(self) -> dict[int, Tensor]:
        return {}

    def only(self, token: int) -> Tensor:
        """bool [V]: one id."""
        if token not in self._alone:
            self._alone[token] = torch.zeros(self.vocabulary.size, dtype=torch.bool)
            self._alone[token][token] = True
        return self._alone[token]

    @cached_property
    def _masks(self) -> dict[tuple[bool, bool, bool], Tensor]:
        return {}

    def between(self, text: bool, begin: bool, eos: bool) -> Tensor:
        """bool [V] of a row outside an image: text ids, the opening control, the end, as allowed."""
        key = (text, begin, eos)
        if key not in self._masks:
            mask = self.is_text.clone() if text else torch.zeros_like(self.is_text)
            if begin:
                mask[self.vocabulary.controls["begin_image"]] = True
            if eos:
                mask[self.vocabulary.controls["eos"]] = True
            self._masks[key] = mask
        return self._masks[key]


@dataclass
class Row:
    """The state of one reply. ``room`` counts the tokens it may still have; ``codes`` and ``place`` what the image at
    hand has, of codes and of tokens after its opening control."""

    rules: Rules
    room: int
    images: int = 0
    codes: int = 0
    place: int = 0
    phase: Phase = Phase.TEXT
    stop: StopReason | None = None

    def __post_init__(self) -> None:
        if self.room < self.rules.needed_tokens:
            raise AssertionError(f"room {self.room} is less than {self.rules.needed_tokens}; the caller checks this")
        if self.rules.hole == "image":
            self.phase = Phase.IMAGE

    @property
    def head(self) -> int:
        """The head that predicts the next token."""
        inside = self.phase in (Phase.IMAGE, Phase.FRAME)
        return IMAGE_HEAD if inside and self.place >= self.rules.image.spoken else TEXT_HEAD

    @property
    def forced(self) -> int | None:
        """The id that must come next, where an image's frame says one."""
        return self.rules.image.forced(self.place) if self.phase is Phase.FRAME else None

    @property
    def run(self) -> int:
        """Codes that come next before anything else does."""
        return self.rules.image.run(self.place) if self.phase is Phase.IMAGE else 0

    @property
    def drawing(self) -> bool:
        """Whether codes of an image are still to come, and its size stands."""
        return self.phase is Phase.IMAGE or (self.phase is Phase.FRAME and 0 < self.codes < self.rules.image.codes)

    @property
    def owed(self) -> int:
        return max(0, self.rules.needed_images - self.images)

    def allowed(self) -> tuple[bool, bool, bool]:
        """Outside an image: whether text, an image's opening and the end may come next."""
        rules = self.rules
        after = self.owed * rules.image_tokens + 1 if self.owed else 0  # room that the owed images keep
        text = rules.mode != "image" and self.room - 1 >= after
        begin = rules.may_draw and self.images < rules.most_images
        begin = begin and self.room >= max(self.owed, 1) * rules.image_tokens + 1
        return text, begin, not self.owed

    def legal(self) -> Tensor:
        """bool [V]: the ids that may come next; never empty before the end."""
        match self.phase:
            case Phase.IMAGE:
                return self.rules.codes
            case Phase.FRAME:
                return self.rules.only(self.forced)
            case Phase.TEXT:
                return self.rules.between(*self.allowed())
        raise AssertionError("a finished reply has no next token")

    def end(self) -> None:
        """Ends the reply at a stop string."""
        self.phase, self.stop = Phase.DONE, "stop"

    def advance(self, token: int) -> Kind:
        """Takes the next token, which must be legal, and says what it is."""
        if not self.legal()[token]:
            raise AssertionError(f"token {token} is not legal in {self}")
        controls = self.rules.vocabulary.controls
        self.room -= 1
        match self.phase:
            case _ if token == controls["eos"]:
                self.phase, self.stop = Phase.DONE, "eos"
                return Kind.EOS
            case Phase.FRAME if self.place == self.rules.image.last:
                self.images, self.codes, self.place, self.phase = self.images + 1, 0, 0, Phase.TEXT
                kind = Kind.END
            case Phase.IMAGE | Phase.FRAME:
                kind = Kind.CODE if self.phase is Phase.IMAGE else Kind.FRAME
                self.codes += kind is Kind.CODE
                self.place += 1
                self._enter()
            case _ if token == controls.get("begin_image"):
                self._enter()
                kind = Kind.BEGIN
            case _:
                kind = Kind.TEXT
        if self.room == 0:
            self.phase, self.stop = Phase.DONE, "length"
        return kind

    def _enter(self) -> None:
        """The phase of the place that the image has come to."""
        self.phase = Phase.IMAGE if self.rules.image.forced(self.place) is None else Phase.FRAME
