"""The kernels on emulated CPUs: the right ones are found, and all give scalar's bits."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import CPU, CPUS, PI4, emulate, output_of
from test_native_build import exported_by, functions_in_header

pytestmark = pytest.mark.board

every_cpu = pytest.mark.parametrize("cpu", CPUS, ids=str)
#: Without those that have the kernels of another one and lie between two others.
VARIED = [cpu for cpu in CPUS if cpu != PI4 and cpu.name != "max,sve=off"]
LACKING = [(cpu, isa) for cpu in CPUS for isa in cpu.lacks]


@every_cpu
def test_dispatch(selftest: Callable[[str], Path], cpu: CPU) -> None:
    usable = output_of(emulate(cpu, selftest(cpu.arch), "--usable"))
    assert tuple(usable.split()) == cpu.isas


@pytest.mark.parametrize("cpu", VARIED, ids=str)
def test_kernels_equal_scalar(selftest: Callable[[str], Path], cpu: CPU) -> None:
    lines = output_of(emulate(cpu, selftest(cpu.arch))).splitlines()
    assert [line.split(":")[0] for line in lines] == list(cpu.isas)
    assert all(line.endswith(" cases equal scalar") for line in lines)


@pytest.mark.parametrize("cpu, isa", LACKING, ids=str)
def test_emulated_cpu_has_no_more_than_the_real_one(
    selftest: Callable[[str], Path], cpu: CPU, isa: str
) -> None:
    """Else the tests above would prove nothing."""
    run = emulate(cpu, selftest(cpu.arch), "--force", isa)
    assert run.returncode == -signal.SIGILL, run.stdout


@pytest.mark.parametrize("arch", ["aarch64", "arm"])
def test_library_exports_what_the_header_declares(
    selftest: Callable[[str], Path], arch: str
) -> None:
    assert exported_by(selftest(arch).with_name("libedge.so")) == functions_in_header()
