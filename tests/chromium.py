"""A headless Chromium for tests and benchmarks, spoken to in its DevTools protocol over a pair of pipes.

Only the standard library: pipes in place of a web socket leave no port open and need no package. One page at a time.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT_S = 60
# Without a sandbox: containers and CI often run as root, and the pages are our own. No first-run or update traffic.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe")


def find_chromium() -> str | None:
    """The browser's program; None where it is missing."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class PageError(Exception):
    """A script on the page raised, or the browser refused a command."""


class Chromium:
    """One browser with one blank page, closed on leaving the ``with`` block.

    Attributes:
        requests: addresses of everything that the page asked for, its own file first.
        errors: console errors, uncaught exceptions and what the page's policy refused, as text.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-of-tests-", ignore_cleanup_errors=True)
        self._last_id, self._session, self._events, self._unread = 0, "", [], b""
        self._start()
        try:
            self._open_page()
        except PageError:
            self.close()
            raise

    def _start(self) -> None:
        # The browser reads commands from its file 3 and answers on its file 4.
        commands_out, self._commands = os.pipe()
        self._answers, answers_in = os.pipe()
        program = [find_chromium(), *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        # bash, as sh knows no file numbers above 9.
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{commands_out} 4>&{answers_in}', *program]
        files = (commands_out, answers_in)
        self._process = subprocess.Popen(shell, pass_fds=files, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in files:
            os.close(number)

    def _open_page(self) -> None:
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser, whatever state it is in."""
        self._process.terminate()
        try:
            self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        os.close(self._commands)
        self._profile.cleanup()

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            PageError: the browser refused it, says nothing for ``TIMEOUT_S`` seconds, or is gone.
        """
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _write(self, message: bytes) -> None:
        while message:
            if not select.select([], [self._commands], [], TIMEOUT_S)[1]:
                raise PageError(f"the browser reads no command for {TIMEOUT_S} s")
            # No more than a pipe that can be written to takes without waiting.
            try:
                message = message[os.write(self._commands, message[: select.PIPE_BUF]) :]
            except BrokenPipeError:
                raise PageError("the browser ended") from None

    def _read(self) -> dict[str, Any]:
        """The next message; events are noted on the way."""
        while b"\0" not in self._unread:
            if not select.select([self._answers], [], [], TIMEOUT_S)[0]:
                raise PageError(f"the browser says nothing for {TIMEOUT_S} s")
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise PageError("the browser ended")
            self._unread += part
        text, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(text)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
            self.errors.append(json.dumps(parameters["args"]))
        elif method:
            self._events.append(method)

    def offline(self) -> None:
        """Take the network away from the page."""
        nothing = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.command("Network.emulateNetworkConditions", offline=True, **nothing)

    def window(self, width: int, height: int, *, dark: bool = False) -> None:
        """Size of the page in CSS pixels, and the person's colour scheme."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path, fragment: str = "") -> None:
        """Open a file from disk and wait until it is loaded."""
        # Via a blank page: one that differs in its fragment alone would not be loaded again.
        self._navigate("about:blank")
        self.requests.clear()
        self.errors.clear()
        self._navigate(path.resolve().as_uri() + fragment)

    def _navigate(self, address: str) -> None:
        self._events.clear()
        self.command("Page.navigate", url=address)
        while "Page.loadEventFired" not in self._events:
            self._read()

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression on the page, as JSON gives it; promises are waited for.

        Raises:
            PageError: it raised.
        """
        asked = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self.command("Runtime.evaluate", **asked)
        if "exceptionDetails" in answer:
            raise PageError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key on what has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save what is seen, or the whole page, as PNG."""
        import base64

        image = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(image))
