"""The wheels in dist/, for whatever platform: run by `pytest -m wheels` after scripts/wheels.

Each belongs to a file in toolchains/; LIEF reads the libraries in them, ELF, Mach-O and PE alike.
"""

from __future__ import annotations

import email
import os
import platform
import re
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from test_native_build import ROOT, functions_in_header
from tiny import write_tiny

import edge

MAX_BYTES = 2_000_000
TAGS = {
    file.stem: re.findall(r"^set\(EDGE_WHEEL_TAGS (.*)\)$", file.read_text("utf-8"), re.MULTILINE)
    for file in (ROOT / "toolchains").glob("*.cmake")
}
GENERATED = {"edge/_cffi.py", "edge/_declarations.py"}
LIBRARIES = {"macos": "edge/libedge.dylib", "windows": "edge/edge.dll"}
PROCESSORS = {
    "x86_64": {"X86_64", "AMD64"},
    "aarch64": {"AARCH64"},
    "arm64": {"ARM64"},
    "arm64_v8a": {"AARCH64"},
    "armv7l": {"ARM"},
}
#: What a library may ask of the system's loader, by system.
NEEDED = {
    "manylinux": r"lib(c|m)\.so\.6|libpthread\.so\.0|ld-linux[-a-z0-9_]*\.so\.[123]",
    "musllinux": r"libc\.so",
    "android": r"lib(c|m)\.so",
    "macos": r"/usr/lib/libSystem\.B\.dylib",
    "windows": r"KERNEL32\.dll|api-ms-win-crt-[-a-z0-9]+\.dll",
}

pytestmark = pytest.mark.wheels


@dataclass(frozen=True)
class Wheel:
    """One file of dist/; target: "manylinux-aarch64" and so on."""

    path: Path
    target: str

    @property
    def system(self) -> str:
        return self.target.partition("-")[0]

    @property
    def processor(self) -> str:
        return self.target.partition("-")[2]

    @property
    def tags(self) -> list[str]:
        return [f"py3-none-{tag}" for tag in TAGS[self.target][0].split()]

    @property
    def library(self) -> str:
        return LIBRARIES.get(self.system, "edge/libedge.so")

    @cached_property
    def files(self) -> dict[str, bytes]:
        with zipfile.ZipFile(self.path) as archive:
            assert archive.testzip() is None
            return {name: archive.read(name) for name in archive.namelist()}

    @cached_property
    def binary(self) -> Any:
        import lief

        parsed = lief.parse(list(self.files[self.library]))
        assert parsed is not None
        return parsed.at(0) if isinstance(parsed, lief.MachO.FatBinary) else parsed

    def in_info(self, name: str) -> bytes:
        return self.files[f"edge_run-{edge.__version__}.dist-info/{name}"]


def target_of(path: Path) -> str:
    """The toolchain file whose first tag is in a wheel's name."""
    platforms = path.stem.split("-")[-1].split(".")
    return next((t for t, tags in TAGS.items() if tags and tags[0].split()[0] in platforms), "")


WHEELS = [Wheel(path, target_of(path)) for path in sorted((ROOT / "dist").glob("*.whl"))]


def for_systems(*systems: str) -> pytest.MarkDecorator:
    """The test runs once for every wheel of these systems; of all systems without any."""
    chosen = [w for w in WHEELS if not systems or w.system in systems]
    return pytest.mark.parametrize("wheel", chosen, ids=[w.target or w.path.name for w in chosen])


every_wheel = for_systems()
every_elf = for_systems("manylinux", "musllinux", "android")


def test_there_are_wheels() -> None:
    assert WHEELS, "dist/ holds none: run scripts/wheels"


@every_wheel
def test_name_and_tags(wheel: Wheel) -> None:
    name, version, python, abi, platforms = wheel.path.stem.split("-")
    assert (name, version) == ("edge_run", edge.__version__)
    assert {f"{python}-{abi}-{p}" for p in platforms.split(".")} == set(wheel.tags)
    info = email.message_from_bytes(wheel.in_info("WHEEL"))
    assert sorted(info.get_all("Tag", [])) == sorted(wheel.tags)
    assert info["Root-Is-Purelib"] == "false"


@every_wheel
def test_contents(wheel: Wheel) -> None:
    patterns = ("*.py", "*.toml", "py.typed", "calibration.txt")
    sources = [file for pattern in patterns for file in (ROOT / "edge").rglob(pattern)]
    listed = {file.relative_to(ROOT).as_posix() for file in sources}
    info = f"edge_run-{edge.__version__}.dist-info/"
    names = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    expected = {*listed, *GENERATED, wheel.library, *(info + n for n in names)}
    assert set(wheel.files) == expected


@every_wheel
def test_is_small(wheel: Wheel) -> None:
    assert wheel.path.stat().st_size < MAX_BYTES


@every_wheel
def test_is_for_its_processor(wheel: Wheel) -> None:
    header = wheel.binary.header
    kind = next(
        getattr(header, name)
        for name in ("machine_type", "cpu_type", "machine")
        if hasattr(header, name)
    )
    assert kind.name in PROCESSORS[wheel.processor]


@every_wheel
def test_exports_are_those_of_the_header(wheel: Wheel) -> None:
    if wheel.system == "windows":
        names = {entry.name for entry in wheel.binary.get_export().entries}
    else:
        names = {symbol.name for symbol in wheel.binary.exported_symbols}
    prefix = ""
    if wheel.system == "macos":
        prefix = "_"
        names -= {"___dso_handle", "__mh_dylib_header"}  # the linker's own
    assert names == {prefix + name for name in functions_in_header()}


@every_wheel
def test_needs_only_the_system(wheel: Wheel) -> None:
    needed = [getattr(library, "name", library) for library in wheel.binary.libraries]
    if wheel.system == "macos":
        assert needed.pop(0) == "@rpath/libedge.dylib"  # its own name
    assert needed
    assert [name for name in needed if not re.fullmatch(NEEDED[wheel.system], name)] == []


@every_wheel
def test_tells_nothing_of_the_machine_that_built_it(wheel: Wheel) -> None:
    library = wheel.files[wheel.library]
    paths = re.findall(rb"/(?:root|home|Users|usr|opt|tmp|var|work|build)/[^\0\n]*", library)
    assert set(paths) <= {b"/usr/lib/libSystem.B.dylib", b"/usr/lib/dyld"}
    places = {str(ROOT), sys.prefix, str(Path.home()), platform.node(), "ziglang", ".pdb"}
    assert [place for place in places if len(place) > 3 and place.encode() in library] == []
    assert b"\0.debug_info" not in library


@every_elf
def test_elf_is_hardened(wheel: Wheel) -> None:
    import lief

    segments = {s.type.name: s for s in wheel.binary.segments}
    assert not segments["GNU_STACK"].has(lief.ELF.Segment.FLAGS.X)
    assert "GNU_RELRO" in segments
    entries = {entry.tag.name: entry for entry in wheel.binary.dynamic_entries}
    now = {flag.name for tag in ("FLAGS", "FLAGS_1") for flag in entries[tag].flags}
    assert now & {"BIND_NOW", "NOW"}
    assert entries["SONAME"].name == "libedge.so"
    assert not {"RPATH", "RUNPATH", "TEXTREL"} & set(entries)


@every_elf
def test_elf_fits_large_pages(wheel: Wheel) -> None:
    """Android and Raspberry Pi 5 have kernels with pages of 16 KiB, other ARM boards of 64."""
    loads = [s for s in wheel.binary.segments if s.type.name == "LOAD"]
    least = {"android": 0x4000}.get(
        wheel.system, 0x1000 if wheel.processor == "x86_64" else 0x10000
    )
    assert loads and min(s.alignment for s in loads) >= least
    assert all((s.virtual_address - s.file_offset) % s.alignment == 0 for s in loads)


@for_systems("manylinux")
def test_glibc_is_old_enough(wheel: Wheel) -> None:
    versions = [
        v.name for need in wheel.binary.symbols_version_requirement
        for v in need.get_auxiliary_symbols()
    ]  # fmt: skip
    numbers = [tuple(map(int, v.removeprefix("GLIBC_").split("."))) for v in versions]
    assert numbers and max(numbers) <= (2, 17)


@for_systems("musllinux", "android")
def test_symbols_have_no_versions(wheel: Wheel) -> None:
    assert list(wheel.binary.symbols_version_requirement) == []


@for_systems("manylinux")
def test_auditwheel_agrees(wheel: Wheel) -> None:
    """Of musl's it knows only what it finds on this machine under the name libc.so."""
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel.path], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    found = re.search(rf'tag:\s*"{wheel.system}_(\d+)_(\d+)_{wheel.processor}"', shown.stdout)
    assert found, shown.stdout
    limit = re.search(r"linux_(\d+)_(\d+)_", wheel.tags[0])
    assert limit and tuple(map(int, found.groups())) <= tuple(map(int, limit.groups()))


@for_systems("macos")
def test_macos_version_is_that_of_the_tag(wheel: Wheel) -> None:
    binary = wheel.binary
    least = binary.build_version.minos if binary.has_build_version else binary.version_min.version
    assert f"macosx_{least[0]}_{least[1]}_" in wheel.tags[0]
    assert binary.has_code_signature or wheel.processor != "arm64"


@for_systems("windows")
def test_dll_is_hardened(wheel: Wheel) -> None:
    flags = {flag.name for flag in wheel.binary.optional_header.dll_characteristics_lists}
    assert {"NX_COMPAT", "DYNAMIC_BASE", "HIGH_ENTROPY_VA"} <= flags


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc",
    reason="needs a wheel of this very platform",
)
def test_wheel_of_this_platform_works(tmp_path: Path) -> None:
    """Installed by pip into an empty environment, with what it says it depends on."""
    target = f"manylinux-{platform.machine()}"
    (wheel,) = (w for w in WHEELS if w.target == target)
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "EDGE_"))}

    def output_of(program: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [programs / program, *arguments],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    output_of("python", "-m", "pip", "install", "--quiet", wheel.path)
    assert edge.__version__ in output_of("edge-run", "--version")
    model = write_tiny(tmp_path / "tiny.gguf", "llama")
    code = "import edge, sys; print(edge.load(sys.argv[1]).session().generate('a', max_tokens=3))"
    assert "completion_tokens" in output_of("python", "-c", code, model)
