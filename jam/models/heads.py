"""Which head predicts the next token, and what each head may say.

At every position the grammar chooses *one* head, text or image; loss, sampling and metrics use a softmax over that
head's own span plus the control rows (two heads are never compared, see docs/decisions.md). The rule needs only
the ids seen so far:

    after an image code                              image head (next code, or the closing control after the last)
    after a control that opens an image              image head
    after <mask>                                     as before it (a masked span does not change the segment)
    after anything else                              text head

``begin_image`` and ``end_image`` may be one id (CM3Leon's <break>): it closes when a code stands before it.

Shapes: B batch, T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD
from jam.tokens.vocabulary import IMAGE, TEXT, Vocabulary


def allowed_ids(vocabulary: Vocabulary, device: torch.device | str = "cpu") -> Tensor:
    """bool [2, V]: row TEXT_HEAD allows text and control ids, row IMAGE_HEAD image and control ids."""
    kinds = torch.from_numpy(vocabulary.kinds()).to(device)
    return torch.stack([kinds != IMAGE, kinds != TEXT])


def next_heads(ids_BT: Tensor, vocabulary: Vocabulary) -> Tensor:
    """int64 [B, T]: the head that predicts the token after each position, from whole sequences of ids."""
    heads = torch.full_like(ids_BT, TEXT_HEAD)
    span = vocabulary.image_span
    if span is None:
        return heads
    is_code = (ids_BT >= span.start) & (ids_BT < span.stop)
    begin, end = vocabulary.controls["begin_image"], vocabulary.controls["end_image"]
    mask = vocabulary.controls.get("mask", -1)
    is_mask = ids_BT == mask
    # what stood before each position, looking through <mask>: index of the last position that is not <mask>
    index = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    last = torch.where(is_mask, torch.full_like(index, -1), index).cummax(dim=1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    code_before = is_code.gather(1, before.clamp_min(0)) & (before >= 0)
    opens = ids_BT == begin
    if begin == end:
        opens &= ~code_before
    image_after = is_code | opens
    image_after = torch.where(is_mask, image_after.gather(1, last.clamp_min(0)) & (last >= 0), image_after)
    return heads.masked_fill(image_after, IMAGE_HEAD)


def restrict(logits_BTV: Tensor, heads_BT: Tensor, allowed_2V: Tensor) -> Tensor:
    """Logits with every id that the position's head does not own set to the dtype's lowest finite value.

    Finite, because guidance subtracts streams and ``-inf - -inf`` is not a number.
    """
    return logits_BTV.masked_fill(~allowed_2V[heads_BT], torch.finfo(logits_BTV.dtype).min)
