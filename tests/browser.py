"""A real browser: Debian's chromium, driven by its own chromedriver."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import httpx

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1100,760",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the WebDriver standard gives to element ids


class Browser:
    """As much of the WebDriver protocol as the tests need."""

    def __init__(self, address: str, profile):
        self.http = httpx.Client(base_url=address, timeout=None)
        capabilities = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.session = self._post("/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def _post(self, path, body):
        answer = self.http.post(path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def do(self, path, **body):
        return self._post(f"/session/{self.session}/{path}", body)

    def open(self, url):
        self.do("url", url=url)

    def script(self, code):
        return self.do("execute/sync", script=f"return {code}", args=[])

    def find(self, css):
        return self.do("element", using="css selector", value=css)[ELEMENT]

    def click(self, css):
        self.do(f"element/{self.find(css)}/click")

    def type(self, css, text):
        self.do(f"element/{self.find(css)}/value", text=text)

    def until(self, condition):
        while not (value := self.script(condition)):
            time.sleep(0.05)
        return value

    def log(self):
        return [entry["message"] for entry in self.do("se/log", type="browser")]

    def picture(self, file):
        file.write_bytes(base64.b64decode(self.http.get(f"/session/{self.session}/screenshot").json()["value"]))

    def close(self):
        self.http.delete(f"/session/{self.session}")


@contextmanager
def driver_process():
    """The address of a running chromedriver."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            if httpx.get(f"{address}/status", timeout=None).json()["value"]["ready"]:
                break
        except httpx.TransportError:
            time.sleep(0.05)
    yield address
    process.terminate()
    process.wait()
