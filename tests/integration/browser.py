"""A real browser: chromium, by Playwright.

with browser.opened(url, width=420, dark=True) as tab:
    tab.page.inner_text("h1")
    assert tab.faults == []
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Page, sync_playwright

from tests.conftest import find_program

#: root has no sandbox; and it is to look nothing up of its own accord
_OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
#: milliseconds for whatever is waited for
_PATIENCE = 60_000.0


@dataclass
class Tab:
    """A page, what it asked for, and what went wrong: what it says on its console, and failed requests."""

    page: Page
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@contextmanager
def opened(url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Tab]:
    """The page at `url` in a window of that many pixels."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_program("chromium"), args=list(_OPTIONS))
        try:
            context = chromium.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            context.set_default_timeout(_PATIENCE)
            tab = Tab(context.new_page())
            tab.page.on("request", lambda request: tab.requests.append(request.url))
            tab.page.on("console", lambda message: tab.faults.append(message.text))
            tab.page.on("pageerror", lambda error: tab.faults.append(str(error)))
            tab.page.on("response", lambda r: r.status >= 400 and tab.faults.append(f"{r.status} {r.url}"))
            tab.page.goto(url)
            yield tab
        finally:
            chromium.close()
