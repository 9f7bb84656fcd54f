"""Which head predicts the next token, and what each head may say.

At every position the grammar chooses *one* head, text or image; loss, sampling and metrics use a softmax over that
head's own span plus the control rows (two heads are never compared, see docs/decisions.md). The rule needs only
the ids seen so far:

    after an image code                              image head (next code, or the closing control after the last)
    after a control that opens an image              image head; text head where the size follows in text
    after a row's end, a size token, ...             image head (``Vocabulary.within_image``)
    after <mask>                                     as before it (a masked span does not change the segment)
    after the n-th <infill> of a document            as after its n-th <mask> (the span goes on in its own segment)
    after anything else                              text head

``begin_image`` and ``end_image`` may be one id (CM3Leon's <break>). Among breaks with nothing but <mask> between them
it opens and closes in turn, and the first one closes exactly when a code stands before it:

    text <break> code <mask> <break>    opens, closes        text <break> <mask> <break>         opens, closes
    code <break> <break> code           closes, opens        code <break> <mask> <break> code    closes, opens

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
    is_mask = ids_BT == vocabulary.controls.get("mask", -1)
    opens = ids_BT == begin
    if begin == end:
        opens &= _opens(opens, is_mask, is_code)
    if within := vocabulary.within_image:
        if "begin_codes" in vocabulary.controls:  # the size stands before it, in text
            opens = torch.zeros_like(opens)
        opens |= torch.isin(ids_BT, torch.tensor(within, device=ids_BT.device))
    image_after = _at(is_code | opens, _last(~is_mask))
    if "infill" in vocabulary.controls:
        is_infill = ids_BT == vocabulary.controls["infill"]
        mask_at = _mask_of_infill(ids_BT == vocabulary.controls["bos"], is_mask, is_infill)
        image_after = torch.where(is_infill, _at(image_after, mask_at), image_after)
    return heads.masked_fill(image_after, IMAGE_HEAD)


def _last(flags_BT: Tensor) -> Tensor:
    """Index of the last flagged position up to each one, -1 for none."""
    index = torch.arange(flags_BT.shape[1], device=flags_BT.device).expand_as(flags_BT)
    return torch.where(flags_BT, index, -1).cummax(dim=1).values


def _at(values_BT: Tensor, index_BT: Tensor) -> Tensor:
    """Flags at the indices; False for -1."""
    return values_BT.gather(1, index_BT.clamp_min(0)) & (index_BT >= 0)


def _opens(is_break_BT: Tensor, is_mask_BT: Tensor, is_code_BT: Tensor) -> Tensor:
    """Whether a break at each position would open: its number in its run, turned by a code before the run."""
    before = _last(~(is_break_BT | is_mask_BT))
    count = is_break_BT.cumsum(1)
    number = count - torch.where(before >= 0, count.gather(1, before.clamp_min(0)), 0) - 1
    return (number + _at(is_code_BT, before).long()) % 2 == 0


def _mask_of_infill(is_bos_BT: Tensor, is_mask_BT: Tensor, is_infill_BT: Tensor) -> Tensor:
    """For each <infill> the position of the <mask> of the same number in the same document, else -1."""
    document = is_bos_BT.cumsum(1)
    start = _last(is_bos_BT)

    def key(flags_BT: Tensor) -> Tensor:  # grows with document, then with the number inside it
        count = flags_BT.cumsum(1)
        earlier = torch.where(start >= 0, count.gather(1, start.clamp_min(0)), 0)
        return document * (flags_BT.shape[1] + 1) + count - earlier

    reached = torch.where(is_mask_BT, key(is_mask_BT), -1).cummax(dim=1).values
    wanted = key(is_infill_BT)
    place = torch.searchsorted(reached, wanted).clamp_max(reached.shape[1] - 1)
    return torch.where(is_infill_BT & (reached.gather(1, place) == wanted), place, -1)


def restrict(logits_BTV: Tensor, heads_BT: Tensor, allowed_2V: Tensor) -> Tensor:
    """Logits with every id that the position's head does not own set to the dtype's lowest finite value.

    Finite, because guidance subtracts streams and ``-inf - -inf`` is not a number.
    """
    return logits_BTV.masked_fill(~allowed_2V[heads_BT], torch.finfo(logits_BTV.dtype).min)
