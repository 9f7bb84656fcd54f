"""What several configuration keys say together, in one spelling whichever transformers wrote them.

``trait`` reads what two parents of one network must have alike: rotary settings, sliding windows, layers without
rotary positions, or a plain key.
"""

from jam.errors import CheckpointError
from jam.models.families import FAMILIES


def trait(config: dict, key: str, where: str = "config.json") -> object:
    """One of a family's ``alike``: a configuration value, or what several keys say together in one spelling.

    ``where`` names the file in errors. Raises CheckpointError for a setting of another type.
    """
    computed = {"rope": rope, "windows": windows, "rotary_layers": rotary_layers}
    return computed[key](config, where) if key in computed else FAMILIES[config["model_type"]].value(config, key)


def rope(config: dict, where: str = "config.json") -> dict:
    """Rotary settings in one spelling: ``rope_parameters`` of transformers 5, ``rope_theta``, ``rope_scaling`` of 4.

    Where both are given, ``rope_scaling`` wins, as in transformers 5. A family whose layer types turn at different
    speeds (Gemma 3) has one entry for each. Raises CheckpointError for a setting of another type.

    >>> base = {"model_type": "llama"}
    >>> rope(base | {"rope_theta": 10000.0}) == rope(base | {"rope_parameters": {"rope_type": "default"}})
    True
    """
    family = FAMILIES[config["model_type"]]
    theta = family.value(config, "rope_theta")
    given, scaling = _mapping(config, "rope_parameters", where), _mapping(config, "rope_scaling", where)
    if "rope_local_base_freq" not in family.defaults:
        return _rope_of_layers(
            scaling or given, theta, config, where
        )  # transformers 5: rope_scaling replaces the whole
    full = _mapping(given, "full_attention", where) if given else {"rope_type": "default"}
    return {
        "full_attention": _rope_of_layers(full | scaling, theta, config, where),  # as Gemma 3's class lays it over
        "sliding_attention": _rope_of_layers(
            _mapping(given, "sliding_attention", where), family.value(config, "rope_local_base_freq"), config, where
        ),
    }


def _rope_of_layers(given: dict, theta: object, config: dict, where: str) -> dict:
    found = {"partial_rotary_factor": config.get("partial_rotary_factor") or 1.0} | given
    old = found.pop("type", None)
    found["rope_type"] = found.get("rope_type") or old or "default"
    found["rope_theta"] = found.get("rope_theta") or theta
    if not isinstance(found["rope_type"], str):
        raise CheckpointError(f"{where}: rope_type is {found['rope_type']!r}; a name is required, restore the file")
    for key in ("rope_theta", "partial_rotary_factor"):
        value = found[key]
        if type(value) not in (int, float) or not 0 < value < 1e30:
            shown = value if isinstance(value, float) else f"a {type(value).__name__}"
            raise CheckpointError(
                f"{where}: {key} is {shown}; a number above 0 and below 1e30 is required, restore the file"
            )
        found[key] = float(value)
    return found


def _mapping(config: dict, key: str, where: str) -> dict:
    value = config.get(key)
    if not (value is None or isinstance(value, dict)):
        raise CheckpointError(
            f"{where}: {key} is a {type(value).__name__}; a mapping or null is required, restore the file"
        )
    return value or {}


def rotary_layers(config: dict, where: str = "config.json") -> list[bool]:
    """Whether each layer has rotary positions (SmolLM3 leaves every fourth without). Raises CheckpointError."""
    layers = config[FAMILIES[config["model_type"]].keys["layers"]]
    named = _of_layers(config, "no_rope_layers", layers, (0, 1), where)
    if named is not None:
        return [bool(flag) for flag in named]
    every = _count(config.get("no_rope_layer_interval", 4), "no_rope_layer_interval", where)
    return [(layer + 1) % every != 0 for layer in range(layers)]


def windows(config: dict, where: str = "config.json") -> list[int | None]:
    """The sliding window of every layer in tokens, None where a layer sees everything before it.

    Raises CheckpointError for a setting of another type, and for layer types of another number of layers.

    >>> windows({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None})
    [None, None]
    >>> windows({"model_type": "gemma2", "num_hidden_layers": 3, "sliding_window": 8})
    [8, None, 8]
    """
    family = FAMILIES[config["model_type"]]
    layers, window = config[family.keys["layers"]], family.value(config, "sliding_window")
    used = family.value(config, "use_sliding_window") if "use_sliding_window" in family.defaults else True
    if used is not None and type(used) is not bool:
        raise CheckpointError(
            f"{where}: use_sliding_window is a {type(used).__name__}; true or false is required, restore the file"
        )
    if window is None or not used:
        return [None] * layers
    window = _count(window, "sliding_window", where)
    kinds = _of_layers(config, "layer_types", layers, ("full_attention", "sliding_attention"), where)
    if kinds is None:
        first, every = family.value(config, "max_window_layers"), family.value(config, "sliding_window_pattern")
        if every is not None:  # Gemma: every so-manieth layer sees everything
            every = _count(every, "sliding_window_pattern", where)
            kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
        else:  # Qwen: from a layer on; Mistral, Phi3: all
            first = 0 if first is None else _count(first, "max_window_layers", where, least=0)
            kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def windows_of(config: object) -> list[int | None]:
    """``windows`` of one of transformers' config objects, at every forward: its own dictionary would cost more than the
    masks that are made of this, and compiled code cannot read it."""
    layers = FAMILIES[config.model_type].keys["layers"]
    names = ("model_type", layers, "sliding_window", "use_sliding_window", "sliding_window_pattern")
    names += ("layer_types", "max_window_layers")
    return windows({name: getattr(config, name) for name in names if hasattr(config, name)})


def _count(value: object, key: str, where: str, least: int = 1) -> int:
    if type(value) is not int or value < least:
        found = value if type(value) in (int, float) else f"a {type(value).__name__}"
        raise CheckpointError(f"{where}: {key} is {found}; a whole number from {least} is required, restore the file")
    return value


def _of_layers(config: dict, key: str, layers: int, known: tuple, where: str) -> list | None:
    """A list with one of the known entries a layer, or None."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != layers:
        found = f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
        raise CheckpointError(f"{where}: {key} is {found}; a list of {layers}, one a layer, is required, restore it")
    if any(isinstance(entry, list | dict) or entry not in known for entry in value):
        names = " or ".join(map(str, known))
        raise CheckpointError(f"{where}: {key} holds another entry than {names}; jam knows these, use another model")
    return value
