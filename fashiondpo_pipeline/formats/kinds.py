"""What a file is, by its first bytes."""

import re

FIRST = 1 << 12  # bytes that are looked at
PARQUET, ARROW, LINES, JSON, CSV, XLSX, TAR = "Parquet", "Arrow", "JSON lines", "JSON", "CSV", "a spreadsheet", "a tar archive"
ZIP, GZIP = "a zip archive", "a gzip archive"
ARCHIVES = (ZIP, GZIP, TAR, "a bzip2 archive", "an xz archive", "a zstd archive", "a 7z archive", "a rar archive")
OTHER_PICTURES = ("a GIF", "a BMP", "a TIFF", "an AVIF", "a HEIC")  # which are not read
PICTURES = ("a PNG", "a JPEG", "a WebP", *OTHER_PICTURES)
WRONG = {  # what stands where a table should, and what to do
    "a git LFS pointer": "`git lfs pull` fetches the file", "a web page": "get the file itself, not the page that shows it",
    "a link that was copied as text": "copy what it leads to", "empty": "copy it again", "text": "name its kind by its ending, such as .csv",
    "a pickle": "it runs code when it is read: save it as Parquet", ZIP: "unpack it, or import it by itself", GZIP: "unpack it"}
_MAGIC = {b"PAR1": PARQUET, b"ARROW1": ARROW, b"\xff\xff\xff\xff": ARROW, b"PK\x03\x04": ZIP, b"PK\x05\x06": ZIP, b"\x1f\x8b": GZIP,
          b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive", b"(\xb5/\xfd": "a zstd archive", b"7z\xbc\xaf": "a 7z archive",
          b"Rar!": "a rar archive", b"version https://git-lfs": "a git LFS pointer", b"\x89PNG": "a PNG", b"\xff\xd8\xff": "a JPEG",
          b"GIF8": "a GIF", b"BM": "a BMP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"\x80\x02": "a pickle", b"\x80\x03": "a pickle",
          b"\x80\x04": "a pickle", b"\x80\x05": "a pickle"}


def kind_of(name: str, first: bytes) -> str:
    """What a file is, in words; `first`: its first FIRST bytes. Of text, which tells little, the ending is believed.

    >>> kind_of("a.parquet", b"PAR1"), kind_of("train.parquet", b"../../blobs/aaaa"), kind_of("a.CSV", b"prompt;first")
    ('Parquet', 'a link that was copied as text', 'CSV')
    """
    ending = name.lower()
    for magic, kind in _MAGIC.items():
        if first.startswith(magic):
            if kind is ZIP and ending.endswith(".xlsx"):
                return XLSX
            return TAR if kind is GZIP and ending.endswith((".tar.gz", ".tgz")) else kind
    if first[257:262] == b"ustar":
        return TAR
    if first[:4] == b"RIFF" and first[8:12] == b"WEBP":
        return "a WebP"
    if first[4:8] == b"ftyp":
        return "an AVIF" if first[8:12] in (b"avif", b"avis") else "a HEIC"
    if not first:
        return "empty"
    return _kind_of_text(ending, first)


def _kind_of_text(ending: str, first: bytes) -> str:
    start = first.removeprefix(b"\xef\xbb\xbf").lstrip()
    if ending.endswith((".csv", ".tsv")):
        return CSV
    if ending.endswith((".jsonl", ".ndjson")):
        return LINES
    if ending.endswith(".json") or start[:1] == b"[":
        return JSON
    if start[:1] == b"{":
        return LINES
    if start[:9].lower() == b"<!doctype" or start[:5].lower() == b"<html":
        return "a web page"
    if len(first) < 400 and re.fullmatch(rb"[\w./-]*(blobs/|\.\./)[\w./-]+\n?", first):
        return "a link that was copied as text"
    if ending.endswith((".parquet", ".arrow", ".tar", ".xlsx")):
        return {".parquet": PARQUET, ".arrow": ARROW, ".tar": TAR, ".xlsx": XLSX}["." + ending.rsplit(".", 1)[1]]
    return CSV if ending.endswith(".txt") and b"\0" not in first else "text" if b"\0" not in first else "of a kind that is not known"
