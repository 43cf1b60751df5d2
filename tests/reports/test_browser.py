"""The page in a real browser, light and dark: no console message, nothing that the policy forbids."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from compresskit.reports import build

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def browser() -> str:
    chosen = os.environ.get("COMPRESSKIT_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if chosen is None:
        pytest.skip("no Chromium here; install one or set COMPRESSKIT_BROWSER to look at the page")
    return chosen


def run(browser: str, page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [browser, *always, "--enable-logging=stderr", "--v=0", profile, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(
    browser: str, make_artifact: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(build([make_artifact()]).html(), encoding="utf-8")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = run(browser, page, *dark, "--window-size=1280,2400", f"--screenshot={shot}")
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    assert shot.stat().st_size > 50_000, "more than an empty page"


@pytest.mark.slow
def test_the_browser_would_tell(browser: str, tmp_path: Path) -> None:
    """The check above can fail: a script that the policy forbids does reach the console."""
    page = tmp_path / "report.html"
    tampered = build_page().replace("</main>", "<script>alert(1)</script></main>")
    page.write_text(tampered, encoding="utf-8")
    done = run(browser, page, "--dump-dom")
    assert "CONSOLE" in done.stderr
    assert "Content Security Policy" in done.stderr


def build_page() -> str:
    from .conftest import make_records

    return build(make_records("original")).html()
