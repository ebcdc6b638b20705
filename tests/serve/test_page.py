"""The page at / in a real Chromium: 400 pixels wide, by keyboard alone, and 900 pixels wide with long texts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_ranker import serving, until
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
Browse = Callable[..., Any]


@contextmanager
def browser(url: str, folder: Path) -> Iterator[Browse]:
    """Chromium with a page; calls of its DevTools protocol."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        "--window-size=400,900",
    ]
    command = [str(CHROMIUM), *options, f"--user-data-dir={folder}", url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            found = next(
                m for line in process.stderr if (m := re.search(r"ws://([^/]+)/", line))
            )
            pages = httpx.get(f"http://{found[1]}/json").json()
            with connect(
                next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
            ) as socket:

                def call(method: str, **parameters: Any) -> Any:
                    socket.send(
                        json.dumps({"id": 1, "method": method, "params": parameters})
                    )
                    while "id" not in (answer := json.loads(socket.recv(timeout=30))):
                        pass
                    return answer["result"]

                yield call
        finally:
            process.terminate()


def test_keyboard_and_a_narrow_window(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, address), browser(address, tmp_path / "profile") as call:

        def value(script: str) -> Any:
            return call("Runtime.evaluate", expression=script)["result"].get("value")

        def press(key: str, text: str = "") -> None:
            for kind in ("keyDown", "keyUp"):
                sent = {"text": text} if kind == "keyDown" and text else {}
                call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=key,
                    windowsVirtualKeyCode=KEYS[key],
                    **sent,
                )

        KEYS = {"Tab": 9, "Enter": 13}
        call(
            "Emulation.setDeviceMetricsOverride",
            width=400,
            height=900,
            deviceScaleFactor=1,
            mobile=True,
        )
        # none while the page loads
        until(lambda: "Run run" in (value("about.textContent") or ""))
        focused = []
        for _ in range(3):
            press("Tab")
            focused.append(
                value("document.activeElement.id || document.activeElement.tagName")
            )
        assert focused == ["user", "candidates", "BUTTON"]
        press("Enter", "\r")
        until(lambda: value("!answer.hidden"))
        # Alien is i1 and leaves at 4, Brazil i2 at 2
        assert (
            value("cost.textContent")
            == "6 token-layers; full depth would have cost 8 (25 % saved)"
        )
        assert (
            value("[...items.rows].map(row => row.innerText).join()")
            == "Brazil (i2)\t0.200\t2,Alien (i1)\t0.100\t4"
        )
        assert value("document.documentElement.scrollWidth") <= 400
        assert value("error.textContent") == ""
        # without candidates: what the server recommends, and what found it
        value("candidates.value = ''; ask()")
        until(lambda: "found by text" in value("items.textContent"))


def test_titles_and_whole_words(tmp_path: Path) -> None:
    """A known id has its title beside it, and why is said in words.

    At 900 pixels labels, dates and headings are not broken inside a word.
    """
    query = "?user=u2&candidate=i1&candidate=" + "x" * 300
    with serving(tmp_path) as (_, address), browser(address, tmp_path / "profile") as call:
        sent = {
            "event_id": "e",
            "user_id": "u2",
            "item_id": "y" * 250,
            "label": 1,
            "timestamp": 1.7e9,
        }
        assert httpx.post(f"{address}/v1/events", json=[sent]).status_code == 200

        def value(script: str) -> Any:
            return call("Runtime.evaluate", expression=script)["result"].get("value")

        call(
            "Emulation.setDeviceMetricsOverride",
            width=900,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        call("Page.navigate", url=address + query)
        until(lambda: value("typeof answer === 'object' && !answer.hidden"), seconds=20)
        assert "Alien (i1)" in value("items.innerText")
        why = "{vote: 0.8, neighbour_count: 30, item_rate: 0.881, item_count: 311, user_count: 0}"
        said = "80 % of 30 similar users liked it; 88 % of all 311 liked it"
        assert value(f"reasons({why}).join('; ')") == said
        assert value("reasons({item_count: 0}).join()") == "nobody has rated it"
        short = "[...document.querySelectorAll('#history td:not(:first-child), th')]"
        assert value(f"{short}.filter(cell => cell.getClientRects().length).length") == 9
        # the text of a cell takes one line
        lines = "(r => (r.selectNodeContents(cell), new Set([...r.getClientRects()].map(b => b.top)).size))"
        assert (
            value(f"Math.max(...{short}.map(cell => {lines}(document.createRange())))") == 1
        )
        assert value("document.documentElement.scrollWidth") <= 900
