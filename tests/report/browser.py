"""A headless Chromium for tests of pages: the one that Debian packages, with its driver."""

from __future__ import annotations

import shutil
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",  # containers have little of it
)


def why_missing() -> str:
    """Why this machine has no browser for tests; empty when it has one."""
    missing = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    return f"no {', '.join(missing)}: apt-get install chromium chromium-driver" if missing else ""


def chromium(profile: Path) -> Chrome:
    """A browser that logs what its console says and what it asks the network for; its `quit` ends it.

    Args:
        profile: An empty folder, for it alone.
    """
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Chrome(options, ChromeService(shutil.which("chromedriver")))
