"""For `mkdocs build`: the site has what README.md leads to, in the repository's folders, so that all links hold there.

Pages may link to any file or folder of the repository. A folder gets a page that lists its files.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_staged = tempfile.TemporaryDirectory()


def on_config(config: Any) -> Any:
    """Stage the pages, and build from there."""
    for source in reachable(ROOT / "README.md"):
        target = Path(_staged.name) / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            target.mkdir(exist_ok=True)
            (target / "index.md").write_text(listing(source), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    config["docs_dir"] = _staged.name
    return config


def reachable(start: Path) -> list[Path]:
    """Pages, files and folders that links lead to, and the files of these folders."""
    found, waiting = [], [start]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        if path.is_dir():
            waiting += files(path)
        elif path.suffix == ".md":
            waiting += [(path.parent / link).resolve() for link in links(path)]
    return found


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures outside code, but for other sites' and for places within a page."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    return [target for target in targets if target]


def listing(folder: Path) -> str:
    """A page with a link to each file of a folder."""
    return "\n".join([f"# {folder.relative_to(ROOT)}", "", *(f"- [{file.name}]({file.name})" for file in files(folder)), ""])


def files(folder: Path) -> list[Path]:
    """Those of a folder that one may want to read."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc"))
