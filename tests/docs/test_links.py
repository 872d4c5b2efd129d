"""Links between our own pages lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md")]


def links(page: Path) -> list[str]:
    """Targets of `[text](target)` and `![text](target)` outside code, but for other sites'."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page):
    missing = [target for target in links(page) if not (page.parent / target.partition("#")[0]).exists()]
    assert not missing


def test_every_page_is_in_the_index():
    listed = links(ROOT / "docs" / "README.md")
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"} <= set(listed)


def test_commands_in_the_pages_name_files_and_modules_that_are_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        scripts = re.findall(r"python ((?:benchmarks|docs)/\w+\.py)", text)
        modules = [name.replace(".", "/") for name in re.findall(r"python -m (esd_peft[\w.]*\w)", text)]
        for name in [*scripts, *(f"{module}.py" for module in modules)]:
            package = ROOT / name.removesuffix(".py") / "__main__.py"
            assert (ROOT / name).is_file() or package.is_file(), f"{page.name}: {name}"
