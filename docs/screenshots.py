"""`make screenshots`: the pictures of docs/, by headless Chromium from the study of `make demo`.

`python docs/screenshots.py STUDY` takes them of another one. They are the study's page and its own
run in MLflow, and the report at 1280 and at 390 pixels.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

DOCS = Path(__file__).parent
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "about:blank"),
)
_START_S = 60.0
_COLOURS = 96  # of a picture: text stays sharp, and the file small


class Browser:
    """One page of one Chromium, by its DevTools protocol."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse):
        self._session, self._socket, self._last = session, socket, 0

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    async def picture(self, url: str, width: int, height: int, wait_s: float, ready: str) -> bytes:
        """A PNG once the JavaScript expression `ready` is true, at the latest after `wait_s`."""
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        await self.ask("Page.navigate", url=url)
        for _ in range(int(wait_s)):
            await asyncio.sleep(1.0)
            seen = await self.ask("Runtime.evaluate", expression=ready, returnByValue=True)
            if seen["result"].get("value") is True:
                break
        else:
            raise RuntimeError(f"{url}: not drawn after {wait_s:.0f} s")
        await asyncio.sleep(3.0)  # the page animates its charts
        shot = await self.ask("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])


async def main(study: str, out: Path) -> None:
    links = json.loads(_maskray("ui", study, "--json"))
    report = Path(json.loads(_maskray("report", study, "--json"))["report"]).absolute()
    parent = json.loads(_maskray("ui", study, "--parent", "--json"))["page"]
    drawn = "document.readyState === 'complete' && document.body.innerText.length > 400"
    runs = f"{drawn} && document.querySelectorAll('canvas, .js-plotly-plot, [role=row]').length > 4"
    with tempfile.TemporaryDirectory() as profile:
        process, address = _browser(profile)
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(address, max_msg_size=0) as socket,
            ):
                browser = Browser(session, socket)
                for name, url, width, height, ready in (
                    ("mlflow-study", links["page"], 1400, 640, runs),
                    ("mlflow-parent", parent, 1400, 900, drawn),
                    ("report-wide", report.as_uri(), 1280, 1500, drawn),
                    ("report-narrow", report.as_uri(), 390, 1500, drawn),
                ):
                    data = await browser.picture(url, width, height, 90, ready)
                    _save(data, out / f"{name}.png")
                    print(out / f"{name}.png")
        finally:
            process.terminate()
            process.wait(10)


def _browser(profile: str) -> tuple[subprocess.Popen[str], str]:
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if program is None:
        raise RuntimeError(f"no browser: install one of {', '.join(_BROWSERS)}")
    process = subprocess.Popen(
        [program, f"--user-data-dir={profile}", *_FLAGS],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "DevTools listening on" in line:
            port = line.rsplit(":", 1)[1].split("/")[0]
            break
    else:
        raise RuntimeError(f"{program}: ended without a word on its address")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=_START_S) as answer:
        pages = json.load(answer)
    return process, next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")


def _maskray(*words: str) -> str:
    command = [sys.executable, "-m", "orchestrator", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _save(data: bytes, path: Path) -> None:
    image = Image.open(io.BytesIO(data)).convert("RGB").quantize(_COLOURS)
    image.save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", default="last")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    asyncio.run(main(options.study, options.out))
