"""PDF files as sources: text of all pages, titles, damaged and encrypted files."""

from __future__ import annotations

from pathlib import Path

import pytest

from luban.core.errors import DataError
from luban.corpus.sources import DamagedFile, find_sources
from luban.corpus.tally import Tally

pypdf = pytest.importorskip("pypdf", reason="needs pypdf")


def write_pdf(path: Path, pages: list[list[str]], title: str = "", password: str = "") -> Path:
    """A file of pages of lines, drawn in Helvetica."""
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    for lines in pages:
        page = writer.add_blank_page(300, 300)
        font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        font = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        drawn = "".join(f"({line}) Tj T* " for line in lines)
        stream.set_data(f"BT /F1 12 Tf 14 TL 20 250 Td {drawn}ET".encode("latin-1"))
        page[NameObject("/Contents")] = writer._add_object(stream)
    if title:
        writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password)
    writer.write(path)
    return path


def documents(path: Path, tally: Tally | None = None):
    (source,) = find_sources([str(path)])
    return list(source.documents(tally or Tally(), 0, 0.0))


def test_pages_title_and_divided_words(tmp_path):
    pages = [["A cable is an exam-", "ple of a wire.", "Non-", "Linear stays."], [], ["The second page."]]
    (found,) = documents(write_pdf(tmp_path / "a.pdf", pages, "Wires"))
    assert found.text == "A cable is an example of a wire.\nNon-\nLinear stays.\n\nThe second page."
    assert found.meta == {"title": "Wires"} and found.id == "a.pdf"


def test_what_can_not_be_read_is_said(tmp_path):
    with pytest.raises(DataError, match="encrypted: save it without a password first"):
        documents(write_pdf(tmp_path / "locked.pdf", [["x"]], password="secret"))
    with pytest.raises(DataError, match="2 pages without text"):
        documents(write_pdf(tmp_path / "scan.pdf", [[], []]))
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4\n nothing of it")
    with pytest.raises(DamagedFile, match="no readable PDF"):
        documents(tmp_path / "bad.pdf")


def test_in_a_folder_a_damaged_one_is_counted(tmp_path):
    write_pdf(tmp_path / "good.pdf", [["words"]])
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4\n nothing of it")
    tally = Tally()
    (found,) = documents(tmp_path, tally)
    assert found.text == "words"
    assert any("bad.pdf" in where for where in tally.unusable_samples["files without documents"])
