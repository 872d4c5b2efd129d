"""Imports run downward only, and in no circle: the layers of docs/architecture.md, drawn from the code's own imports."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "esd_peft"
# from the ground up; what stands in a row does not import each other, but for the modules of one room
LAYERS = [
    {"_version", "errors", "presets"},
    {"io", "runtime"},
    {"options"},
    {"worlds"},
    {"models"},
    {"prompts", "adapters"},
    {"evaluation", "merge_adapter"},
    {"attacks", "training", "study"},
    {"evaluate"},
    {"erasure"},
    {"erase", "doctor"},
    {"__init__"},
]


def layer(module: str) -> int:
    """The layer of `esd_peft.MODULE`."""
    return next(number for number, rooms in enumerate(LAYERS) if module.split(".")[0] in rooms)


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] in ("__init__", "__main__") else parts)
        source = ast.parse(path.read_text(encoding="utf-8"))
        if name in found:  # a room's __init__ and __main__ are one module here
            found[name].body += source.body
        else:
            found[name] = source
    return found


def imports(source: ast.AST, known: set[str]) -> set[str]:
    """The package's modules that it imports, those for type checkers too."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(source):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "esd_peft":
            base = node.module.removeprefix("esd_peft").lstrip(".")
            names = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in known else base or "__init__" for name in names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("esd_peft.") for alias in node.names), ast.unparse(node)
        found |= imports(node, known)
    return found


MODULES = modules()
GRAPH = {name: imports(source, {*MODULES}) - {name} for name, source in MODULES.items()}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_run_downward(module):
    room = module.split(".")[0]
    for imported in GRAPH[module]:
        below = layer(imported) < layer(module)
        assert below or imported.split(".")[0] == room, f"{module} imports {imported}, which stands above or beside it"


def test_there_is_no_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names it
    rooms: dict[str, set[str]] = {}
    for module, imported in GRAPH.items():
        room = module.split(".")[0]
        rooms.setdefault(room, set()).update({name.split(".")[0] for name in imported} - {room})
    graphlib.TopologicalSorter(rooms).prepare()


def test_every_room_has_a_layer():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")}
    assert rooms == {name for rooms in LAYERS for name in rooms}


def takers() -> dict[str, list[ast.FunctionDef]]:
    """The functions that are given the whole config of erase, by module."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for module, source in MODULES.items():
        for node in ast.walk(source):
            if isinstance(node, ast.FunctionDef) and _configs(node):
                found.setdefault(module, []).append(node)
    return found


def _configs(function: ast.FunctionDef) -> list[str]:
    arguments = [*function.args.args, *function.args.kwonlyargs]
    return [a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "EraseConfig"]


def test_stages_take_their_group_and_not_the_whole_config():
    """Only what surrounds the stages knows all groups, and no function is given them to read one."""
    assert {module.split(".")[0] for module in takers()} == {"erase", "erasure"}
    for module, functions in takers().items():
        for function in functions:
            for config in _configs(function):
                read = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == config]
                named = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == config]
                names = {n.attr for n in read}
                as_a_whole = len(named) > len(read) or names & {"replace", "flat", "to_yaml", "model_dump"}
                assert as_a_whole or len(names) > 1, f"{module}.{function.name} reads one group of {config}"


def test_kinds_of_gpus_are_told_apart_in_runtime_alone():
    """Elsewhere a device is one on which there is an accelerator, a compiler, or so much memory."""
    kinds = {"cuda", "xpu", "mps"}
    for name, tree in modules().items():
        if name.split(".")[0] == "runtime":
            continue
        for node in ast.walk(tree):
            named = node.value if isinstance(node, ast.Constant) else node.attr if isinstance(node, ast.Attribute) else None
            assert named not in kinds | {f"is_{kind}" for kind in kinds}, f"{name}, line {node.lineno}: {named}"
