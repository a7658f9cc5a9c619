"""Real English text that any Debian machine can fetch: documentation packages, cut into paragraphs of prose.

In: a folder; the packages are downloaded into it (``apt-get download``, as any user) and unpacked there, nothing is
installed.  Out: paragraphs by source, in the order of the packages' files, no paragraph twice.  The text stays where it
was fetched: its licences are those of the packages, and none of it is part of this repository.
"""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_WORDS, MIN_PROSE = 8, 0.93  # of a paragraph's characters, letters and the marks of plain sentences


class CorpusError(RuntimeError):
    """A package that cannot be had: which, why, what to do."""


@dataclass(frozen=True)
class Source:
    """Files of one package that are written in one manner."""

    name: str
    """One word: the label of the task that tells sources apart."""
    package: str
    files: str
    """Pattern below the package's root."""
    kind: str
    """text, man, pod or fortunes."""


SOURCES = (
    Source("debian", "debian-reference-en", "usr/share/debian-reference/debian-reference.en.txt.gz", "text"),
    Source("policy", "debian-policy", "usr/share/doc/debian-policy/policy.txt.gz", "text"),
    Source("developers", "developers-reference", "usr/share/developers-reference/*.txt.gz", "text"),
    Source("jargon", "jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", "text"),
    Source("vim", "vim-runtime", "usr/share/vim/vim*/doc/[a-u]*.txt", "text"),
    Source("perl", "perl-doc", "usr/share/perl/*/pod/perl[a-t]*.pod", "pod"),
    Source("calls", "manpages-dev", "usr/share/man/man2/*.gz", "man"),
    Source("library", "manpages-dev", "usr/share/man/man3/*.gz", "man"),
    Source("concepts", "manpages", "usr/share/man/man[4-7]/*.gz", "man"),
    Source("computers", "fortunes", "usr/share/games/fortunes/computers", "fortunes"),
    Source("songs", "fortunes", "usr/share/games/fortunes/songs-poems", "fortunes"),
    Source("people", "fortunes", "usr/share/games/fortunes/people", "fortunes"),
)


def fetch(folder: Path) -> dict[str, str]:
    """Download and unpack what is not there yet into ``folder/<package>``.  Returns the version of each package.

    Raises:
        CorpusError: a package cannot be downloaded or unpacked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in dict.fromkeys(source.package for source in SOURCES):
        if not list(folder.glob(f"{package}_*.deb")):
            _call(package, ["apt-get", "download", "-qq", package], folder)
        archive = min(folder.glob(f"{package}_*.deb"))
        if not (folder / package).is_dir():
            partial = folder / f".{package}.partial"
            _call(package, ["dpkg-deb", "-x", archive.name, partial.name], folder)
            partial.rename(folder / package)
        versions[package] = _call(package, ["dpkg-deb", "-f", archive.name, "Version"], folder).strip()
    return versions


def _call(package: str, command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise CorpusError(
            f"package {package}: {command[0]} cannot be run ({error}). The study needs Debian."
        ) from error
    if done.returncode != 0:
        raise CorpusError(
            f"package {package}: {' '.join(command)} failed: {done.stderr.strip()[-300:]}. "
            "Run apt-get update, or put the package's .deb file into the folder by hand."
        )
    return done.stdout


def paragraphs(folder: Path) -> dict[str, list[str]]:
    """Paragraphs of prose by source; one that two sources have belongs to the first."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for source in SOURCES:
        own = []
        for path in sorted((folder / source.package).glob(source.files)):
            for paragraph in prose(read(path), source.kind):
                if paragraph not in seen:
                    seen.add(paragraph)
                    own.append(paragraph)
        if not own:
            raise CorpusError(f"package {source.package}: {source.files} holds no prose. Give another version of it.")
        found[source.name] = own
    return found


def read(path: Path) -> str:
    """A text file, unpacked if need be; what is not UTF-8 becomes a mark that no prose has."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return content.decode("utf-8", "replace")


def prose(text: str, kind: str) -> Iterator[str]:
    """The paragraphs of a file that are sentences, each on one line, without markup.  Pure."""
    readers: dict[str, Callable[[str], str]] = {"text": str, "fortunes": _fortunes, "man": _man, "pod": _pod}
    for block in re.split(r"\n\s*\n", readers[kind](text)):
        paragraph = re.sub(r"\s+", " ", block).strip()
        marks = sum(character.isalpha() or character in " ,.;:'\"?!-()" for character in paragraph)
        if (
            paragraph.count(" ") >= MIN_WORDS - 1
            and marks >= MIN_PROSE * len(paragraph)
            and re.match(r"[A-Z\"'(]", paragraph)
            and re.search(r"[.?!][\"')]*$", paragraph)
            and paragraph.isascii()
        ):
            yield paragraph


def _fortunes(text: str) -> str:
    """One paragraph for each saying; lines that begin with a dash name who said it."""
    sayings = re.split(r"^%$", text, flags=re.M)
    return "\n\n".join(re.sub(r"\n\s*(?=\n)|^\s*--.*\Z", "", saying, flags=re.M | re.S) for saying in sayings)


def _man(text: str) -> str:
    """The text of a manual page: requests for fonts keep their words, all others end a paragraph."""
    lines = []
    for line in text.splitlines():
        request = re.match(r"[.']\s*([A-Za-z\\]*\"?)\s*(.*)", line)
        if request is None:
            lines.append(line)
        elif request[1] in ("B", "I", "BR", "IR", "RB", "BI", "IB", "RI"):
            parts = re.findall(r'"([^"]*)"|(\S+)', request[2])
            joint = " " if len(request[1]) == 1 else ""
            lines.append(joint.join(quoted or bare for quoted, bare in parts))
        elif not request[1].startswith("\\"):
            lines.append("")
    plain = re.sub(r"\\f[BIRP]|\\[&|/,]|\\f\([A-Z]{2}", "", "\n".join(lines))
    return plain.replace("\\-", "-").replace("\\(aq", "'").replace("\\[aq]", "'").replace("\\e", "\\")


def _pod(text: str) -> str:
    """The text of a Perl document: commands and indented lines are left out, links become what they lead to."""
    lines = ["" if line[:1] in "= \t" else line for line in text.splitlines()]
    plain = "\n".join(lines)
    for _ in range(3):  # codes in codes
        plain = re.sub(r"[A-Z]<(?:[^<>|]*\|)?([^<>|]*)>", r"\1", plain)
    return plain
