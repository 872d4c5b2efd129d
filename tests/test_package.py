"""What holds for the package as a whole."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path = ROOT) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_our_folder_does_not_shadow_the_package_kernels():
    """transformers and diffusers probe for Hugging Face's `kernels`; started in the root, ours must not answer."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is not None and s.origin is not None)"
    if (found := run(code).strip()) == "True":
        origin = Path(run("import kernels; print(kernels.__file__)").strip())
        assert not origin.is_relative_to(ROOT / "kernels")
    assert found in ("True", "False")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["esd_peft", "esd_peft.study.__main__"])
def test_what_computes_nothing_does_not_import_torch(module):
    assert run(f"import sys, {module}; print('torch' in sys.modules)").strip() == "False"


def test_jobs_are_functions_even_after_their_modules_are_imported():
    import esd_peft
    import esd_peft.erase
    import esd_peft.merge_adapter

    assert callable(esd_peft.erase)
    assert callable(esd_peft.merge_adapter)
    assert esd_peft.EraseConfig(concept="circle").prompts.concept_names == ["circle"]
