"""Image models that are a plain language model with rows for image codes after its last token: Liquid, SimpleAR.

The tokenizer knows nothing of the codes: code k is id ``len(tokenizer) + k``. What gives such a folder away are the
names of its controls, which its owner put into the tokenizer. The image network is another project's, and no part of
the folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jam.errors import CheckpointError
from jam.layouts.view import ModelFolder, Owner, vocabulary_of
from jam.tokens.vocabulary import JamFile


@dataclass(frozen=True)
class Appended:
    """One such owner: ``controls`` by the names of its tokens, all of which must be there."""

    name: str
    model_type: str
    controls: Mapping[str, str]
    unconditional: tuple[str, ...]
    codes: int
    codes_per_image: int
    notes: tuple[str, ...]
    lacks: str  # as ModelFolder.lacks
    sampling: Mapping[str, float]  # the owner's settings, as JamFile.sampling

    def fits(self, owner: Owner) -> bool:
        return owner.config.get("model_type") == self.model_type and owner.has(*self.controls.values())

    def view(self, owner: Owner) -> ModelFolder:
        """Raises CheckpointError when the table's rows are not the tokens and the codes."""
        words, size = owner.words, owner.config.get("vocab_size")
        if len(set(words.ids.values())) != words.count:
            raise CheckpointError(
                f"{owner.path}: tokenizer.json has {len(set(words.ids.values()))} ids up to {words.count - 1}; "
                f"{self.name}'s codes follow the last token, whose number is unclear, write jam.json"
            )
        if not isinstance(size, int) or size < words.count + self.codes:
            raise CheckpointError(
                f"{owner.path}: config.json has {size!r} vocabulary rows; {self.name} has {self.codes} image codes "
                f"after its {words.count} tokens, use the files of one model or write jam.json"
            )
        controls = {control: words.ids[name] for control, name in self.controls.items()}
        codes = range(words.count, words.count + self.codes)
        vocabulary = vocabulary_of(owner, owner.config, codes, controls, self.codes_per_image)
        jam = JamFile(vocabulary, None, self.unconditional, sampling=dict(self.sampling))
        return ModelFolder(owner.checkpoint, jam, self.name, notes=self.notes, lacks=self.lacks)
