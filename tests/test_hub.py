"""Models of the hub, of URLs and of other programs: chosen, fetched, found and removed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_model import ROOT, assert_one_line, run
from hubserver import COMMIT, Hub
from tiny import write_split

import edge
from edge.cli.models import Fetching
from edge.disk import download
from edge.engine import describe
from edge.errors import EdgeError, InputError, MemoryBudgetError, ModelFileError, UnsupportedError
from edge.hub import remote
from edge.hub.find import find
from edge.hub.named import pull
from edge.hub.names import NAMES
from edge.hub.offers import OfferedFile, group, select
from edge.hub.remove import remove
from edge.hub.stored import stored
from edge.hub.wanted import InRepo, Url, parse

Tiny = Callable[..., Path]
REPO = "owner/tiny-GGUF"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, with no models of anybody."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "OLLAMA_MODELS", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "edge"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("edge.hub.stored._OLLAMA_SERVICE", tmp_path / "service")
    return tmp_path


@pytest.fixture
def hub(home: Path, tiny_gguf: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model in three types, a projector and a note."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(download, "_sleep", lambda seconds: None)
    files = {f"tiny-{type}.gguf": tiny_gguf(type=type).read_bytes() for type in ("Q4_0", "Q8_0")}
    files |= {"tiny-F16.gguf": tiny_gguf(type="F16").read_bytes(), "README.md": b"# tiny"}
    files["mmproj-tiny-Q8_0.gguf"] = b"no model"
    with Hub(repos={REPO: files}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # older versions have copies
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def in_cache(home: Path) -> list[str]:
    """The files in the hub's cache, but for locks."""
    found = [path for path in (home / "hub").rglob("*") if path.is_file() or path.is_symlink()]
    return sorted(path.name for path in found if ".locks" not in path.parts)


# ---- what can be written for MODEL ----


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("owner/repo", InRepo("owner/repo")),
        ("owner/repo:Q4_K_M", InRepo("owner/repo", "Q4_K_M")),
        ("hf.co/owner/repo:Q4_K_M", InRepo("owner/repo", "Q4_K_M")),
        ("owner/repo:sub/a.gguf", InRepo("owner/repo", "sub/a.gguf")),
        ("https://huggingface.co/o/r/resolve/main/a%20b.gguf", InRepo("o/r", "a b.gguf")),
        ("https://huggingface.co/o/r/blob/main/a.gguf?x=1", InRepo("o/r", "a.gguf")),
        ("http://host:81/x/a.gguf?key=1", Url("http://host:81/x/a.gguf?key=1")),
        ("Qwen3-0.6B", InRepo(*NAMES["qwen3-0.6b"])),
        ("qwen3-0.6b:Q4_0", InRepo(NAMES["qwen3-0.6b"].repo, "Q4_0")),
        *((path, None) for path in ("a.gguf", "a/b.gguf", "/a/b", "./a/b", "../a/b", "C:/a/b")),
        *((path, None) for path in ("", "llama3.2:1b", "a/b/c", "edge/cli", "-x/y", "a/\0")),
    ],
)
def test_parse(text: str, wanted: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert parse(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "owner/repo:../../etc/passwd.gguf",
        "owner/repo:/etc/passwd",
        "owner/repo:a\\b.gguf",
        "owner/re..po",
        "owner/re--po",
        "https://host/model.bin",
        "https://host/../model.gguf",
        "https://host/a/%2e%2e/%2e%2e/model.gguf",
        "https://huggingface.co/o/r/resolve/main/../../x.gguf",
        "http:///x.gguf",
    ],
)
def test_names_that_nobody_has(text: str) -> None:
    with pytest.raises(InputError):
        parse(text)
    with pytest.raises(InputError):
        pull(text)


def test_the_table_of_names() -> None:
    help_text = " ".join(run("pull", "--help").output.split())
    for name, place in NAMES.items():
        assert parse(name) == InRepo(*place) and f" {name}" in help_text
    with pytest.raises(InputError, match=r"qwen2\.5-0\.5b, "):
        pull("no-such-name")


@pytest.mark.parametrize(
    ("name", "type"),
    [
        ("Qwen3-0.6B-Q8_0.gguf", "Q8_0"),
        ("smollm2-1.7b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("m.Q4_1.gguf", "Q4_1"),
        ("Q4_K_M/m-UD-IQ2_XXS-00001-of-00001.gguf", "UD-IQ2_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("m-bf16.gguf", "BF16"),
        ("m-TQ1_0.gguf", "TQ1_0"),
        ("SmolLM3-Q4_K_XL.gguf", "Q4_K_XL"),
        ("m.gguf", ""),
    ],
)
def test_types_of_names(name: str, type: str) -> None:
    (offer,) = group([OfferedFile(name, 1)])
    assert offer.type == type


def test_only_whole_models_are_offered() -> None:
    names = ["a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf"]
    names += [
        "a-Q4_0-00001-of-00002.gguf",
        "mmproj-F16.gguf",
        "imatrix.gguf",
        "x.txt",
        "b/a-Q6_K.gguf",
    ]
    offers = group(OfferedFile(name, 5) for name in names)
    assert [(offer.type, offer.n_bytes) for offer in offers] == [("Q8_0", 10), ("Q6_K", 5)]
    assert select(offers, "q8_0", "r").parts[0].name == names[0]
    assert select(offers, "b/a-Q6_K.gguf", "r").type == "Q6_K"
    with pytest.raises(UnsupportedError, match=r"r has no Q4_0.*\(supported: Q8_0, Q6_K\)"):
        select(offers, "Q4_0", "r")
    twins = group([OfferedFile("a-Q8_0.gguf", 1), OfferedFile("b-Q8_0.gguf", 1)])
    with pytest.raises(ModelFileError, match=r"name one: r:a-Q8_0.gguf, r:b-Q8_0.gguf"):
        select(twins, "Q8_0", "r")


# ---- the hub ----


def test_pull_a_type(hub: Hub, home: Path) -> None:
    said: list[str] = []
    pulled = pull(f"{REPO}:q4_0", say=said.append)
    assert (pulled.name, pulled.fetched) == (f"{REPO}:Q4_0", True)
    assert Path(pulled.path).read_bytes() == hub.repos[REPO]["tiny-Q4_0.gguf"]
    assert len(said) == 1 and said[0].startswith("Q4_0: 256 tokens take ")
    n_requests = len(hub.requests)
    assert pull(f"{REPO}:Q4_0") == type(pulled)(pulled.name, pulled.path, False)
    assert find(f"{REPO}:Q4_0") == find(REPO) == pulled.path
    assert len(hub.requests) == n_requests
    assert pull(f"{REPO}:Q4_0", force=True).fetched


def test_other_programs_find_what_was_fetched(hub: Hub, home: Path) -> None:
    from huggingface_hub import constants, hf_hub_download, scan_cache_dir

    path = pull(f"{REPO}:tiny-Q4_0.gguf").path
    assert hf_hub_download(REPO, "tiny-Q4_0.gguf") == path
    hub.status["/"] = (500, {})
    assert hf_hub_download(REPO, "tiny-Q4_0.gguf", local_files_only=True) == path
    info = scan_cache_dir(constants.HF_HUB_CACHE)  # older versions have a copy of it
    assert not info.warnings and [repo.repo_id for repo in info.repos] == [REPO]
    other = hf_hub_download(REPO, "tiny-Q8_0.gguf")
    assert find(f"{REPO}:Q8_0") == other


def test_the_best_that_fits_is_chosen(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe, "program_bytes", lambda: 50 << 20)
    said: list[str] = []
    pulled = pull(REPO, say=said.append)  # not F16: it would be slow
    assert pulled.name == f"{REPO}:Q8_0" and "Q8_0, the best of 3 that fits" in said[0]
    needed = {}
    for type in ("Q4_0", "Q8_0"):
        with pytest.raises(MemoryBudgetError) as error:
            edge.load(pull(f"{REPO}:{type}").path, memory=60_000_000).close()
        needed[type] = error.value.needed
    assert needed["Q4_0"] < needed["Q8_0"]
    chosen = pull(REPO, memory=needed["Q8_0"] - 1, say=said.append)
    assert chosen.name == f"{REPO}:Q4_0" and "the budget is" in said[-1]


def test_headers_of_models_that_are_too_large_are_not_fetched(hub: Hub, home: Path) -> None:
    hub.sizes |= {"tiny-Q8_0.gguf": 1 << 50, "tiny-F16.gguf": 1 << 51}
    assert pull(REPO).name == f"{REPO}:Q4_0"
    assert not hub.ranges_of("Q8_0.gguf") and not hub.ranges_of("F16.gguf")


def test_where_none_fits_none_is_fetched(hub: Hub, home: Path) -> None:
    with pytest.raises(MemoryBudgetError, match=rf"^{REPO}:Q4_0 needs .* the budget is"):
        pull(REPO, memory="50MB")
    assert in_cache(home) == []
    result = run("pull", REPO, "--memory", "50MB")
    assert_one_line(result.exit_code, result.stderr, "The least that runs is")


def test_a_long_header_is_asked_for_in_steps(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST", 1000)
    monkeypatch.setattr(download, "_BLOCK", 256)
    facts = json.loads(run("info", f"{REPO}:Q4_0", "--json").stdout)
    assert facts["path"] == f"{REPO}:Q4_0" and facts["architecture"] == "llama"
    ranges = hub.ranges_of("Q4_0.gguf")
    assert ranges[:2] == ["bytes=0-999", "bytes=1000-3999"] and len(ranges) < 7


def test_plan_before_the_download(hub: Hub, home: Path) -> None:
    text = run("plan", f"{REPO}:Q4_0").stdout
    assert text.startswith(f"{REPO}:Q4_0 (") and "keys and values" in text
    assert in_cache(home) == []


def test_all_shards(hub: Hub, home: Path, tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    shards = write_split(tmp_path / "split" / "m-Q4_0.gguf", 3, type="Q4_0")
    hub.repos["owner/split"] = {f"Q4_0/{path.name}": path.read_bytes() for path in shards}
    seen: list[tuple[int, int]] = []
    pulled = pull("owner/split:Q4_0", progress=lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in shards)
    with edge.load(pulled.path) as model:
        assert model.engine.path == pulled.path
    assert [m.name for m in stored()] == ["owner/split:Q4_0"]
    del hub.repos["owner/split"][f"Q4_0/{shards[1].name}"]
    with pytest.raises(UnsupportedError, match="no GGUF model"):
        pull("owner/split:Q8_0")


@pytest.mark.native
@pytest.mark.all_isas
def test_load_by_name(hub: Hub, home: Path) -> None:
    seen: list[tuple[int, int]] = []
    with edge.load(f"{REPO}:Q4_0", progress=lambda *now: seen.append(now)) as model:
        assert model.engine.path.endswith("tiny-Q4_0.gguf") and seen
    result = run("complete", f"{REPO}:Q4_0", "-p", "Hello", "-n", "2")
    assert result.exit_code == 0, result.stderr


def test_goes_on_after_a_cut(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST", 1 << 14)
    hub.cut, hub.cuts_left = 20_000, 100
    monkeypatch.setattr(download, "_TRIES", -1)  # as if the process had ended at the first cut
    with pytest.raises(ModelFileError, match=r"goes on|go on"):
        pull(f"{REPO}:Q8_0")
    (cut,) = stored()
    assert not cut.complete and cut.name == REPO and cut.n_bytes == 20_000
    assert "cut off: the same pull goes on" in run("list").output
    monkeypatch.setattr(download, "_TRIES", 5)
    assert Path(pull(f"{REPO}:Q8_0").path).read_bytes() == hub.repos[REPO]["tiny-Q8_0.gguf"]
    assert "bytes=20000-" in hub.ranges_of("Q8_0.gguf")
    assert [model.complete for model in stored()] == [True]


def test_what_is_no_gguf_is_not_fetched(hub: Hub, home: Path, tiny_gguf: Tiny) -> None:
    cut = tiny_gguf(type="Q4_0").read_bytes()[:-100]
    hub.repos["owner/bad"] = {"page-Q4_0.gguf": b"<html>" * 99, "cut-Q8_0.gguf": cut}
    with pytest.raises(ModelFileError, match=r"^owner/bad:Q4_0, magic at byte 0: .*web page"):
        pull("owner/bad:Q4_0")
    with pytest.raises(ModelFileError, match="cut off"):
        pull("owner/bad:Q8_0")
    with pytest.raises(ModelFileError):
        pull("owner/bad")
    assert in_cache(home) == []


def test_damaged_bytes_get_no_name(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.damaged.add(f"/{REPO}/resolve/{COMMIT}/tiny-Q4_0.gguf")
    with pytest.raises(ModelFileError, match="SHA-256"):
        pull(f"{REPO}:Q4_0")
    assert in_cache(home) == []


def test_a_full_disk(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(download, "write_all", full)
        result = run("pull", f"{REPO}:Q4_0")
        assert_one_line(
            result.exit_code, result.stderr.partition("\n")[2], "No space left on device"
        )
    assert [model.complete for model in stored()] == [False]
    assert pull(f"{REPO}:Q4_0").fetched


def test_two_pulls_at_once(hub: Hub, home: Path) -> None:
    got: list[bool] = []
    threads = [
        threading.Thread(target=lambda: got.append(pull(f"{REPO}:Q4_0").fetched)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 3 and got.count(True) == 1
    assert hub.ranges_of("Q4_0.gguf").count("") == 1


def test_a_size_that_is_not_true(hub: Hub, home: Path) -> None:
    hub.sizes["tiny-Q4_0.gguf"] = 10_000_000
    with pytest.raises(ModelFileError, match="it stated 10000000"):
        pull(f"{REPO}:Q4_0")
    assert stored() == [] or not stored()[0].complete


def test_a_repository_without_a_model(hub: Hub) -> None:
    hub.repos["owner/other"] = {"model.safetensors": b"", "mmproj-F16.gguf": b""}
    with pytest.raises(UnsupportedError, match="owner/other has no GGUF model"):
        pull("owner/other")


def test_names_of_files_that_lead_out(hub: Hub, home: Path) -> None:
    data = hub.repos[REPO]["tiny-Q4_0.gguf"]
    hub.repos["owner/out"] = {"../../../evil-Q4_0.gguf": data, "/evil-Q8_0.gguf": data}
    with pytest.raises(ModelFileError, match="lead out"):
        pull("owner/out")
    assert not list(home.rglob("evil*"))


def test_a_commit_that_leads_out(hub: Hub, home: Path) -> None:
    hub.commit = "../../../out"
    with pytest.raises(ModelFileError, match="states no commit"):
        pull(f"{REPO}:Q4_0")
    assert not list(home.rglob("out"))


def test_a_server_that_ignores_ranges(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST", 1000)
    hub.ranges = False
    assert pull(f"{REPO}:Q4_0").fetched


def test_a_mirror_that_states_names_only(hub: Hub) -> None:
    hub.states_sizes = False
    assert pull(f"{REPO}:Q4_0").fetched
    assert hub.paths("HEAD")


@pytest.mark.parametrize(
    ("status", "headers", "match"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "accept it on the page .* HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "accept it on the page .* HF_TOKEN"),
        (401, {}, "private: check the name, or set HF_TOKEN"),
        (403, {}, "private: check the name, or set HF_TOKEN"),
        (404, {}, "no such repository"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no such repository"),
        (429, {"Retry-After": "77"}, "try again in 77 seconds"),
        (500, {}, "the hub says 500"),
    ],
)
def test_refusals(hub: Hub, status: int, headers: dict[str, str], match: str) -> None:
    hub.status[f"/api/models/{REPO}"] = (status, headers)
    with pytest.raises(ModelFileError, match=match) as error:
        pull(f"{REPO}:Q4_0")
    assert "\n" not in str(error.value)
    result = run("chat", f"{REPO}:Q4_0", "-p", "Hello")
    assert_one_line(result.exit_code, result.stderr, REPO)


def test_an_answer_that_is_none(hub: Hub, home: Path) -> None:
    hub.status[f"/api/models/{REPO}"] = (200, {"Content-Type": "text/html"})
    with pytest.raises(EdgeError):
        pull(REPO)


def test_the_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect = f"localhost:{hub.port}"
    assert pull(f"{REPO}:Q4_0").fetched
    for _, path, headers in hub.requests:
        has_token = headers.get("authorization") == "Bearer hf_secret"
        assert has_token == (headers["host"] != hub.redirect), path


def test_without_a_network(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    path = pull(f"{REPO}:Q4_0").path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find(f"{REPO}:Q4_0") == find(REPO) == path
    with pytest.raises(ModelFileError, match=rf"On this machine are {REPO}:Q4_0"):
        pull(f"{REPO}:Q8_0")


# ---- URLs ----


def test_pull_a_url(hub: Hub, home: Path) -> None:
    hub.files["/x/tiny-Q4_0.gguf"] = hub.repos[REPO]["tiny-Q4_0.gguf"]
    url = f"{hub.url}/x/tiny-Q4_0.gguf"
    pulled = pull(url)
    assert pulled.fetched and Path(pulled.path).read_bytes() == hub.files["/x/tiny-Q4_0.gguf"]
    assert not pull(url).fetched and find(url) == find(pulled.name) == pulled.path
    assert [(m.name, m.place) for m in stored()] == [(pulled.name, "url")]
    assert remove(url) and stored() == [] and not Path(pulled.path).exists()


def test_a_url_of_the_hub_is_its_repository(hub: Hub) -> None:
    pulled = pull(f"{hub.url}/{REPO}/resolve/main/tiny-Q4_0.gguf")
    assert pulled.path == find(f"{REPO}:Q4_0")


def test_bad_urls(hub: Hub, home: Path, tiny_gguf: Tiny) -> None:
    hub.files["/page.gguf"] = b"<html>"
    hub.files["/cut.gguf"] = tiny_gguf(type="Q4_0").read_bytes()[:-100]
    for name, match in (("page", "web page"), ("cut", "cut off"), ("none", "404")):
        with pytest.raises(ModelFileError, match=match):
            pull(f"{hub.url}/{name}.gguf")
    assert stored() == []


# ---- what is on this machine ----


def lm_studio(home: Path, tiny: Path) -> Path:
    folder = home / ".lmstudio" / "models" / "someone" / "small-GGUF"
    folder.mkdir(parents=True)
    (folder / "small-Q4_0.gguf").write_bytes(tiny.read_bytes())
    return folder / "small-Q4_0.gguf"


def ollama(home: Path, tiny: Path) -> Path:
    folder = home / ".ollama" / "models"
    model, image = folder / "blobs" / f"sha256-{'a' * 64}", folder / "blobs" / f"sha256-{'b' * 64}"
    model.parent.mkdir(parents=True)
    model.write_bytes(tiny.read_bytes())
    image.write_text('{"file_type": "Q4_0"}')
    kind = "application/vnd.ollama.image.model"
    facts = {
        "config": {"mediaType": "x/docker.image.v1+json", "digest": f"sha256:{'b' * 64}"},
        "layers": [{"mediaType": kind, "digest": f"sha256:{'a' * 64}", "size": 1}],
    }
    manifests = folder / "manifests"
    for place in ("registry.ollama.ai/library/tiny/1b", "hf.co/owner/repo/latest"):
        (manifests / place).parent.mkdir(parents=True)
        (manifests / place).write_text(json.dumps(facts))
    bad = manifests / "registry.ollama.ai" / "library" / "bad"
    bad.mkdir()
    facts["layers"] = [{"mediaType": kind, "digest": "sha256:../../../../etc/passwd"}]
    for name, text in (("a", "{"), ("b", "[]"), ("c", json.dumps(facts)), ("d", '{"layers": 1}')):
        (bad / name).write_text(text)
    return model


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def test_models_of_other_programs(home: Path, tiny_gguf: Tiny) -> None:
    theirs, blob = lm_studio(home, tiny_gguf(type="Q4_0")), ollama(home, tiny_gguf(type="Q4_0"))
    before = snapshot(home / ".lmstudio") | snapshot(home / ".ollama")
    rows = json.loads(run("list", "--json").output)["models"]
    assert [(row["name"], row["place"], row["type"]) for row in rows] == [
        ("someone/small-GGUF:Q4_0", "LM Studio", "Q4_0"),
        ("hf.co/owner/repo:latest", "Ollama", "Q4_0"),
        ("tiny:1b", "Ollama", "Q4_0"),
    ]
    assert find("someone/small-GGUF:Q4_0") == find("someone/small-GGUF") == str(theirs)
    assert find("tiny:1b") == str(blob)
    assert run("info", "tiny:1b").exit_code == 0
    with pytest.raises(InputError, match="is of Ollama: remove it there"):
        remove("tiny:1b")
    with pytest.raises(InputError, match="LM Studio"):
        remove("someone/small-GGUF")
    assert snapshot(home / ".lmstudio") | snapshot(home / ".ollama") == before
    lines = run("list").output.splitlines()
    assert len(lines) == 5 and lines[-1] == f"Ollama: {home / '.ollama' / 'models'}"


def test_a_folder_of_models(home: Path, tiny_gguf: Tiny) -> None:
    folder = home / "models"
    folder.mkdir()
    assert find(str(folder)) == str(folder)  # the engine says what is wrong with it
    for type in ("Q4_0", "Q8_0"):
        (folder / f"m-{type}.gguf").write_bytes(tiny_gguf(type=type).read_bytes())
    said: list[str] = []
    assert find(str(folder), say=said.append) == str(folder / "m-Q8_0.gguf")
    assert "the best of 2" in said[0]
    assert find(f"{folder}:q4_0") == str(folder / "m-Q4_0.gguf")
    with pytest.raises(UnsupportedError, match="Q5_K"):
        find(f"{folder}:Q5_K")
    names = [row["name"] for row in json.loads(run("list", str(folder), "--json").output)["models"]]
    assert names == [f"{folder}:Q8_0", f"{folder}:Q4_0"]
    assert_one_line(*(lambda r: (r.exit_code, r.stderr))(run("list", str(folder / "x"))), "no such")


def test_an_empty_machine(home: Path) -> None:
    assert run("list").output == "no models: `edge-run pull` fetches one\n"
    result = run("remove", "owner/repo")
    assert_one_line(result.exit_code, result.stderr, "owner/repo is not here")


def test_remove(hub: Hub, home: Path) -> None:
    from huggingface_hub import hf_hub_download

    readme = Path(hf_hub_download(REPO, "README.md"))
    paths = [Path(pull(f"{REPO}:{type}").path) for type in ("Q4_0", "Q8_0")]
    assert "removed owner/tiny-GGUF:Q4_0" in run("remove", f"{REPO}:Q4_0").output
    assert not paths[0].exists() and paths[1].exists()
    assert len(list((home / "hub").glob("models--*/blobs/*"))) == 2
    remove(REPO)
    assert not paths[1].exists() and readme.exists()  # others may want it


def test_remove_leaves_no_folder(hub: Hub, home: Path) -> None:
    pull(f"{REPO}:Q4_0")
    folder = home / "hub" / "models--owner--tiny-GGUF"
    (folder / "blobs" / f"x{download.INCOMPLETE}").touch()
    assert [model.complete for model in remove(REPO)] == [True, False]
    assert stored() == [] and not folder.exists()


def test_remove_spares_what_another_snapshot_has(hub: Hub, home: Path) -> None:
    path = Path(pull(f"{REPO}:Q4_0").path)
    blob = path.resolve()
    other = path.parent.parent / ("d" * 40) / "renamed-Q4_0.gguf"
    other.parent.mkdir()
    other.symlink_to(os.path.relpath(blob, other.parent))
    remove(f"{REPO}:tiny-Q4_0.gguf")
    assert not path.exists() and other.exists()


def test_remove_follows_no_link_out(home: Path) -> None:
    victim = home / "victim.gguf"
    victim.write_bytes(b"precious")
    link = home / "hub" / "models--o--r" / "snapshots" / "c" / "m-Q4_0.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    remove("o/r")
    assert victim.exists() and not link.is_symlink()


# ---- the process ----


def test_a_file_takes_no_client_for_servers(tiny_gguf: Tiny) -> None:
    code = (
        "import sys, edge\n"
        f"edge.load({str(tiny_gguf(type='Q4_0'))!r}).close()\n"
        "from edge.disk import pull\n"
        "sys.exit(not {'ssl', 'http.client', 'huggingface_hub'}.isdisjoint(sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_without_the_package(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert stored() == []
    with pytest.raises(UnsupportedError, match="pip install huggingface_hub"):
        pull("owner/repo:Q4_0")


def test_the_bar_shows_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0])
    monkeypatch.setattr("edge.cli.models.time.monotonic", lambda: next(times))
    bar, mib = Fetching(), 1 << 20
    assert bar.text(40 * mib, 100 * mib).endswith(" 40 %, 40.0 MiB of 100.0 MiB")
    assert bar.text(50 * mib, 100 * mib).endswith("50.0 MiB of 100.0 MiB, 5.0 MiB/s, 0:10 left")


def test_the_program_asks_the_endpoint(hub: Hub, home: Path) -> None:
    env = os.environ | {"HF_HUB_CACHE": str(home / "other"), "PYTHONPATH": str(ROOT)}
    env["HF_HUB_OFFLINE"] = "0"
    argv = [sys.executable, "-m", "edge.cli", "pull", f"{REPO}:Q4_0"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = home / "other" / "models--owner--tiny-GGUF" / "snapshots" / COMMIT / "tiny-Q4_0.gguf"
    assert done.stdout == f"{REPO}:Q4_0: {path}\n" and path.exists()
    assert done.stderr.startswith("Q4_0: 256 tokens take ")
