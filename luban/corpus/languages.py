"""Language codes and names as they are written in the field: `en`, `EN`, `en-US`, `zh_Hant`, `eng`, `English`."""

from __future__ import annotations

from functools import lru_cache

_CODES = (  # ISO 639-2 and 639-3 → 639-1, of every language that has a code of two letters
    "aar:aa abk:ab afr:af aka:ak alb:sq amh:am ara:ar arg:an arm:hy asm:as ava:av ave:ae aym:ay aze:az bak:ba bam:bm"
    " baq:eu bel:be ben:bn bih:bh bis:bi bod:bo bos:bs bre:br bul:bg bur:my cat:ca ces:cs cha:ch che:ce chi:zh chu:cu"
    " chv:cv cmn:zh cor:kw cos:co cre:cr cym:cy cze:cs dan:da deu:de div:dv dut:nl dzo:dz ell:el eng:en epo:eo est:et"
    " eus:eu ewe:ee fao:fo fas:fa fij:fj fin:fi fra:fr fre:fr fry:fy ful:ff geo:ka ger:de gla:gd gle:ga glg:gl glv:gv"
    " gre:el grn:gn guj:gu hat:ht hau:ha heb:iw her:hz hin:hi hmo:ho hrv:hr hun:hu hye:hy ibo:ig ice:is ido:io iii:ii"
    " iku:iu ile:ie ina:ia ind:in ipk:ik isl:is ita:it jav:jw jpn:ja kal:kl kan:kn kas:ks kat:ka kau:kr kaz:kk khm:km"
    " kik:ki kin:rw kir:ky kom:kv kon:kg kor:ko kua:kj kur:ku lao:lo lat:la lav:lv lim:li lin:ln lit:lt ltz:lb lub:lu"
    " lug:lg mac:mk mah:mh mal:ml mao:mi mar:mr may:ms mkd:mk mlg:mg mlt:mt mol:mo mon:mn mri:mi msa:ms mya:my nau:na"
    " nav:nv nbl:nr nde:nd ndo:ng nep:ne nld:nl nno:nn nob:nb nor:no nya:ny oci:oc oji:oj ori:or orm:om oss:os pan:pa"
    " per:fa pli:pi pol:pl por:pt pus:ps que:qu roh:rm ron:ro rum:ro run:rn rus:ru sag:sg san:sa sin:si slk:sk slo:sk"
    " slv:sl sme:se smo:sm sna:sn snd:sd som:so sot:st spa:es sqi:sq srd:sc srp:sr ssw:ss sun:su swa:sw swe:sv tah:ty"
    " tam:ta tat:tt tel:te tgk:tg tgl:tl tha:th tib:bo tir:ti ton:to tsn:tn tso:ts tuk:tk tur:tr twi:tw uig:ug ukr:uk"
    " urd:ur uzb:uz ven:ve vie:vi vol:vo wel:cy wln:wa wol:wo xho:xh yid:yi yor:yo zha:za zho:zh zul:zu"
)
THREE = {pair[:3]: pair[4:] for pair in _CODES.split()}
_NAMES = (  # in English and in the language itself, of languages that corpora are often labelled with
    "afrikaans:af albanian:sq amharic:am arabic:ar armenian:hy azerbaijani:az basque:eu belarusian:be bengali:bn bangla:bn"
    " bosnian:bs bulgarian:bg burmese:my catalan:ca chinese:zh mandarin:zh cantonese:yue croatian:hr czech:cs danish:da"
    " dutch:nl english:en esperanto:eo estonian:et farsi:fa finnish:fi french:fr galician:gl georgian:ka german:de greek:el"
    " gujarati:gu hausa:ha hebrew:he hindi:hi hungarian:hu icelandic:is igbo:ig indonesian:id irish:ga italian:it"
    " japanese:ja javanese:jv kannada:kn kazakh:kk khmer:km korean:ko kurdish:ku kyrgyz:ky lao:lo latin:la latvian:lv"
    " lithuanian:lt macedonian:mk malay:ms malayalam:ml maltese:mt maori:mi marathi:mr mongolian:mn nepali:ne norwegian:no"
    " odia:or pashto:ps persian:fa polish:pl portuguese:pt punjabi:pa romanian:ro russian:ru sanskrit:sa serbian:sr"
    " sindhi:sd sinhala:si slovak:sk slovenian:sl somali:so spanish:es sundanese:su swahili:sw swedish:sv tagalog:tl"
    " tajik:tg tamil:ta tatar:tt telugu:te thai:th tibetan:bo turkish:tr turkmen:tk ukrainian:uk urdu:ur uyghur:ug"
    " uzbek:uz vietnamese:vi welsh:cy xhosa:xh yiddish:yi yoruba:yo zulu:zu deutsch:de français:fr español:es"
    " italiano:it português:pt nederlands:nl polski:pl русский:ru українська:uk 中文:zh 汉语:zh 漢語:zh 日本語:ja 한국어:ko"
)
NAMED = {name: code for name, _, code in (pair.partition(":") for pair in _NAMES.split())}
UNDETERMINED = frozenset({"", "und", "mul", "mis", "unknown", "undetermined", "none", "null", "n/a", "other"})
SAME = {
    "nb": "no",
    "nn": "no",
    "iw": "he",
    "jw": "jv",
    "in": "id",
    "mo": "ro",
    "ji": "yi",
}  # further codes for one language


@lru_cache(maxsize=1024)
def subtags(code: str) -> tuple[str, ...]:
    """(language, script, region, …) in lower case, the language by its code of two letters where it has one.

    A name of a language, such as `English`, counts as its code.
    """
    language, *rest = code.strip().lower().replace("_", "-").split("-")
    language = NAMED.get(language, THREE.get(language, language))
    return (SAME.get(language, language), *rest)


def is_determined(code: str | None) -> bool:
    """False for no code at all, and for one that says that the language is unknown or several."""
    return code is not None and subtags(code)[0] not in UNDETERMINED


def matches(code: str, wanted: str) -> bool:
    """True if language `code` is included in the language `wanted`.

    `en` means every English; `en-US` means American English and English of no stated country.
    """
    language, *rest = subtags(code)
    return language == subtags(wanted)[0] and (not rest or set(subtags(wanted)[1:]) <= set(rest))
