"""A headless Chromium for tests, driven through its debugging protocol; there is none on most machines."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page. Every method waits until it is done; ``run`` is the loop of the calling test."""

    def __init__(self, folder: Path):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += [f"--user-data-dir={folder}", "--remote-debugging-port=0", "--window-size=1200,900"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(folder)},
        )
        self.folder, self.number = folder, 0
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._connect())

    async def _connect(self) -> None:
        file, until = self.folder / "DevToolsActivePort", time.monotonic() + 90
        while not (file.is_file() and file.read_text().count("\n")):
            assert time.monotonic() < until and self.process.poll() is None, "Chromium does not start"
            await asyncio.sleep(0.1)
        port = file.read_text().split()[0]
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(each for each in await answer.json() if each["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "DOM", "Network"):
            await self._call(f"{domain}.enable")

    async def _call(self, method: str, **parameters):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(timeout=120)).data)
            if message.get("method") == "Network.responseReceived" and message["params"]["type"] == "Document":
                self.status = message["params"]["response"]["status"]
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def call(self, method: str, **parameters):
        return self.loop.run_until_complete(self._call(method, **parameters))

    def evaluate(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def without_scripts(self) -> None:
        """Pages may run none from now on; ``evaluate`` still does."""
        self.call("Emulation.setScriptExecutionDisabled", value=True)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def wait(self, condition: str) -> None:
        until = time.monotonic() + 90
        while not self.evaluate(condition):
            assert time.monotonic() < until, condition
            time.sleep(0.1)

    def type(self, selector: str, text: str) -> None:
        """Clicks a field, replaces its content and presses Enter, as a person does."""
        self.click(selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **enter)
        self.call("Input.dispatchKeyEvent", type="keyUp", **enter)

    def click(self, selector: str) -> None:
        box = self.evaluate(
            f"(e => {{e.scrollIntoView({{block:'center'}}); const b = e.getBoundingClientRect(); "
            f"return [b.x + b.width / 2, b.y + b.height / 2]}})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        async def end():
            await self.socket.close()
            await self.session.close()

        self.loop.run_until_complete(end())
        self.loop.close()
        self.process.terminate()
        self.process.wait(30)
