"""The image is built by the README's install command, from all that it reads."""

import fnmatch
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()


def arguments(instruction: str) -> list[str]:
    return [line.removeprefix(instruction).strip() for line in LINES if line.startswith(f"{instruction} ")]


def test_python_packages_are_installed_as_the_readme_says():
    (install,) = [command for command in arguments("RUN") if "pip" in command]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{install} && python -m esd_peft.erase --concept circle\n" in readme
    (comment,) = [line for line in LINES if "docker build" in line]
    assert f"\n{comment.strip('# ')}\n" in readme
    assert arguments("ENTRYPOINT") == ['["python", "-m", "esd_peft.erase"]']


def test_the_image_has_a_python_and_a_compiler_that_do():
    (base,) = arguments("FROM")
    lowest = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")).group(1)
    assert base == f"python:{lowest}-slim"
    assert any("gcc" in command for command in arguments("RUN")), "Triton compiles kernels"


def test_what_is_installed_is_copied():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    for needed in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "esd_peft", "kernels"):
        assert not any(fnmatch.fnmatch(needed, pattern) for pattern in patterns), needed
