"""Dependencies point one way, and heavy packages come in only where they are needed."""

from __future__ import annotations

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "edge"

#: From the bottom up, the folders and files of `edge/`: each imports from itself and from those
#: above it in this list.
LAYERS = [
    "version",
    "errors",  # what can go wrong, in words for users
    "sizes",  # bytes as people write them
    "progress",  # what callers are told while they wait
    "extras",  # packages that are not always there
    "forked",  # what a forked child may do
    "check",  # options as callers give them
    "binding",  # the native library: found, loaded
    "native",  # called
    "files",  # what strangers made, checked
    "graph",  # the waist
    "tokenizer",
    "models",
    "disk",  # what is ours: whole or not there
    "template",  # programs of strangers, bounded
    "device",  # what this machine has
    "loading",  # the options, plain values
    "weights",
    "kv",
    "engine",  # one of two engines
    "onnx",  # the other
    "backend",  # what sessions need of both
    "session",
    "hub",  # models to get
    "model",  # the door
    "windows",  # a text, cut
    "perplexity",
    "quantizer",  # models in fewer bits
    "__init__",  # the face
    "bench",  # who uses it
    "evaluate",  # files of one model, compared
    "cli",
]
#: Packages that may be imported at the top of these modules only.
HEAVY = {
    "jinja2": {"template/environment", "template/filters", "template/text"},
    "tokenizers": {"tokenizer/backend"},
    "numpy": {
        *("native", "binding", "weights", "engine", "session/sampler", "perplexity", "onnx"),
        "quantizer",
    },
    "cffi": set(),
    "onnx": set(),
    "onnxruntime": set(),
    "prompt_toolkit": set(),
}


GENERATED = {"_cffi.py", "_declarations.py"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name not in GENERATED)


def name_of(path: Path) -> str:
    """The first part below edge: "cli" for edge/cli/chat.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_load: bool = False) -> set[str]:
    """Dotted names that a file imports; at_load: not those for type checkers or in functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_load and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if at_load and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def file_of(name: str) -> Path | None:
    """The file of a module, or of the module that a dotted name is in; None: it is not of ours."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        place = PACKAGE.parent.joinpath(*parts[:n])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if parts[0] == "edge" and file.is_file():
                return file
    return None


def ours(path: Path) -> set[Path]:
    """The files of edge that a file imports, anywhere in it."""
    found = {file for name in imports(path) if (file := file_of(name)) is not None}
    return {file for file in found if file.name not in GENERATED}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    """Those for type checkers, and in functions, count too."""
    for file in ours(path):
        below, own = name_of(file), name_of(path)
        assert LAYERS.index(below) <= LAYERS.index(own), f"{path.name} imports {file.name}"


def test_no_circle() -> None:
    """Files can be put in an order in which each imports only those before it."""
    TopologicalSorter({path: ours(path) - {path} for path in modules()}).prepare()


def test_the_drawing_has_all_layers() -> None:
    """docs/architecture.md draws them from the top down."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = page[page.index("\nedge/\n") : page.index("\nnative/\n")].splitlines()
    lines = [line for line in lines if not line.startswith("    ")]  # those inside a folder
    places = []
    for name in LAYERS:
        shown = f"{name}.py" if (PACKAGE / f"{name}.py").exists() else f"{name}/"
        places.append(next(i for i, line in enumerate(lines) if f" {shown} " in f"{line} "))
    assert places == sorted(places, reverse=True)
    assert {name_of(path) for path in modules()} == set(LAYERS)


def folders() -> list[Path]:
    """The faces of folders, but for those whose files are many of a kind, found by their names."""
    many = {PACKAGE, PACKAGE / "models", PACKAGE / "cli"}
    return [p for p in modules() if p.name == "__init__.py" and p.parent not in many]


@pytest.mark.parametrize("path", folders(), ids=lambda p: str(p.parent.relative_to(PACKAGE)))
def test_folders_say_what_is_in_them(path: Path) -> None:
    """Their docstrings list all files, each after those of the folder that it imports."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    listed = re.findall(r"^    (\w+\.py|\w+/) ", text, re.MULTILINE)
    files = [p for p in path.parent.glob("*.py") if p != path and p.name not in GENERATED]
    inner = [p.parent for p in path.parent.glob("*/__init__.py")]
    assert sorted(listed) == sorted([*(p.name for p in files), *(f"{p.name}/" for p in inner)])
    for file in files:
        above = {path.parent / name for name in listed[: listed.index(file.name)]}
        assert {p for p in ours(file) if p in files} - {file} <= above, file.name


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_models_know_only_the_graph(path: Path) -> None:
    if name_of(path) == "models":
        ours = {n for n in imports(path, at_load=False) if n.startswith("edge.")}
        allowed = ("edge.errors", "edge.graph", "edge.models")
        assert all(name.startswith(allowed) for name in ours)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_attributes_stay_in_their_file(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and hasattr(n.target, "id")}
    found = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (own if on_self else found).add(node.attr)
    # of named tuples and of ctypes, which call them so
    assert found - own <= {"_replace", "_fields_"}, path.name


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_late(path: Path) -> None:
    module = str(path.relative_to(PACKAGE).with_suffix(""))
    for name in imports(path, at_load=True):
        allowed = HEAVY.get(name.split(".")[0])
        assert allowed is None or allowed & {module, name_of(path)}, f"{module} imports {name}"


def test_oldest_versions_are_those_that_edge_asks_for() -> None:
    root = PACKAGE.parent
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    asked = text[text.index("\ndependencies = [") : text.index("\n[project.optional")]
    least = dict(re.findall(r'^ *"(\w+)>=([\d.]+)', asked, re.MULTILINE))
    lines = (root / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()[1:]
    oldest = dict(line.split("==") for line in lines)
    assert oldest.keys() == least.keys()
    assert all(oldest[name].startswith(version) for name, version in least.items())


def test_no_two_classes_have_one_name() -> None:
    names = [
        node.name
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name, n in Counter(names).items() if n > 1] == []
