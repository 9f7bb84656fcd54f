"""LVM (LVM-7B): a Llama of images alone. Ids 0 to 8,191 are codes, 100 reserved rows follow; there is no tokenizer.

An image is 256 codes, and images follow each other with nothing between them (ytongbai/LVM). A fused model needs tokens
around an image: two of the reserved rows are named so.
"""

from dataclasses import dataclass

from jam.layouts.view import ModelFolder, Owner
from jam.tokens.vocabulary import JamFile, Span, Vocabulary

# defaults of the owner's sampler (ytongbai/LVM), which has no guidance
SAMPLING = {"image_temperature": 1.0, "image_top_p": 1.0, "guidance_scale": 1.0}


@dataclass(frozen=True)
class Lvm:
    """Recognised by its rows, which no other Llama has, and by having no tokenizer."""

    name: str = "LVM"
    codes: int = 8192
    reserved: int = 100
    codes_per_image: int = 256

    def fits(self, owner: Owner) -> bool:
        rows = owner.config.get("vocab_size") == self.codes + self.reserved
        return owner.config.get("model_type") == "llama" and rows and owner.words is None and not self._text(owner)

    @staticmethod
    def _text(owner: Owner) -> bool:
        return any((owner.path / name).is_file() for name in ("tokenizer.model", "vocab.json"))

    def view(self, owner: Owner) -> ModelFolder:
        spans = (Span("image", 0, self.codes), Span("control", self.codes, self.codes + self.reserved))
        controls = {"begin_image": self.codes, "end_image": self.codes + 1}
        notes = (
            f"LVM has no text: all rows for text are its mean row. It has no token around an image: its reserved rows "
            f"{self.codes} and {self.codes + 1}, which it never trained, are named begin_image and end_image",
        )
        lacks = "LVM ships its image network apart; to make pictures give image_tokenizer a folder made of it"
        vocabulary = Vocabulary(spans, controls, self.codes_per_image)
        jam = JamFile(vocabulary, None, ("bos", "begin_image"), sampling=dict(SAMPLING))
        return ModelFolder(owner.checkpoint, jam, self.name, notes=notes, lacks=lacks)


LVM = Lvm()
