"""Stop strings: where a reply's text ends, and what of it may be shown before that is known.

Tokens do not end where stop strings do, so that text is searched, not ids. One object follows one stretch of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class StopText:
    """The text of one stretch and how much of it has been shown.

    >>> text = StopText(("END",))
    >>> text.push("the E"), text.found, text.push("N"), text.push("D of it"), text.found
    ('the ', False, '', '', True)
    """

    words: Sequence[str]
    text: str = field(default="", init=False)
    shown: int = field(default=0, init=False)

    def push(self, delta: str) -> str:
        """Takes new text; what may be shown of it: nothing that is a stop string, or may still become one."""
        self.text += delta
        return self._show(self.cut if self.found else len(self.text) - self._held())

    def flush(self) -> str:
        """All that is left, stop strings included: the reply went on after them, or ended otherwise."""
        return self._show(len(self.text))

    @property
    def found(self) -> bool:
        return any(word in self.text[self.shown :] for word in self.words)

    @property
    def cut(self) -> int:
        """Where the first stop string begins."""
        places = [self.text.find(word, self.shown) for word in self.words]
        return min((place for place in places if place >= 0), default=len(self.text))

    def _held(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(word) for word in self.words), default=1) - 1
        tails = range(min(longest, len(self.text) - self.shown), 0, -1)
        return next((n for n in tails if any(word.startswith(self.text[-n:]) for word in self.words)), 0)

    def _show(self, upto: int) -> str:
        delta, self.shown = self.text[self.shown : max(upto, self.shown)], max(upto, self.shown)
        return delta
