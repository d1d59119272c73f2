"""MediaWiki dumps: articles as plain text, by mwparserfromhell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError, MissingExtra
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.language_variants import one_variant
from luban.corpus.sources.xml import child, elements, local

MEDIA_KEYS = ("6", "14")  # of the namespaces for files and for categories
# Names of both namespaces. A dump says how its wiki calls them; these are for the other names that wikis know them by.
MEDIA_NAMES = """
file image category datei bild kategorie fichier catégorie archivo imagen categoría immagine categoria ficheiro arquivo
imagem bestand afbeelding categorie plik grafika kategoria файл изображение категория зображення категорія ファイル 画像 カテゴリ
文件 档案 檔案 图像 圖像 分类 分類 파일 그림 분류 fil kategori bilde billede tiedosto kuva luokka soubor súbor kategória fájl kép fișier
imagine dosya resim αρχείο εικόνα κατηγορία ملف صورة تصنيف پرونده تصویر رده קובץ תמונה קטגוריה चित्र श्रेणी ไฟล์ ภาพ หมวดหมู่ tập_tin
hình thể_loại berkas gambar fitxer imatge fitxategi irudi dosiero kategorio картинка датотека слика категорија datoteka slika
kategorija vaizdas attēls pilt fail kategooria চিত্র বিষয়শ্রেণী படிமம் பகுப்பு దస్త్రం వర్గం ფაილი სურათი კატეგორია պատկեր կատեգորիա
"""
MEDIA: frozenset[str] = frozenset(MEDIA_NAMES.split())
DROPPED_TAGS = ("ref", "gallery", "math", "timeline", "syntaxhighlight", "table", "references")
BREAKS = (
    "br",
    "hr",
    "p",
    "div",
    "li",
    "dt",
    "dd",
    "blockquote",
    "center",
    "poem",
    "tr",
    "td",
    "th",
)  # tags that part words
BLANK = re.compile(r"\n{3,}")
MAGIC = re.compile(r"__[A-Z]+__")


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """Articles of the main namespace that are no redirects.

    Raises:
        DataError: no article in it.
    """
    good, media = False, {*MEDIA}
    for element in elements(Path(name), ("page", "namespace"), context):
        if local(element) == "namespace":
            if element.get("key") in MEDIA_KEYS and element.text:
                media.add(_folded(element.text))
            continue
        document = _article(element, context, frozenset(media))
        if document is not None:
            good = True
            yield document
    if not good:
        raise DataError(f"source {name} holds no article")


def _article(page: Any, context: SourceContext, media: frozenset[str]) -> Document | None:
    namespace, title, revision = child(page, "ns"), child(page, "title"), child(page, "revision")
    if child(page, "redirect") is not None or (namespace is not None and namespace.text != "0"):
        context.tally.add("pages_that_are_no_articles")
        return None
    source = child(revision, "text") if revision is not None else None
    number = child(page, "id")
    name = title.text if title is not None else None
    ident = f"{context.label}#{number.text if number is not None else name or ''}"
    try:
        text = plain((source.text if source is not None else None) or "", media)
    except (_library().parser.ParserError, RecursionError) as error:
        context.tally.reject("unreadable articles", f"{ident}: {error}")
        return None
    if not text:
        context.tally.add("articles_without_text")
        return None
    return Document(id=ident, text=text, source=context.label, meta={"title": name, "licence": "CC-BY-SA-4.0"})


def plain(wikitext: str, media: frozenset[str] = MEDIA) -> str:
    """An article's text without templates, tables, references, media and markup; headings stand on their own lines.

    Args:
        media: names, as `_folded` gives them, of the namespaces whose links are no text.
    """
    code = _library().parse(one_variant(MAGIC.sub("", wikitext)))
    lines = (line.strip() for line in _visible(code, media).split("\n"))
    return BLANK.sub("\n\n", "\n".join(lines)).strip()


def _visible(code: Any, media: frozenset[str]) -> str:
    """The text that parsed wikitext shows, in one pass: removing nodes from it takes quadratic time."""
    nodes, parts = _library().nodes, []
    for node in code.nodes:
        if isinstance(node, nodes.Wikilink):
            title = str(node.title)
            if ":" not in title or _folded(title.partition(":")[0]) not in media:
                parts.append(_visible(node.title if node.text is None else node.text, media))
        elif isinstance(node, nodes.Tag):
            parts.append(_visible_tag(node, media))
        elif isinstance(node, nodes.Heading):
            parts.append(_visible(node.title, media))
        elif isinstance(node, nodes.ExternalLink):
            shown = node.title if node.brackets else node.url
            parts.append("" if shown is None else _visible(shown, media))
        else:
            parts.append(str(node.__strip__(normalize=True) or ""))
    return "".join(parts)


def _visible_tag(tag: Any, media: frozenset[str]) -> str:
    name = str(tag.tag).strip().lower()
    if name in DROPPED_TAGS:
        return ""
    hidden = not tag.contents or not _library().definitions.is_visible(name)
    text = "" if hidden else _visible(tag.contents, media)
    if name not in BREAKS or tag.wiki_markup:  # markup of lists stands at the beginning of a line anyway
        return text
    return "\n" if name in ("br", "hr") else f"\n{text}\n"


def _folded(name: str) -> str:
    """A namespace's name, in which case counts for nothing and a space is an underscore."""
    return "_".join(name.lower().replace("_", " ").split())


def _library() -> Any:
    try:
        import mwparserfromhell
        import mwparserfromhell.definitions
    except ImportError:
        raise MissingExtra("mwparserfromhell", "corpus", "reading MediaWiki dumps") from None
    return mwparserfromhell
