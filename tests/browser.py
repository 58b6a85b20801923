"""A headless Chromium that tests drive through pipes, by the Chrome DevTools Protocol."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from threading import Timer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


class Page:
    """A page from a file, in a browser of its own. Use it as a context manager.

    `requested` has the addresses of all that it asked for, `errors` what went wrong in it.
    """

    def __init__(self, file: Path, profile: Path, scripts: bool = True, width: int = 1280):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-background-networking", f"--user-data-dir={profile}",
                   "--remote-debugging-pipe"]  # fmt: skip
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'  # where Chromium expects them
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.deadline = Timer(120, self.process.kill)
        self.deadline.daemon = True
        self.deadline.start()
        self.received, self.asked, self.session = b"", 0, None
        self.requested: list[str] = []
        self.errors: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.resize(width)
        self.call("Page.navigate", url=file.as_uri())
        while not self.loaded:
            self._receive()

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.commands)  # on which Chromium ends
        self.process.wait()
        os.close(self.answers)
        self.deadline.cancel()

    def call(self, method: str, **parameters: object) -> dict:
        """The result of a method of the protocol."""
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.asked:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, expression: str) -> object:
        """What an expression in JavaScript gives, evaluated beside the page's own scripts."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press a key by its name and its number on Windows."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def resize(self, width: int, dark: bool = False) -> None:
        """Make the window so wide, in pixels of CSS, and the colours light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def _receive(self) -> dict:
        while b"\0" not in self.received:
            part = os.read(self.answers, 2**20)
            assert part, "Chromium has ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        message = json.loads(message)
        self.loaded |= message.get("method") == "Page.loadEventFired"
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.errors.append(json.dumps(message["params"]))
        return message
