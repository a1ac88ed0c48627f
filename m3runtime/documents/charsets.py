"""`charset`: the character encoding of a text, by its marks, its declaration or its bytes."""

import codecs
import re

from m3runtime.errors import InputError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LEGACY = (
    *("cp1252", "gb18030", "cp949", "cp932", "euc_jp", "big5"),
    *("cp1250", "cp1251", "koi8_r", "cp1253", "cp1255", "cp1256", "latin_1"),
)
"""Encodings that are told apart by their bytes; where two are equally likely, the first."""
_SAMPLE = 1 << 16
"""Bytes that are looked at."""
_WORDS = re.compile(rb"[\x00-\x7f]{0,32}[\x80-\xff]\S*(?:\s[\x00-\x7f]{0,32})?")
"""Words that are not ASCII alone, and some of their neighbours: much ASCII would make all encodings look alike.

White space is itself in all these encodings, so no character is cut.
"""


def marked_charset(begin: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning of a file stands for, or None."""
    return next((name for mark, name in _MARKS.items() if begin.startswith(mark)), None)


def declared_charset(markup: bytes) -> str | None:
    """The encoding that HTML or XML declares for itself, or None if it has none or Python does not know it."""
    from bs4.dammit import EncodingDetector

    name = EncodingDetector.find_declared_encoding(markup, is_html=True)
    try:
        return codecs.lookup(name).name if name else None
    except LookupError:
        return None


def charset(block: bytes, name: str, declared: str | None = None) -> str:
    """The encoding of a block that is not ASCII alone, and may end within a character: UTF-8 if it can be.

    Raises `InputError`, which calls the file ``name``, for damaged UTF-8 and if no encoding is likely.
    """
    if _may_be(block, "utf-8"):
        return "utf-8"
    if declared and declared != "utf-8" and _may_be(block, declared):
        return declared
    shown = block.decode("utf-8", "replace")
    bad = shown.count("\ufffd")
    if sum(not char.isascii() for char in shown) > 2 * bad:  # other encodings are rarely valid UTF-8 by chance
        return "utf-8"  # whose decoder names the place
    likely = _likely(block)
    if likely is None:
        raise InputError(f"{name} is a binary file, or text in an unknown encoding; convert it to UTF-8")
    return likely


def _may_be(block: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(block)
    except UnicodeDecodeError:
        return False
    return True


def _likely(block: bytes) -> str | None:
    from charset_normalizer import from_bytes

    words, size = list[bytes](), 0
    for word in _WORDS.finditer(block):
        words.append(word[0])
        size += len(word[0])
        if size > _SAMPLE:
            break
    if len(words) > 1 and len(block) > _SAMPLE:
        words.pop()  # which the block may cut
    found = from_bytes(b"".join(words), cp_isolation=list(_LEGACY))
    names = [name for name in _LEGACY if _may_be(block, name)]
    ranked = [
        (round(match.chaos, 2), -match.coherence, names.index(name))
        for match in found
        for name in (match.encoding, *match.could_be_from_charset)
        if name in names
    ]
    return names[min(ranked)[2]] if ranked else None
