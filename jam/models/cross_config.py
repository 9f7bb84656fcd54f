"""The config of the two-tower model (``model_type: jam_cross``).

It records both parents' configs, where the towers exchange states and the joint vocabulary; what generic code asks of a
config (key-value slots, width, heads, positions) is derived from them, never stored twice.
"""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class JamCrossConfig(PreTrainedConfig):
    """Two towers' configs and how they are joined.

    Attributes:
        text_config, image_config: the parents' whole configs, ``vocab_size`` the joint size.
        exchanges: [i, j] pairs: an exchange after text layer i and image layer j (counts of layers done, from 1).
        tables: "separate" (a table and a head for each tower) or "shared".
        ffn_ratio: inner width of a cross block's FFN over its tower's width.
        init_std: of fresh cross weights.
        vocabulary: ``Vocabulary.to_json()`` of the joint vocabulary.

    ``num_hidden_layers`` is derived: the number of key-value slots, which is what caches are sized from.
    """

    model_type = "jam_cross"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
        "image_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
    }
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {"cross.*": "free_full_weight"}

    text_config: dict | PreTrainedConfig | None = None
    image_config: dict | PreTrainedConfig | None = None
    exchanges: list | None = None
    tables: Literal["separate", "shared"] = "separate"
    ffn_ratio: int = 4
    init_std: float = 0.02
    vocabulary: dict | None = None
    vocab_size: int = 0
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    hidden_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    num_hidden_layers: int = 0
    max_position_embeddings: int = 0

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        self.exchanges = self.exchanges or []
        text, image = self.text_config, self.image_config
        self.num_hidden_layers = text.num_hidden_layers + image.num_hidden_layers + 2 * len(self.exchanges)
        self.hidden_size = text.hidden_size
        self.num_attention_heads = text.num_attention_heads
        self.num_key_value_heads = text.num_attention_heads
        self.head_dim = text.hidden_size // text.num_attention_heads
        self.max_position_embeddings = min(text.max_position_embeddings, image.max_position_embeddings)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """This config: caches are sized from it, and a tower's own would be too small."""
        return self

    def validate_architecture(self) -> None:
        """Raises ValueError for exchanges that do not run forwards through both towers, or unequal vocabularies."""
        last = (1, 1)
        depths = (self.text_config.num_hidden_layers, self.image_config.num_hidden_layers)
        for pair in self.exchanges or []:
            if len(pair) != 2 or not all(a <= b <= depth for a, b, depth in zip(last, pair, depths, strict=True)):
                raise ValueError(
                    f"exchanges {self.exchanges} are not ordered [text layer, image layer] pairs within depths {depths}"
                )
            last = tuple(pair)
        for name, tower in {"text_config": self.text_config, "image_config": self.image_config}.items():
            if self.vocab_size and tower.vocab_size != self.vocab_size:
                raise ValueError(
                    f"{name}.vocab_size is {tower.vocab_size}, the joint vocabulary has {self.vocab_size} ids"
                )
