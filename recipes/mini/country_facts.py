"""Capital, region and population of the countries whose flags are drawn, as short sentences.

The figures are those of countryinfo 1.0.1, rounded; many are about ten years old. It will not correct a figure: a
country whose entry is known to be wrong or outdated in words is left out (``NO_FACTS``).
"""

import json
import re
import zipfile
from pathlib import Path

from build_text import fold
from text_tools import COUNTRYINFO, wheel

NO_FACTS = {
    "flag: Burundi": "an old capital",
    "flag: Eswatini": "only one of two capitals",
    "flag: Kazakhstan": "a name of the capital that is no longer used",
    "flag: Israel": "a capital that is disputed",
    "flag: Western Sahara": "a capital that is disputed",
    "flag: Ireland": "population of the whole island",
    "flag: Montserrat": "a capital that was abandoned",
    "flag: Sri Lanka": "only one of two capitals",
    "flag: British Indian Ocean Territory": "no civil capital",
}


# What a flag question asks for first, by its words; a question for "facts" opens with the encyclopedia's sentence.
ASKED = {"capital": r"capital|Which city", "region": r"[Ww]here|part of the world", "population": r"How many"}


def load_countries(wheels: Path) -> dict[str, dict]:
    """{capital, region, population} by lower-case name and alternative spelling."""
    by_name: dict[str, dict] = {}
    with zipfile.ZipFile(wheel(COUNTRYINFO, wheels)) as archive:
        for member in sorted(archive.namelist()):
            if not re.fullmatch(r"countryinfo/data/[^/]*\.json", member):
                continue
            country = json.loads(archive.read(member))
            capital = country.get("capital")  # a list where there are several: left out, as the sentence names one
            if not (isinstance(capital, str) and capital and country.get("subregion") and country.get("population")):
                continue
            facts = {"capital": fold(capital), "region": country["subregion"]}
            for name in [country["name"], *country.get("altSpellings", [])]:
                by_name.setdefault(
                    fold(name).lower().replace("&", "and"), facts | {"population": country["population"]}
                )
    return by_name


def population_words(count: int) -> str:
    """A population in round words.

    >>> population_words(66078000), population_words(2895947), population_words(55519), population_words(56)
    ('66 million', '2.9 million', '56 thousand', '60')
    """
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            value = count / size
            number = f"{value:.1f}".removesuffix(".0") if value < 10 and size > 10**3 else str(round(value))
            return f"{number} {name}"
    return str(round(count, -1))


def facts_about(country: str, facts: dict) -> dict[str, str]:
    """One sentence per fact."""
    start = country[0].upper() + country[1:]
    region = facts["region"].replace("South-eastern", "Southeastern")
    region = "Oceania" if region == "Australia and New Zealand" else region
    are = "are" if country.startswith("the ") and country.endswith("s") and country != "the United States" else "is"
    return {
        "capital": f"The capital of {country} is {facts['capital']}.",
        "region": f"{start} {are} in {region}.",
        "population": f"About {population_words(facts['population'])} people live there.",
    }
