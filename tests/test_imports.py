"""Dependencies point one way, and heavy packages come in only where they are needed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "edge"

#: From the bottom up: a module imports from its own layer and those below.
LAYERS = [
    {"__init__", "errors", "extras", "gguf_reader", "sizes", "tensor_types", "version"},
    {"ctypes_ffi", "forked", "library", "memory"},
    {"check"},
    {"graph", "gguf", "json_file", "text_file", "native", "jinja", "tokenizer"},
    {"models", "plan", "packed", "chat", "store", "cores", "cancel"},
    {"loading"},
    {"weights"},
    {"packed_cache", "page_store", "fingerprint"},
    {
        "kv",
        "kv_pool",
        "kv_shape",
        "sampler",
        "results",
        "session_contents",
        "session_file",
        "spelling",
        "stops",
    },
    {"ledger"},
    {"engine", "request", "backend"},
    {"onnx"},
    {"journal", "stream", "session", "perplexity"},
    {"conversation"},
    {"model", "restore"},
    {"bench"},
    {"cli"},
]
#: Packages that may be imported at the top of these modules only.
HEAVY = {
    "jinja2": {"jinja"},
    "tokenizers": {"tokenizer/backend"},
    "numpy": {"native", "ctypes_ffi", "weights", "engine", "sampler", "perplexity", "onnx"},
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


def imports(path: Path, *, at_load: bool) -> set[str]:
    """Dotted names that a file imports; at_load: not those for type checkers or in functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
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


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_back_edge(path: Path) -> None:
    for name in imports(path, at_load=True):
        package, *rest = name.split(".")
        if package == "edge" and rest:
            known = rest[0] if any(rest[0] in names for names in LAYERS) else "__init__"
            assert layer(known) <= layer(name_of(path)), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_models_know_only_the_graph(path: Path) -> None:
    if name_of(path) == "models":
        ours = {n for n in imports(path, at_load=False) if n.startswith("edge.")}
        allowed = ("edge.errors", "edge.graph", "edge.models")
        assert all(name.startswith(allowed) for name in ours)


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
