"""Language codes as they are written in the field: `en`, `EN`, `en-US`, `zh_Hant`, `eng`."""

from __future__ import annotations

from functools import lru_cache

THREE = {  # ISO 639-2 and 639-3 codes of languages that have one of two letters
    "ara": "ar", "ben": "bn", "bul": "bg", "cat": "ca", "ces": "cs", "cze": "cs", "chi": "zh", "zho": "zh", "cmn": "zh",
    "dan": "da", "deu": "de", "ger": "de", "ell": "el", "gre": "el", "eng": "en", "est": "et", "fas": "fa", "per": "fa",
    "fin": "fi", "fra": "fr", "fre": "fr", "heb": "he", "hin": "hi", "hrv": "hr", "hun": "hu", "ind": "id", "ita": "it",
    "jpn": "ja", "kor": "ko", "lit": "lt", "lav": "lv", "may": "ms", "msa": "ms", "nld": "nl", "dut": "nl", "nor": "no",
    "pol": "pl", "por": "pt", "ron": "ro", "rum": "ro", "rus": "ru", "slk": "sk", "slo": "sk", "slv": "sl", "spa": "es",
    "srp": "sr", "swa": "sw", "swe": "sv", "tam": "ta", "tel": "te", "tha": "th", "tur": "tr", "ukr": "uk", "urd": "ur",
    "vie": "vi",
}  # fmt: skip
SAME = {"nb": "no", "nn": "no", "iw": "he", "jw": "jv", "in": "id"}  # further codes for one language


@lru_cache(maxsize=1024)
def subtags(code: str) -> tuple[str, ...]:
    """(language, script, region, …) in lower case, the language by its code of two letters where it has one."""
    language, *rest = code.strip().lower().replace("_", "-").split("-")
    language = THREE.get(language, language)
    return (SAME.get(language, language), *rest)


def matches(code: str, wanted: str) -> bool:
    """Whether a document of language `code` is one of the language `wanted`.

    `en` means every English; `en-US` means American English and English of no stated country.
    """
    language, *rest = subtags(code)
    return language == subtags(wanted)[0] and (not rest or set(subtags(wanted)[1:]) <= set(rest))
