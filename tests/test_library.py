"""Finding the native library and its binding, and what is said of one that does not serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edge
import edge.binding
from edge.binding import library
from edge.errors import InputError, NativeError

ROOT = Path(__file__).resolve().parent.parent
#: The one of the source tree; of the package where tests run on an installed one.
BUILT = next(
    path
    for folder in (ROOT / "edge", Path(library.__file__).parent)
    for name in library.NAMES
    if (path := folder / name).exists()
)

pytestmark = [pytest.mark.native, pytest.mark.any_isa]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ELF")


@pytest.fixture(params=library.BINDINGS)
def binding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both, one after the other; EDGE_LIBRARY is not set."""
    if request.param == "cffi":
        pytest.importorskip("_cffi_backend")
    monkeypatch.setenv("EDGE_BINDING", request.param)
    monkeypatch.delenv("EDGE_LIBRARY", raising=False)
    return str(request.param)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in the place of the package's."""
    monkeypatch.setattr(library, "_FOLDER", str(tmp_path))
    return tmp_path


def version_of(loaded: tuple[Any, Any]) -> str:
    ffi, lib = loaded
    return str(ffi.string(lib.edge_version()).decode())


def fails(*parts: str) -> None:
    """Loading raises a NativeError of one line with all of these in it."""
    with pytest.raises(NativeError) as caught:
        library.load()
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in parts), text


def edited(target: Path, old: bytes, new: bytes, start: int = 0) -> Path:
    """A copy of the library with other bytes at the first place, or from `start` on, of `old`."""
    data = bytearray(BUILT.read_bytes())
    at = data.index(old, start)
    data[at : at + len(old)] = new
    target.write_bytes(data)
    return target


# ---- where it is found ---------------------------------------------------------------------------


def test_in_the_package(binding: str) -> None:
    ffi, lib = loaded = library.load()
    assert version_of(loaded) == edge.__version__
    assert type(ffi).__module__ == (
        "edge.binding.ctypes_ffi" if binding == "ctypes" else "_cffi_backend"
    )
    assert lib.EDGE_NO_MEMORY == 4


@pytest.mark.parametrize("name", library.NAMES)
def test_by_each_name(binding: str, folder: Path, name: str) -> None:
    shutil.copy(BUILT, folder / name)
    assert version_of(library.load()) == edge.__version__


def test_where_the_environment_says(
    binding: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "libedge.so").write_bytes(b"what the package has does not matter then")
    shutil.copy(BUILT, folder / "mine")
    monkeypatch.chdir(folder)
    for path in ("mine", str(folder / "mine")):
        monkeypatch.setenv("EDGE_LIBRARY", path)
        assert version_of(library.load()) == edge.__version__


@pytest.mark.parametrize("by_environment", [False, True])
def test_where_a_fwork_file_says(
    binding: str, folder: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    app = folder / "Some.app"
    inside = Path("Frameworks", "edge.libedge.framework", "edge.libedge")
    (app / inside).parent.mkdir(parents=True)
    shutil.copy(BUILT, app / inside)
    monkeypatch.setattr(sys, "executable", str(app / "Some"))
    (folder / "libedge.fwork").write_text(f"{inside}\n")
    if by_environment:
        monkeypatch.setattr(library, "_FOLDER", str(ROOT))
        monkeypatch.setenv("EDGE_LIBRARY", str(folder / "libedge.fwork"))
    assert version_of(library.load()) == edge.__version__


@linux
def test_by_its_bare_name(binding: str, tmp_path: Path) -> None:
    shutil.copy(BUILT, tmp_path / "libedge.so")
    code = "from edge.binding import library; library._FOLDER = '/none'; from edge import native; "
    code += "print(*native.isas())"
    done = run(code, LD_LIBRARY_PATH=f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}")
    assert done.stdout.startswith("scalar"), done.stderr


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program of its own, in a Python of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, cwd="/")


# ---- what does not serve -------------------------------------------------------------------------


def test_none_at_all(binding: str) -> None:
    done = run(
        "from edge.binding import library; library._FOLDER = '/none'; from edge import native"
    )
    line = done.stderr.splitlines()[-1]  # of its own: here the bare name is the library in use
    for part in ("NativeError: there is no native library", "in /none", "set EDGE_LIBRARY"):
        assert part in line
    assert len(line) < 300


@pytest.mark.parametrize("path", ["/no/such/file.so", "/"])
def test_environment_that_is_wrong(
    binding: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("EDGE_LIBRARY", path)
    fails(f"EDGE_LIBRARY={path}: there is no such file")


@pytest.mark.parametrize(
    "content", [b"", b"no library", b"\x7fELF"], ids=["empty", "text", "short"]
)
def test_no_library(binding: str, folder: Path, content: bytes) -> None:
    (folder / "libedge.so").write_bytes(content)
    fails(str(folder / "libedge.so"), "does not load", "install the package again")


def test_folder_of_its_name(binding: str, folder: Path) -> None:
    (folder / "libedge.so").mkdir()
    fails(str(folder / "libedge.so"), "does not load")


@linux
def test_for_another_machine(binding: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = BUILT.read_bytes()[18:20]
    other, name = (b"\xb7\0", "aarch64") if machine != b"\xb7\0" else (b">\0", "x86_64")
    monkeypatch.setenv("EDGE_LIBRARY", str(edited(folder / "theirs.so", machine, other, 18)))
    fails(f"theirs.so does not load: it is for {name}, this Python for ", "EDGE_LIBRARY")


def test_of_another_version(binding: str, folder: Path) -> None:
    version, other = edge.__version__.encode(), b"9" * len(edge.__version__)
    edited(folder / BUILT.name, version + b"\0", other + b"\0")
    fails(
        f"{folder / BUILT.name} is of version {other.decode()}, the package of {edge.__version__}: "
        "install the package again"
    )


def test_somebody_elses(binding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import _hashlib

    monkeypatch.setenv("EDGE_LIBRARY", _hashlib.__file__)
    fails(f"{_hashlib.__file__} is not edge's library", "edge_version", "EDGE_LIBRARY")


def test_fwork_file_that_says_nothing(
    binding: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "libedge.fwork").write_bytes(b"\xff\xfe")
    fails("libedge.fwork does not say where the library is")
    (folder / "libedge.fwork").write_text("Frameworks/gone")
    fails("Frameworks/gone", "does not load")


def test_the_program_says_it_in_a_line(tmp_path: Path) -> None:
    done = run(
        "from edge.cli import main; main()", EDGE_LIBRARY="/no/such.so", EDGE_CACHE_SIZE="0"
    )  # without a command: the help, which needs no library
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    code = "import sys; sys.argv[1:] = ['chat', '-p', 'x', 'm.gguf']; from edge.cli import main; "
    done = run(code + "main()", EDGE_LIBRARY="/no/such.so")
    assert done.returncode == 1
    assert done.stderr == "edge-run: EDGE_LIBRARY=/no/such.so: there is no such file\n"


# ---- the binding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cython", "CFFI", " "])
def test_binding_that_is_not_known(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EDGE_BINDING", name)
    with pytest.raises(InputError, match=f"EDGE_BINDING={name}: one of cffi, ctypes"):
        library.load()


def test_without_cffi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_cffi_backend", None)
    monkeypatch.delitem(sys.modules, "edge._cffi", raising=False)
    monkeypatch.delenv("EDGE_BINDING", raising=False)
    assert type(library.load()[0]).__module__ == "edge.binding.ctypes_ffi"
    monkeypatch.setenv("EDGE_BINDING", "cffi")
    with pytest.raises(InputError, match=r"EDGE_BINDING=cffi: .*_cffi_backend"):
        library.load()


@pytest.mark.parametrize("missing", ["_cffi", "_declarations"])
def test_nothing_was_built(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("EDGE_BINDING", "ctypes" if missing == "_declarations" else "")
    for name in ("edge._cffi", "edge._declarations", "edge.binding.ctypes_ffi"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(edge.binding, "ctypes_ffi", raising=False)
    monkeypatch.setitem(sys.modules, f"edge.{missing}", None)
    fails("the native library is not built")


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(["cffi", "_cffi_backend", "tokenizers"]))
import edge
with edge.load({!r}, threads=1) as model:
    session = model.session()
    print(len(session.generate([1, 2, 3], max_tokens=4).tokens))
    try:
        session.generate("text")
    except edge.UnsupportedError as error:
        print(error)
"""


def test_without_cffi_and_tokenizers(tiny_gguf: Callable[..., Path]) -> None:
    done = run(WITHOUT.format(str(tiny_gguf())), EDGE_BINDING="")
    assert done.returncode == 0, done.stderr
    tokens, error = done.stdout.splitlines()
    assert tokens == "4" and "package tokenizers" in error and "token ids" in error
