"""The site has all pages, and its links and pictures lead somewhere."""

import importlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """Where a page's links and pictures lead, and the places within it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.targets, self.places = path, [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.places.add(given.get("id"))
        self.targets += [given[name] for name in ("href", "src") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is not installed: pip install -e .[docs]")
    config = importlib.import_module("mkdocs.config").load_config(
        str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path_factory.mktemp("site")), strict=True
    )
    mkdocs.build(config)
    return Path(config.site_dir)


def test_links_lead_to_files_and_places_that_are_there(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}  # whose links are the server's
    missing = []
    for page in pages.values():
        for target in page.targets:
            if re.match(r"\w+:|//", target):
                continue
            name, _, place = unquote(target).partition("#")
            path = (page.path.parent / name).resolve() if name else page.path
            path = path / "index.html" if path.is_dir() else path
            if not path.is_file() or (place and path in pages and place not in pages[path].places):
                missing.append(f"{page.path.relative_to(site)}: {target}")
    assert not missing
    assert len(pages) > 20


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"[\w/-]+\.md", yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(nav)
    assert all((ROOT / page).is_file() for page in nav)


def test_a_page_asks_nothing_of_other_sites(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    assert not loaded
