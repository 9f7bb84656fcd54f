"""What several configuration keys say together, in one spelling whichever transformers wrote them.

``trait`` reads what two parents of one network must have alike: rotary settings, sliding windows, layers without
rotary positions, or a plain key.
"""

from jam.models.families import FAMILIES


def trait(config: dict, key: str) -> object:
    """One of a family's ``alike``: a configuration value, or what several keys say together in one spelling."""
    computed = {"rope": rope, "windows": windows, "rotary_layers": rotary_layers}
    return computed[key](config) if key in computed else FAMILIES[config["model_type"]].value(config, key)


def rope(config: dict) -> dict:
    """Rotary settings in one spelling: ``rope_parameters`` of transformers 5, ``rope_theta``, ``rope_scaling`` of 4.

    A family whose layer types turn at different speeds (Gemma 3) has one entry for each.

    >>> base = {"model_type": "llama"}
    >>> rope(base | {"rope_theta": 10000.0}) == rope(base | {"rope_parameters": {"rope_type": "default"}})
    True
    """
    theta = FAMILIES[config["model_type"]].value(config, "rope_theta")
    given = config.get("rope_parameters") or {}
    if "rope_local_base_freq" not in FAMILIES[config["model_type"]].defaults:
        return _rope_of_layers(given or config.get("rope_scaling") or {}, theta, config)
    local = FAMILIES[config["model_type"]].value(config, "rope_local_base_freq")
    return {
        "full_attention": _rope_of_layers(
            given.get("full_attention") or config.get("rope_scaling") or {}, theta, config
        ),
        "sliding_attention": _rope_of_layers(given.get("sliding_attention") or {}, local, config),
    }


def _rope_of_layers(given: dict, theta: object, config: dict) -> dict:
    found = {"partial_rotary_factor": config.get("partial_rotary_factor") or 1.0} | given
    found["rope_type"] = found.pop("type", None) or found.get("rope_type", "default")
    found["rope_theta"] = float(found.get("rope_theta") or theta)
    return found


def rotary_layers(config: dict) -> list[bool]:
    """Whether each layer has rotary positions (SmolLM3 leaves every fourth without)."""
    layers = config[FAMILIES[config["model_type"]].keys["layers"]]
    named, every = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if named is not None:
        return [bool(flag) for flag in named]
    return [(layer + 1) % every != 0 for layer in range(layers)]


def windows(config: dict) -> list[int | None]:
    """The sliding window of every layer in tokens, None where a layer sees everything before it.

    >>> windows({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None})
    [None, None]
    >>> windows({"model_type": "gemma2", "num_hidden_layers": 3, "sliding_window": 8})
    [8, None, 8]
    """
    family = FAMILIES[config["model_type"]]
    layers, window = config[family.keys["layers"]], family.value(config, "sliding_window")
    if window is None or family.value(config, "use_sliding_window") is False:
        return [None] * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first, every = family.value(config, "max_window_layers"), family.value(config, "sliding_window_pattern")
        if every is not None:  # Gemma: every so-manieth layer sees everything
            kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
        else:  # Qwen: from a layer on; Mistral, Phi3: all
            kinds = ["full_attention" if layer < (first or 0) else "sliding_attention" for layer in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]
