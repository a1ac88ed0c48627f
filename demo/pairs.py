"""Make questions with their texts out of Debian's packages, for ``m3 eval search --pairs``.

``apt-get download dict-foldoc manpages-zh debian-reference-zh-cn``, then ``dpkg -x`` each into one folder:
``python demo/pairs.py FOLDER OUT`` writes foldoc.jsonl (a headword asks for its entry), chinese-manual.jsonl (the line
under a manual page's name asks for its description) and chinese-guide.jsonl (a heading asks for its section).
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from bs4 import BeautifulSoup

Pairs = Iterator[tuple[str, str]]
LONGEST = 600
"""Characters of an entry."""
LONGEST_CHINESE = 300
SHORTEST = 80
CHINESE = re.compile("[\u4e00-\u9fff]")
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""The digits of numbers in the index of a dictd dictionary."""


def main(folder: Path, out: Path) -> None:
    """Write the three files."""
    out.mkdir(parents=True, exist_ok=True)
    for name, pairs in (
        ("foldoc", dictionary(folder / "usr/share/dictd/foldoc")),
        ("chinese-manual", chinese(manual_pages(folder / "usr/share/man/zh_CN"))),
        ("chinese-guide", chinese(sections(folder / "usr/share/debian-reference"))),
    ):
        lines = [json.dumps({"question": question, "text": text}, ensure_ascii=False) for question, text in pairs]
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{name}: {len(lines)} texts")


def dictionary(stem: Path) -> Pairs:
    """The entries of a dictd dictionary, each once."""
    content, seen = gzip.decompress(stem.with_suffix(".dict.dz").read_bytes()), set()
    for line in stem.with_suffix(".index").read_text(encoding="utf-8", errors="replace").splitlines():
        word, *place = line.split("\t")[:3]
        begin, length = (number(digits) for digits in place)
        if word.startswith("00") or begin in seen:  # about the dictionary, or another word for the same entry
            continue
        seen.add(begin)
        head, _, rest = content[begin : begin + length].decode("utf-8", "replace").strip().partition("\n")
        text = plain(re.sub("[{}]", "", rest))[:LONGEST]
        if len(text) >= SHORTEST:
            yield f"What is {head.strip()}?", f"{head.strip()}\n{text}"


def number(digits: str) -> int:
    """A number of 64 digits."""
    value = 0
    for digit in digits:
        value = 64 * value + DIGITS.index(digit)
    return value


def manual_pages(folder: Path) -> Pairs:
    """The one-line descriptions of manual pages, and how their descriptions begin."""
    for file in sorted(folder.glob("man*/*.gz")):
        try:
            page = gzip.decompress(file.read_bytes()).decode("utf-8")
        except UnicodeDecodeError:
            continue
        headings = re.split(r"(?mi)^\.SH\s+(.*)$", page)
        parts = list(zip(headings[1::2], headings[2::2], strict=True))
        names = [text for heading, text in parts if re.search("NAME|名称|名字", heading.upper())]
        texts = [text for heading, text in parts if re.search("DESCRIPTION|描述|说明", heading.upper())]
        if names and texts:
            _, _, question = re.sub(r"\s+[-–—]+\s+", "\0", roff(names[0]), count=1).partition("\0")
            yield question, roff(texts[0])


def roff(text: str) -> str:
    """The words of a manual page's source."""
    text = re.sub(r'(?m)^(\.\\"|\').*$', "", text)
    text = re.sub(r"\\f(\(..|\[\w*\]|.)|\\[,/&|^%:]|\\\(..|\\s[+-]?\d+", "", text)
    text = re.sub(r"(?m)^\.(B|I|BR|BI|IR|RB|RI|IB|Nm|Nd|Fa|Ar|Fl|Em|Dq|Xr|Fn|Sx|Pa|Li|Ql|Va|Cm)\s+", "", text)
    text = re.sub(r"(?m)^\..*$", "", text)
    return plain(text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " "))


def sections(folder: Path) -> Pairs:
    """The headings of the Debian reference, and how their sections begin, without sections within."""
    for file in sorted(folder.glob("ch*.html")):
        for section in BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser").select("div.section"):
            own = [
                part.get_text(" ", strip=True)
                for part in section.find_all(["p", "li", "pre"])
                if part.find_parent("div", class_="section") is section and not part.find_parent(["p", "li"])
            ]
            heading = section.find(["h2", "h3", "h4"])
            if heading is not None:
                yield re.sub(r"^[\d.\s]+", "", heading.get_text(" ", strip=True)), plain(" ".join(own))


def chinese(pairs: Pairs) -> Pairs:
    """Pairs in Chinese, each question once."""
    seen = set()
    for question, text in pairs:
        begin = text[:LONGEST_CHINESE]
        if len(CHINESE.findall(question)) >= 4 and len(CHINESE.findall(begin)) >= 60 and question not in seen:
            seen.add(question)
            yield question, begin


def plain(text: str) -> str:
    """A text in one line."""
    return re.sub(r"\s+", " ", text).strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
