"""Clusters of cores from made-up sysfs trees, and how many threads are chosen."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_model import assert_one_line, run

from edge.bench import tune
from edge.bench.tune import Times, TuneRow, Tuning, best, candidates
from edge.device import cores
from edge.device.cores import Choice, Cluster, Cores, choose, cpu_name, store
from edge.engine.engine import Engine
from edge.errors import EdgeWarning, InputError, MemoryBudgetError

CAPACITY, CLOCK = "cpu_capacity", "cpufreq/cpuinfo_max_freq"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGE_THREADS", raising=False)


class Tree:
    """/sys/devices/system/cpu, as far as it is read. values: one for each CPU."""

    def __init__(self, root: Path) -> None:
        self.root, self.n = root, 0

    def say(self, name: str, values: Sequence[object]) -> Tree:
        for i, value in enumerate(values):
            path = self.root / f"cpu{i}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n", encoding="ascii")
        self.n = max(self.n, len(values))
        return self

    def cores(self, allowed: Sequence[int] | None = None, share: float | None = None) -> Cores:
        cpus = range(self.n) if allowed is None else allowed
        return Cores(tuple(cores.clusters(list(cpus), str(self.root))), share)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "cpu")


def facts(found: Cores) -> list[tuple[tuple[int, ...], bool]]:
    return [(cluster.cpus, cluster.helps) for cluster in found.clusters]


# ---- clusters ------------------------------------------------------------------------------------


def test_four_equal_cores(tree: Tree) -> None:
    """A Raspberry Pi: nothing is faster, so nothing is kept anywhere."""
    found = tree.say(CAPACITY, [1024] * 4).say(CLOCK, [2400000] * 4).cores()
    assert facts(found) == [((0, 1, 2, 3), True)]
    assert choose(None, found) == Choice(4, (), "all 4 cores")
    assert choose(2, found).cpus == ()


@pytest.mark.parametrize(
    "capacities, want, threads, cpus",
    [  # little, big and prime cores of phones; RK3588; all of one kind
        ([250] * 4 + [870] * 3 + [1024], [(7,), (4, 5, 6), (0, 1, 2, 3)], 4, (4, 5, 6, 7)),
        ([250] * 4 + [1004] * 3 + [1024], [(4, 5, 6, 7), (0, 1, 2, 3)], 4, (4, 5, 6, 7)),
        ([160] * 4 + [498] * 2 + [1024] * 2, [(6, 7), (4, 5), (0, 1, 2, 3)], 4, (4, 5, 6, 7)),
        ([402] * 4 + [1024] * 4, [(4, 5, 6, 7), (0, 1, 2, 3)], 4, (4, 5, 6, 7)),
        ([1024] * 2 + [380] * 6, [(0, 1), (2, 3, 4, 5, 6, 7)], 2, (0, 1)),
        ([512] * 4 + [1024] * 4, [(4, 5, 6, 7), (0, 1, 2, 3)], 8, ()),
    ],
)
def test_phones(
    tree: Tree, capacities: list[int], want: list[tuple[int, ...]], threads: int, cpus: object
) -> None:
    found = tree.say(CAPACITY, capacities).cores()
    assert [cluster.cpus for cluster in found.clusters] == want
    choice = choose(None, found)
    assert (choice.threads, choice.cpus) == (threads, cpus)


def test_more_threads_take_in_more_clusters(tree: Tree) -> None:
    found = tree.say(CAPACITY, [250] * 4 + [700] * 2 + [1024] * 2).cores()
    assert [found.cpus(n) for n in (1, 4, 5, 9)] == [(4, 5, 6, 7)] * 2 + [()] * 2
    assert choose(1, found).cpus == (4, 5, 6, 7)  # not on the one fast core that others want too


def test_clock_where_capacities_are_missing_or_equal(tree: Tree) -> None:
    """A small core's clock says too little: only those near the best count."""
    tree.say(CLOCK, [1800000] * 4 + [2420000] * 3 + [2840000])
    want = [((4, 5, 6, 7), True), ((0, 1, 2, 3), False)]
    assert facts(tree.cores()) == want
    assert facts(tree.say(CAPACITY, [1024] * 8).cores()) == want
    assert facts(tree.say(CAPACITY, [1024] * 7 + ["?"]).cores()) == want


def test_pc_with_two_kinds_of_cores(tree: Tree) -> None:
    """Two fast cores of two threads each, with clocks that differ a little, four small ones."""
    tree.say(CLOCK, [5200000, 5200000, 5000000, 5000000] + [3900000] * 4)
    tree.say("topology/thread_siblings_list", ["0-1", "0-1", "2-3", "2-3", 4, 5, 6, 7])
    found = tree.cores()
    assert [(c.cpus, c.n_cores, c.helps) for c in found.clusters] == [
        ((0, 1, 2, 3), 2, True),
        ((4, 5, 6, 7), 4, False),
    ]
    assert choose(None, found) == Choice(2, (0, 1, 2, 3), "the 2 fastest of 6 cores")
    assert found.n_cpus == 8 and found.cpus(3) == ()


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    found = Cores(tuple(cores.clusters([0, 1, 2], str(tmp_path / "none"))), None)
    assert found.clusters == (Cluster((0, 1, 2), 3, 1.0, True),)
    assert choose(None, found) == Choice(3, (), "all 3 cores")


def test_files_that_make_no_sense(tree: Tree) -> None:
    tree.say(CLOCK, ["", "fast", -1, "9" * 50]).say(CAPACITY, [0, 1024, 1024, 1024])
    (tree.root / "cpu0" / "cpu_capacity").write_bytes(b"\xff\xfe")
    assert facts(tree.cores()) == [((0, 1, 2, 3), True)]


def test_files_that_cannot_be_read(tree: Tree) -> None:
    tree.say(CAPACITY, [400, 400, 1024, 1024])
    (tree.root / "cpu3" / CAPACITY).unlink()
    (tree.root / "cpu3" / CAPACITY).mkdir()  # an OSError for root, too
    assert facts(tree.cores()) == [((0, 1, 2, 3), True)]


def test_only_cores_that_we_may_run_on_count(tree: Tree) -> None:
    """Others are offline, or of somebody else: what is left may be of one speed."""
    tree.say(CAPACITY, [250] * 4 + [870] * 3 + [1024])
    assert choose(None, tree.cores([0, 1, 2, 3])) == Choice(4, (), "all 4 cores")
    assert choose(None, tree.cores([3, 7])) == Choice(1, (7,), "the 1 fastest of 2 cores")
    assert choose(None, tree.cores([5])) == Choice(1, (), "the only core")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
def test_this_machine() -> None:
    found, allowed = Cores.now(), sorted(os.sched_getaffinity(0))
    assert sorted(cpu for cluster in found.clusters for cpu in cluster.cpus) == allowed
    assert 1 <= found.n_helping <= found.n_cores <= len(allowed)
    assert 1 <= choose(None, found).threads <= len(allowed)


@pytest.mark.parametrize("fast, want", [(4, [4, 4]), (None, [8]), (8, [8]), (0, [8])])
def test_mac(monkeypatch: pytest.MonkeyPatch, fast: int | None, want: list[int]) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cores, "_sysctl", lambda name: fast)
    found = Cores.now()
    assert [cluster.n_cores for cluster in found.clusters] == want
    choice = choose(None, replace(found, share=None))
    assert (choice.threads, choice.cpus) == (want[0], ())  # the system has no affinity


@pytest.mark.skipif(sys.platform in ("darwin", "ios"), reason="they have it")
def test_sysctl_is_of_macs() -> None:
    assert cores._sysctl("hw.perflevel0.logicalcpu") is None


# ---- control groups ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, want",
    [
        ({"g/cpu.max": "50000 100000", "cpu.max": "max 100000"}, 0.5),
        ({"g/cpu.max": "400000 100000", "cpu.max": "150000 100000"}, 1.5),
        ({"g/cpu.max": "max 100000"}, None),
        ({"g/cpu.max": "much"}, None),
        ({"cpu/g/cpu.cfs_quota_us": "200000", "cpu/g/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/g/cpu.cfs_quota_us": "-1", "cpu/g/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], want: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    is_v2 = not any("cfs" in name for name in files)
    folders = ["g", ""] if is_v2 else ["cpu/g", "cpu"]
    monkeypatch.setattr(
        cores, "control_groups", lambda name, root: ((f"{root}/{f}", is_v2) for f in folders)
    )
    assert cores._share(str(tmp_path)) == want


def test_a_share_limits_threads(tree: Tree) -> None:
    tree.say(CAPACITY, [250] * 4 + [1024] * 4)
    choice = choose(None, tree.cores(share=1.5))
    assert choice == Choice(2, (4, 5, 6, 7), "the control group's share of 1.5 processors")
    assert choose(None, tree.cores(share=0.1)).threads == 1
    assert choose(None, tree.cores(share=64)).why == "the 4 fastest of 8 cores"
    with pytest.warns(EdgeWarning, match="6 threads on 2 CPUs"):
        assert choose(6, tree.cores(share=1.5)).threads == 6  # who asks gets it


# ---- what was asked for, and what was measured ---------------------------------------------------


@pytest.fixture
def phone(tree: Tree) -> Cores:
    return tree.say(CAPACITY, [250] * 4 + [1024] * 4).cores()


def test_who_decides(phone: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(None, phone).why == "the 4 fastest of 8 cores"
    store(3, phone)
    assert choose(None, phone) == Choice(3, (4, 5, 6, 7), "by edge-run tune")
    assert choose(5, phone) == Choice(5, (), "as asked")
    monkeypatch.setenv("EDGE_THREADS", "2")
    assert choose(5, phone) == choose(None, phone) == Choice(2, (4, 5, 6, 7), "by EDGE_THREADS")
    monkeypatch.setenv("EDGE_THREADS", "9" * 5000)
    with pytest.raises(InputError, match="is not a number from 1 to 256"):
        choose(None, phone)
    monkeypatch.setenv("EDGE_THREADS", "two")
    with pytest.raises(InputError, match=r"^EDGE_THREADS=two is not a number from 1 to 256$"):
        choose(None, phone)


def test_more_threads_than_cpus_are_told(phone: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "they wait for each other, fewer are faster"
    with pytest.warns(EdgeWarning, match=f"9 threads on 8 CPUs: {slow}"):
        assert choose(9, phone).threads == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(8, phone)
    monkeypatch.setattr(Cores, "now", classmethod(lambda cls: replace(phone, share=1.0)))
    for n, args, setting in ((98, ("-t", "98"), ""), (99, (), "99")):
        monkeypatch.setenv("EDGE_THREADS", setting)
        result = run("plan", "no.gguf", *args)
        line, error = result.stderr.splitlines()
        assert line == f"edge-run: warning: {n} threads on 1 CPU: {slow}"
        assert "no.gguf" in error and result.exit_code == 1


def test_tuned_number_belongs_to_a_machine(phone: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    store(3, phone)
    others = [replace(phone, share=2.0), replace(phone, clusters=phone.clusters[:1])]
    for other in others:
        choice = choose(None, other)
        assert choice.why != "by edge-run tune"
        assert choice.ignored is not None and "of another machine" in choice.ignored
    for name in ("edge.device.cores.__version__", "edge.device.cores.cpu_name"):
        with monkeypatch.context() as m:
            m.setattr(name, "9.9" if "version" in name else lambda: "Z80")
            assert choose(None, phone).threads == 4
    monkeypatch.setenv("EDGE_ISA", "scalar")
    assert choose(None, phone).threads == 4


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[1]", b"{}", b'{"threads": 3}', b"[" * 9999, b"x" * 100_000]
    + [
        f'{{"machine": MACHINE, "threads": {n}}}'.encode() for n in ("0", "true", '"3"', "9", "1e9")
    ],
)
def test_damaged_file(phone: Cores, content: bytes) -> None:
    path = store(3, phone)
    own = json.dumps(json.loads(path.read_bytes())["machine"])
    path.write_bytes(content.replace(b"MACHINE", own.encode()))
    choice = choose(None, phone)
    assert choice.threads == 4
    assert choice.ignored == (f"{path} is damaged, and is not used: `edge-run tune` makes it anew")


def test_file_that_cannot_be_read(phone: Cores) -> None:
    store(3, phone).unlink()
    assert choose(None, phone).ignored is None
    (cores._path()).mkdir()
    assert "cannot be read: " in (choose(None, phone).ignored or "")


def test_lines() -> None:
    choice = Choice(4, (0, 2, 3, 4, 6), "the 5 fastest of 9 cores", "some file is damaged")
    assert choice.lines("Operation not permitted") == [
        "threads: 4 threads, the 5 fastest of 9 cores, on CPUs 0,2-4,6 (the system did not keep "
        "them there: Operation not permitted)",
        "some file is damaged",
    ]
    assert Choice(1, (), "as asked").lines() == ["threads: 1 thread, as asked"]


@pytest.mark.parametrize(
    "text, want",
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nmodel\t\t: 2\n", "AMD EPYC"),
        ("model name\t: ARMv7 rev 3\n\nHardware\t: BCM2711\nModel\t\t: Raspberry Pi 4\n",) * 2,
        ("Hardware\t: Kirin\n", "Kirin"),
    ],
)
def test_cpu_name(tmp_path: Path, text: str, want: str) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="ascii")
    name = cpu_name(str(tmp_path / "cpuinfo"))
    assert name == f"{'Raspberry Pi 4' if want == text else want}, {os.cpu_count()} CPUs"
    assert cpu_name(str(tmp_path / "none")).endswith("CPUs")


# ---- edge-run tune -------------------------------------------------------------------------------


def test_candidates(phone: Cores) -> None:
    assert candidates(phone) == [1, 2, 3, 4, 6, 8]
    assert candidates(replace(phone, share=2.5)) == [1, 2, 3]
    many = Cores((Cluster(tuple(range(300)), 150, 1.0, True),), None)
    assert candidates(many)[-3:] == [150, 192, 256]


@pytest.mark.parametrize(
    "rows, want",
    [
        ([TuneRow(1, 10, 100)], 1),
        ([TuneRow(1, 10, 100), TuneRow(2, 20, 200), TuneRow(4, 21, 400)], 4),
        (
            [TuneRow(1, 10, 100), TuneRow(4, 20, 400), TuneRow(8, 20, 410)],
            4,
        ),  # not worth eight threads
        ([TuneRow(2, 30, 100), TuneRow(4, 10, 120)], 2),
    ],
)
def test_best(rows: list[TuneRow], want: int) -> None:
    assert best(rows) == want


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, few rounds, two threads at most."""
    monkeypatch.setattr(tune, "buffer_bytes", lambda cache, times: 8 << 20)
    monkeypatch.setattr(tune, "SECONDS", 0)
    monkeypatch.setattr(tune, "MOST_SPREAD", math.inf)  # whatever runs beside the tests
    monkeypatch.setattr(Times, "now", classmethod(lambda cls, cpus: None))
    two = Cores((Cluster((0, 1), 2, 1.0, True),), None)
    monkeypatch.setattr(Cores, "now", classmethod(lambda cls: two))


@pytest.mark.native
@pytest.mark.any_isa
def test_tune(quick: None, tiny_gguf: Callable[..., Path]) -> None:
    result = run("tune", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert [row["threads"] for row in told["rows"]] == [1, 2]
    assert all(row["decode"] > 0 and row["prompt"] > 0 for row in told["rows"])
    assert choose() == Choice(told["threads"], (), "by edge-run tune")
    engine = Engine.load(tiny_gguf())
    assert (engine.threads, engine.refused) == (told["threads"], None)
    engine.close()


@pytest.mark.native
@pytest.mark.any_isa
def test_tune_for_people(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_THREADS", "7")
    result = run("tune")
    assert result.exit_code == 0
    for word in ("GMAC/s", "best", "threads.json", "EDGE_THREADS=7 is set"):
        assert word in result.stdout


@pytest.mark.native
@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("limit", "why"),
    [("MOST_OTHERS", "other programs took 40% of"), ("MOST_SPREAD", "the rounds differ by")],
)
def test_what_a_busy_machine_gives_is_not_kept(
    quick: None, monkeypatch: pytest.MonkeyPatch, limit: str, why: str
) -> None:
    seen = iter([Times(10, 5, 2), Times(20, 10, 3)] * 2)
    monkeypatch.setattr(Times, "now", classmethod(lambda cls, cpus: next(seen)))
    monkeypatch.setattr(tune, "MOST_OTHERS", 1.0)
    monkeypatch.setattr(tune, limit, -1.0)
    store(2, Cores.now())
    result = run("tune")
    assert_one_line(result.exit_code, result.stderr, why)
    assert "so nothing is kept" in result.stderr
    assert "best: the fewest threads" in result.stdout and "nothing is kept" in result.stdout
    told = json.loads(run("tune", "--json").stdout)
    assert told["file"] is None and why in told["doubt"] and told["others"] == 0.4
    assert choose().threads == 2  # what was kept before stays


def test_doubt() -> None:
    steady = [TuneRow(1, 1.0, 1.0, 0.03), TuneRow(2, 2.0, 2.0, 0.05)]
    assert Tuning(steady, 0.02).doubt() is None and Tuning(steady, None).doubt() is None
    assert "30%" in (Tuning(steady, 0.3).doubt() or "")
    assert "60%" in (Tuning([*steady, TuneRow(4, 2.0, 2.0, 0.6)], 0.0).doubt() or "")
    assert tune._spread([1.0] * 9 + [50.0]) == 0.0  # one round that was disturbed
    assert tune._spread([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]) > 0.5


def test_times_of_others(tmp_path: Path) -> None:
    stat, t = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    #       user nice system idle iowait irq softirq steal guest guest_nice
    idle = f"cpu7 0 0 0 {t} 0 0 0 0 0 0"
    before = f"cpu 9 9 9\ncpu0 {t} 0 0 {5 * t} 0 0 0 0 {t} 0\n{idle}"
    after = f"cpu0 {2 * t} 0 0 {8 * t} {t} 0 0 {t} 0 0\n{idle}\nctxt 1"
    told = []
    for text in (before, after):
        stat.write_text(text, encoding="ascii")
        told.append(Times.now((0, 7), str(stat)))
    first, second = told
    assert first is not None and second is not None
    assert (first.all, first.busy, second.all, second.busy) == (7, 1, 13, 3)
    assert replace(second, own=1.0).others_since(replace(first, own=0.0)) == pytest.approx(1 / 6)
    assert Times.now((0, 1), str(stat)) is None and Times.now((0,), str(tmp_path / "no")) is None
    stat.write_text("cpu0 x", encoding="ascii")
    assert Times.now((0,), str(stat)) is None


@pytest.mark.native
@pytest.mark.any_isa
def test_no_memory_to_tune(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.device.machine.available", lambda: 10 << 20)
    with pytest.raises(MemoryBudgetError, match=r"8\.0 MiB .* 10\.0 MiB are available"):
        tune.measure(Cores.now())
    assert run("tune").exit_code == 1


def test_bench_and_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_THREADS", "1")
    result = run("bench", "model.gguf", "--threads", "1,2")
    assert result.exit_code == 2 and "EDGE_THREADS" in result.stderr
