"""Links lead somewhere: to files, to headings, to tests; and every page can be reached."""

import os
import re
from pathlib import Path

import pytest

from tests.checkout import ROOT, tracked_files
from tests.docs.pages import BY_PATH, PAGES, Page

# Where a path between backticks may start from.
ROOTS = ("", "moe_ops", "moe_ops/integrations", "tests", "docs")
# What commands of the pages write.
MADE = re.compile(r"build/|dist/|DIR/|/tmp/|~|layer")


def target(page: Page, link: str) -> tuple[Path, str]:
    """(file from the root, anchor) of a link between files."""
    file, _, anchor = link.partition("#")
    path = os.path.normpath(page.path.parent / file) if file else str(page.path)
    return Path(path), anchor


def complaints(page: Page) -> list[str]:
    """What is wrong with the links of a page."""
    wrong = []
    for link in page.links:
        if re.match(r"https?://", link):
            continue
        file, anchor = target(page, link)
        if file not in BY_PATH and not (ROOT / file).exists():
            wrong.append(f"{link}: there is no {file}")
        elif anchor and anchor not in BY_PATH[file].anchors:
            wrong.append(f"{link}: {file} has no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path))
def test_links(page):
    assert complaints(page) == []


def test_links_that_lead_nowhere_are_found():
    page = Page(Path("docs/none.md"))
    vars(page)["text"] = "# A `b` (c)\n[x](gone.md) [y](op.md#gone) [z](#a-b-c) [op](op.md#ids) [w](#gone)\n"
    BY_PATH[page.path] = page
    try:
        assert [wrong.split(":")[0] for wrong in complaints(page)] == ["gone.md", "op.md#gone", "#gone"]
    finally:
        del BY_PATH[page.path]


def test_every_page_can_be_reached():
    """From the README, by links alone."""
    found, left = set(), [Path("README.md")]
    while left:
        file = left.pop()
        if file in BY_PATH and file not in found:
            found.add(file)
            left += [target(BY_PATH[file], link)[0] for link in BY_PATH[file].links if "://" not in link]
    assert {page.path for page in PAGES} - found == set()


def test_every_picture_is_shown():
    shown = {target(page, link)[0] for page in PAGES for link in page.links if "://" not in link}
    pictures = {file for file in tracked_files() if file.parts[:2] == ("docs", "images")}
    assert pictures and pictures - shown == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path))
def test_files_that_are_named_exist(page):
    """Paths between backticks, with the tests behind `::`."""
    gone = []
    for code in page.inline:
        match = re.fullmatch(r"((?:[\w.]+/)+[\w.]*|[\w]+\.(?:py|md|h|cpp|toml|cff|in))(?:::(\w+))?", code)
        if match is None or MADE.match(code):
            continue
        file, test = match.groups()
        found = [path for root in ROOTS if (path := ROOT / root / file).exists()]
        found += [ROOT / path for path in tracked_files() if "/" not in file and path.name == file][:1]
        if not found or (test and f"def {test}(" not in found[0].read_text()):
            gone.append(code)
    assert gone == []
