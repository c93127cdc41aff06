"""The built site in a real browser: built strictly, nothing asked of the network, equations drawn, light and dark."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import ROOT
from test_report_browser import complaints, requested

pytestmark = pytest.mark.slow
SHOWN = ("index.html", "methods/index.html", "methods/2ssp.html", "methods/slimgpt.html", "claims.html",
         "results/index.html", "reference/python.html", "reference/errors.html")  # fmt: skip


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, on this machine: its search needs a server."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        serving.join()


def open_page(browser: Any, page: str, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page)


@pytest.mark.parametrize("page", SHOWN)
def test_a_page_asks_for_nothing_and_complains_of_nothing(browser: Any, site: str, page: str) -> None:
    complaints(browser), requested(browser)  # those of the page before
    open_page(browser, site + page, "light")
    assert browser.find_element("tag name", "h1").text
    assert complaints(browser) == []
    asked = requested(browser)
    assert site + page in asked
    assert [address for address in asked if not address.startswith(site)] == []


def test_the_search_finds_a_method(browser: Any, site: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    open_page(browser, site + "index.html?q=SlimGPT", "light")
    found = WebDriverWait(browser, 20).until(lambda b: b.find_elements("css selector", ".md-search-result__link"))
    assert any("methods/slimgpt.html" in (each.get_attribute("href") or "") for each in found)


def test_it_is_light_or_dark_as_the_system_is(browser: Any, site: str) -> None:
    ground = {}
    for scheme in ("light", "dark"):
        open_page(browser, site + "methods/2ssp.html", scheme)
        ground[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = {scheme: sum(map(int, rgb[4:-1].split(", "))) for scheme, rgb in ground.items()}
    assert brightness["light"] > 600 > 200 > brightness["dark"]


def test_equations_and_pictures_are_there(browser: Any, site: str) -> None:
    open_page(browser, site + "methods/slimgpt.html", "light")
    heights = browser.execute_script(
        "return [...document.querySelectorAll('div.arithmatex math')].map(each => each.getBoundingClientRect().height)"
    )
    assert len(heights) >= 5
    assert min(heights) > 12
    sizes = browser.execute_script("return [...document.images].map(each => each.naturalWidth)")
    assert len(sizes) >= 3
    assert min(sizes) > 100


def test_the_public_names_are_in_the_reference(browser: Any, site: str) -> None:
    import secateur

    open_page(browser, site + "reference/python.html", "light")
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(each => each.id)")
    documented = {name for name in secateur.__all__ if f"secateur.{name}" in ids}
    assert set(secateur.__all__) - documented == {"SecateurError", "__version__"}
    open_page(browser, site + "reference/errors.html", "light")
    assert "secateur.errors.SecateurError" in browser.page_source
