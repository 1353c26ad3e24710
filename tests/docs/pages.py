"""The pages of Markdown in this checkout, taken apart: headings, links, fenced code, commands."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.checkout import ROOT, tracked_files

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
# What a command of the pages begins with, after variables of its environment.
_COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ +)*(?:\.venv/bin/)?(?:python|make|pytest|pip|twine|cmake|g\+\+|benchmarks/|build/|\.ci/)"
)


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        path: from the root of the checkout.
    """

    path: Path

    @cached_property
    def text(self) -> str:
        """All of it."""
        return (ROOT / self.path).read_text()

    @cached_property
    def prose(self) -> str:
        """Without fenced code."""
        return _FENCE.sub("", self.text)

    def code(self, language: str) -> list[str]:
        """The blocks of fenced code in a language, without what indents them."""
        return [block for name, block in _FENCE.findall(self.text) if name == language]

    @cached_property
    def languages(self) -> set[str]:
        """Languages of fenced code; "" where a block names none."""
        return {name for name, _ in _FENCE.findall(self.text)}

    @cached_property
    def links(self) -> list[str]:
        """Targets of links and images."""
        return _LINK.findall(_INLINE.sub("`code`", self.prose))

    @cached_property
    def anchors(self) -> set[str]:
        """What links may name after a `#`, as GitHub makes it of headings."""
        anchors, seen = set(), Counter()
        for heading in _HEADING.findall(self.prose):
            name = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
            name = re.sub(r"[^\w\- ]", "", name).replace(" ", "-")
            anchors.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
        return anchors

    @cached_property
    def inline(self) -> list[str]:
        """Code between backticks, its line breaks folded."""
        return [" ".join(code.split()) for code in _INLINE.findall(self.prose)]

    @cached_property
    def commands(self) -> list[str]:
        """Lines of indented code that are commands, continued ones joined."""
        lines = re.findall(r"^ {4,}(\S.*)$", self.prose.replace("\\\n", " "), re.MULTILINE)
        return [re.sub(r" {2,}#.*", "", line).strip() for line in lines if _COMMAND.match(line)]

    @cached_property
    def mentions(self) -> list[str]:
        """Commands between backticks, which need not be whole."""
        return [code for code in self.inline if " " in code and _COMMAND.match(code)]


PAGES = [Page(file) for file in tracked_files() if file.suffix == ".md"]
BY_PATH = {page.path: page for page in PAGES}
