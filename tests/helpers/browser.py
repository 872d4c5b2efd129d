"""A headless Chromium, where there is one."""

import base64
import contextlib
import shutil
from pathlib import Path

import pytest

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars")  # fmt: skip
PHONE, DESKTOP = (390, 844), (1280, 900)


@contextlib.contextmanager
def chromium(profile: Path, size: tuple[int, int] = DESKTOP):
    """A driver whose downloads go to `profile / "downloads"`; skips the test, saying so, where Chromium is missing."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"{missing[0]} is not installed, so the page is not tried in a browser")
    options = selenium.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={profile / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(profile / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(paths["chromedriver"]))
    try:
        resize(driver, size)
        yield driver
    finally:
        driver.quit()


def resize(driver, size: tuple[int, int]) -> None:
    """The viewport's width and height, as on a phone or a desktop."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def screenshot(driver, path: Path) -> None:
    """The whole page, however long."""
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    path.write_bytes(base64.b64decode(taken["data"]))


def fits(driver) -> bool:
    """Whether nothing hangs over the page's right edge."""
    return driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def messages(driver) -> list[str]:
    """What the page wrote to the console: errors, above all."""
    return [entry["message"] for entry in driver.get_log("browser")]
