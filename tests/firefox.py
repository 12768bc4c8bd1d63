"""Firefox as Debian ships it, headless, driven over WebDriver BiDi (https://w3c.github.io/webdriver-bidi)."""

import itertools
import json
import re
import shutil
import subprocess
import time

import websocket


class Firefox:
    """A browser with one page; use it in a `with` statement.

    Args:
        profile: an empty folder.
    """

    def __init__(self, profile):
        """Start it and wait until it listens."""
        command = [find(), "--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", "0"]
        log = profile / "log"
        with open(log, "w") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            address = _waited(lambda: re.search(r"WebDriver BiDi listening on (ws://\S+)", log.read_text()), 60)[1]
            self._connect(f"{address}/session")
        except BaseException:
            self._process.kill()
            raise

    def _connect(self, address):
        self._socket = websocket.create_connection(address, suppress_origin=True, timeout=60)
        self._numbers = itertools.count()
        self.said = []  # by the console and by scripts that fail
        self._send("session.new", capabilities={})
        self._send("session.subscribe", events=["log.entryAdded"])
        self._page = self._send("browsingContext.getTree")["contexts"][0]["context"]

    def __enter__(self):
        """Nothing more to do."""
        return self

    def __exit__(self, *_):
        """Stop it."""
        self._process.terminate()
        self._process.wait(30)
        self._socket.close()

    def open(self, address, size=(900, 700)):
        """Load a page and wait until all of it is there."""
        self.said.clear()
        self._send("browsingContext.setViewport", viewport={"width": size[0], "height": size[1]})
        self._send("browsingContext.navigate", url=address, wait="complete")

    def evaluate(self, expression):
        """The value of a JavaScript expression, or of the promise that it is."""
        wrapped = f"(async () => JSON.stringify(await ({expression})))()"
        result = self._send("script.evaluate", expression=wrapped, target={"context": self._page}, awaitPromise=True)
        assert result["type"] == "success", result
        return json.loads(result["result"].get("value", "null"))

    def wait_for(self, expression, seconds=30):
        """Wait until an expression is true."""
        _waited(lambda: self.evaluate(f"Boolean({expression})"), seconds)

    def point(self, *path, kind="mouse"):
        """Press at the first point, move along the others, and let go; pixels of the window."""
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y)} for x, y in path]
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        source = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}}
        self._act(source | {"actions": [moves[0], down, *moves[1:], up]})

    def press(self, key):
        """Press a key: a character, or WebDriver's code of a key without one."""
        self._act({"type": "key", "id": "keys", "actions": [{"type": f"key{x}", "value": key} for x in ("Down", "Up")]})

    def _act(self, source):
        self._send("input.performActions", context=self._page, actions=[source])

    def _send(self, method, **parameters):
        if (
            "context" not in parameters
            and method.startswith("browsingContext.")
            and method != "browsingContext.getTree"
        ):
            parameters["context"] = self._page
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            heard = json.loads(self._socket.recv())
            if heard.get("method") == "log.entryAdded":
                self.said.append(f"{heard['params']['level']}: {heard['params']['text']}")
            if heard.get("id") == number:
                assert heard["type"] == "success", heard
                return heard["result"]


def find():
    """Where Firefox is, or None."""
    return next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)


def _waited(found, seconds):
    """What a function gives, once that is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(0.05)
    return value
