"""LaTeX and MediaWiki as people write them: percent signs that are no comments, files without sections, wikis in any language."""

from __future__ import annotations

import bz2
import gzip
import random

import pytest

from luban.core.errors import DataError
from luban.corpus.sources import find_sources
from luban.corpus.sources.language_variants import one_variant
from luban.corpus.sources.latex import body
from luban.corpus.sources.mediawiki import plain
from luban.corpus.tally import Tally

S = "\\section{A}\n"


def read(path):
    tally = Tally()
    (source,) = find_sources([str(path)])
    return list(source.documents(tally, 0, 0.0)), tally


@pytest.mark.parametrize(
    "source",
    [
        r"See \url{http://a.org/x%20y} and this.",
        r"See \href{http://a.org/100%}{this page} here.",
        r"A \nolinkurl{a%b} b.",
        r"A \path|C:\dir%x| b.",
        r"Write \verb|50% off| or \verb*!%!, or \verb+a\%+.",
        r"Call \lstinline{a % b} and \lstinline[language=C]|a % b|.",
        r"So \mintinline{python}{a % b} is.",
        "\\begin{verbatim}\n% kept\n  50% \\section{no}\n\\end{verbatim}",
        "\\begin{lstlisting}[language=C]\nx = a % b; // \\end{document}\n\\end{lstlisting}",
        "\\begin{minted}{python}\n'%d' % x\n\\end{minted}",
        "\\begin{Verbatim}\n\\begin{comment}\n%\n\\end{comment}\n\\end{Verbatim}",
        "\\begin{verbatim*}\n%\n\\end{verbatim*}",
        r"At 50\% and \\ of it.",
        r"\url{http://a.org/{nested}%7B}",
        "\\begin{alltt}\n100%\n\\end{alltt}",
    ],
)
def test_a_percent_sign_that_is_no_comment_stays(source):
    assert body(S + source) == S + source
    assert body(S + source + " % a comment\nNext.") == S + source + " \nNext."


def test_comments_go():
    text = "a % b\n% whole line\n  % indented\nc\\\\% d\n\\% e % f\n\\begin{comment}\n\\begin{verbatim}\n\\end{comment}\ng%\nh"
    assert body(S + text) == S + "a \nc\\\\\n\\% e \n\ng\nh"
    assert body(S + "% \\begin{verbatim}\na % b") == S + "a"  # a command in a comment is none
    assert body(S + "a \\begin{comment} never ended").strip() == S + "a"
    assert (
        body(S + "a \ufdd07\ufdd1\\verb|%|") == S + "a \\verb|%|"
    )  # what stands for verbatim text is no text of a paper


@pytest.mark.parametrize(
    "opened", ["\\lstinline[ ", "\\url{ ", "\\href{{ ", "\\verb|x\n", "\\begin{verbatim} ", "{", "\\"]
)
def test_what_is_never_closed_takes_linear_time(opened):
    assert (
        body(S + opened * 20_000) == (S + opened * 20_000).strip()
    )  # minutes, if every one were looked for to the end


def test_commands_in_verbatim_text_are_none():
    listing = "\\begin{verbatim}\n\\newcommand{\\x}{no}\n\\section{B} \\x \\bibliography{c}\n\\end{verbatim}"
    source = "\\newcommand{\\x}{yes}\n" + listing + "\n" + S + listing + " \\x end.\n\\bibliography{c}\nrest"
    assert body(source) == S + listing + " yes end."


def test_comments_agree_with_a_scanner_character_by_character():
    rng = random.Random(5)

    def reference(text: str) -> str:
        """Comments removed by the rules of TeX alone, without verbatim text: an odd number of backslashes escapes."""
        lines = []
        for line in text.split("\n"):
            place = next(
                (i for i, c in enumerate(line) if c == "%" and (i - len(line[:i].rstrip("\\"))) % 2 == 0), None
            )
            if place is None:
                lines.append(line)
            elif line[:place].strip(" \t"):
                lines.append(line[:place])
            else:
                lines.append(None)
        kept = [line for line in lines if line is not None]
        return "\n".join(kept) + ("\n" if lines[-1] is None and kept else "")

    for _ in range(300):
        text = "".join(rng.choices(["\\", "%", "x", " ", "\n", "y"], weights=[3, 2, 3, 2, 2, 1], k=rng.randint(1, 40)))
        assert body(S + "z" + text).strip() == (S + reference("z" + text)).strip(), repr(text)


LETTER = r"""\documentclass{revtex4}
\begin{document}
\title{A letter}
\begin{abstract}Not kept, as before the first section of a paper.\end{abstract}
\maketitle
We report a result. % comment
It holds.
\begin{thebibliography}{9}\bibitem{a} A.\end{thebibliography}
\end{document}
"""


def test_papers_without_sections_are_read(tmp_path):
    assert body(LETTER) == "We report a result. \nIt holds."
    assert body("\\begin{document}\nDear reader, hello.\n\\end{document}") == "Dear reader, hello."
    assert body("This chapter is included by another file.\n% end\nIt has two lines.") == (
        "This chapter is included by another file.\nIt has two lines."
    )
    for macros in (
        "\\newcommand{\\a}{b}\n\\def\\c{d}",
        "\\documentclass{article}\n\\usepackage{x}\nloads some more things",
        "% only this",
    ):
        (tmp_path / "a.tex").write_text(macros)
        with pytest.raises(DataError, match="no section with text"):
            read(tmp_path / "a.tex")


@pytest.mark.parametrize(
    "name",
    [
        "File",
        "Image",
        "Category",
        "Datei",
        "Bild",
        "Kategorie",
        "Archivo",
        "Categoría",
        "Файл",
        "Категория",
        "ファイル",
        "カテゴリ",
        "分類",
        "文件",
        "파일",
        "분류",
        "Plik",
        "Tập tin",
        "Thể_loại",
        "تصنيف",
        "קובץ",
        "चित्र",
    ],
)
def test_media_and_categories_in_any_language_are_no_text(name):
    assert (
        plain(f"One [[{name}:Something|thumb|A [[caption]] here]]two [[{name.upper()} : x]]three.") == "One two three."
    )
    assert plain(f"[[{name}]] and [[Other: {name}|a link]]") == f"{name} and a link"


def test_the_dump_itself_names_its_namespaces(tmp_path):
    info = "<siteinfo><namespaces><namespace key='0'/><namespace key='6'>Qapyq</namespace><namespace key='14'>Aji ra</namespace></namespaces></siteinfo>"
    page = "<page><title>T</title><ns>0</ns><id>1</id><revision><text>One [[qapyq:x.jpg|thumb|cap]]two[[Aji_ra:y]] [[Other:z|link]].</text></revision></page>"
    for name, pack in (("dump.xml", bytes), ("wiki-20240101.XML.bz2", bz2.compress), ("x.xml.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(f"<mediawiki>{info}{page}</mediawiki>".encode()))
        found, _ = read(tmp_path / name)
        assert [d.text for d in found] == ["One two link."]
    (tmp_path / "posts-2024.xml").write_text(
        '<?xml version="1.0"?>\n<posts><row Id="1" PostTypeId="1" Title="Why?" Body="&lt;p&gt;So&lt;/p&gt;" /></posts>'
    )
    assert read(tmp_path / "posts-2024.xml")[0][0].text == "Question: Why?\n\nSo"
    (tmp_path / "other.xml").write_text("<doc>some text</doc>")
    assert read(tmp_path / "other.xml")[0][0].text == "<doc>some text</doc>"


@pytest.mark.parametrize(
    "label, codec",
    [
        ("gb2312", "gb18030"),
        ("big5", "big5"),
        ("koi8-r", "koi8-r"),
        ("none", "utf-8"),
        ("UTF-16", "utf-16"),
        ("utf-16", "utf-8"),
        ("iso-8859-1", "cp1252"),
        ("UTF-8", "utf-8-sig"),
    ],
)
def test_dumps_in_any_declared_encoding(tmp_path, label, codec):
    words = {"koi8-r": "Слова", "cp1252": "“café”"}.get(codec, "文字")
    xml = f"<?xml version='1.0' encoding='{label}'?><mediawiki><page><title>T</title><ns>0</ns><id>1</id><revision><text>{words}</text></revision></page></mediawiki>"
    (tmp_path / "a.xml").write_bytes(xml.encode(codec))
    found, tally = read(tmp_path / "a.xml")
    assert [d.text for d in found] == [words] and not tally.unusable


def test_an_invalid_byte_costs_one_character_of_a_dump(tmp_path):
    page = "<page><title>T</title><ns>0</ns><id>{}</id><revision><text>Sound words here.</text></revision></page>"
    xml = f"<mediawiki>{page.format(1)}{page.format(2)}</mediawiki>".encode().replace(b"Sound", b"S\xffund", 1)
    (tmp_path / "a.xml").write_bytes(xml)
    found, tally = read(tmp_path / "a.xml")
    assert [d.text for d in found] == ["S\ufffdund words here.", "Sound words here."]
    assert tally.counts == {"invalid_utf8_replaced": 1}


def test_an_entity_declared_across_two_pieces_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.xml.CHUNK", 7)
    bomb = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><mediawiki>&b;</mediawiki>'
    (tmp_path / "a.xml").write_bytes(bomb)
    tally = Tally()
    with pytest.raises(DataError, match="no article"):
        (source,) = find_sources([str(tmp_path / "a.xml")])
        list(source.documents(tally, 0, 0.0))
    assert tally.unusable == {"XML files with entities": 1}


@pytest.mark.parametrize(
    "source, text",
    [
        ("one<br>two<br/>three<BR />four", "one\ntwo\nthree\nfour"),
        ("== Head<br>line ==\ntext", "Head\nline\ntext"),
        ("a<div>b</div>c", "a\nb\nc"),
        ("<p>one</p><p>two</p>", "one\n\ntwo"),
        ("* one\n* two", "one\ntwo"),
        ("a<ref>b<br>c</ref>d", "ad"),
        ("a<sub>2</sub>b", "a2b"),
        ("[[x|a<br>b]]", "a\nb"),
    ],
)
def test_breaks_part_words(source, text):
    assert plain(source) == text


@pytest.mark.parametrize(
    "source, text",
    [
        ("-{zh-hans:计算机;zh-hant:電腦}-", "计算机"),
        ("-{zh-tw:電腦; zh-cn:计算机;}-科学", "计算机科学"),
        ("-{原文}-", "原文"),
        ("-{H|zh-cn:a;zh-tw:b}-x", "x"),
        ("-{A|zh-cn:a;zh-tw:b}-", "a"),
        ("-{T|标题}-", ""),
        ("-{R|a;b}-", "a;b"),
        ("-{zh-hans;zh-hant|raw}-", "raw"),
        ("-{zh-tw:甲-{zh-cn:乙;zh-tw:丙}-;zh-hk:丁}-", "甲乙"),
        ("-{[[a|b]]}-", "[[a|b]]"),
        ("-{sr-ec:Ћ;sr-el:Ć}-", "Ћ"),
        ("-{{x}}-", "-{{x}}-"),
        ("-{|zh-cn:a;zh-tw:b}-", "a"),
        ("-{巨集=>zh-cn:宏;}-", "宏"),
        ("-{zh-cn:a;b;zh-tw:c}-", "a;b"),
        ("-{zh-hk:a\nb;zh-tw:c}-", "a\nb"),
        ("a-{b", "a-{b"),
        ("-{-|zh-cn:a}-", ""),
    ],
)
def test_of_language_variants_one_is_kept(source, text):
    assert one_variant(source) == text
    assert plain(source) == plain(text)


@pytest.mark.parametrize("seed", range(5))
def test_plain_text_agrees_with_the_parsers_own(seed):
    library = pytest.importorskip("mwparserfromhell")
    rng = random.Random(seed)
    pieces = [
        "one ",
        "''two'' ",
        "'''three''' ",
        "[[five]] ",
        "[[six|seven ''eight'']] ",
        "{{nine|ten}}",
        "{{{eleven|twelve}}} ",
        "\n== Head ''x'' ==\n",
        "&amp; ",
        "&#x5b57; ",
        "<!-- hidden -->",
        "[http://a.b shown] ",
        "[http://a.b] ",
        "http://c.d ",
        "\n\n",
        "\n* item\n",
        "<sub>2</sub> ",
        "<nowiki>[[raw]]</nowiki> ",
        "<small>[[a|b]]</small> ",
        "\n----\n",
        "\n: dd\n",
        "文字",
    ]
    for _ in range(60):
        source = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        reference = library.parse(source).strip_code(normalize=True, collapse=True)
        lines = [line.strip() for line in reference.split("\n")]
        assert [line for line in plain(source).split("\n") if line] == [line for line in lines if line], source


def test_dropped_elements_at_any_depth():
    assert (
        plain(
            "a<ref>b [[File:x|y]] {{t}}</ref>''b<ref name=x/>''[[c|d<ref>e</ref>]] <small>f<gallery>g</gallery></small>"
        )
        == "abd f"
    )
    assert plain("[[File:x|thumb|A [[link]] and [[Category:z]]]]t [http://a b<ref>c</ref>]") == "t b"
    assert plain("{|\n| a<br>b\n|}\nafter &#99999999999; &nosuch; end").endswith("end")
