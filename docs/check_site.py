"""Opens pages in headless Chromium, at desktop and phone width, light and dark, and says what is wrong with them.

Run by hand, after `make docs`, with Debian's chromium installed; no test runs it.

    python docs/check_site.py                                  # the site
    python docs/check_site.py natgrad-demo/report.html         # any page, or folder of pages

Of every page it looks for formulas that are not rendered, a page wider than its window, errors in the console, requests
that fail, and requests to another host; of a site also whether its search finds something, from a server and from a
file. Screenshots go to `--shots`, to be looked at.
"""

import argparse
import base64
import fcntl
import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
MOST_PIXELS = 6000
WITHIN = ("data:", "blob:", "about:")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
RENDERED = "window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true"
FINDINGS = """(() => {
    const found = [], wide = document.documentElement.clientWidth;
    for (const e of document.querySelectorAll(".arithmatex"))
        if (!e.querySelector("mjx-container")) found.push("formula not rendered: " + e.textContent.slice(0, 60));
    for (const e of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
        found.push("formula with an error: " + e.textContent.slice(0, 60));
    if (document.documentElement.scrollWidth > wide) {
        found.push(`page ${document.documentElement.scrollWidth} wide in a window of ${wide}`);
        const scrolls = (e) =>
            e !== document.body && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
        for (const e of document.body.querySelectorAll("*"))
            if (e.getBoundingClientRect().right > wide + 1 && !scrolls(e.parentElement))
                found.push(`  <${e.tagName.toLowerCase()}> ${e.textContent.trim().slice(0, 60)}`);
    }
    for (const e of document.images)
        if (e.complete && !e.naturalWidth) found.push("image not shown: " + e.src);
    if (!document.querySelector("meta[name=viewport]")) found.push("no viewport: a phone shows it as a desktop does");
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode, raw = text.data.match(/\\\\\\(|\\\\[a-z]{3,}|```|\\$[^$ ][^$]*\\$/);
        if (raw && !text.parentElement.closest("pre, code, script, style"))
            found.push("markup in the text: " + raw[0].slice(0, 60));
    }
    return found.slice(0, 8);
})()"""
SEARCH = """new Promise((resolve) => {
    const query = document.querySelector("[data-md-component=search-query]");
    query.focus();
    query.value = "covariance";
    query.dispatchEvent(new Event("keyup"));
    query.dispatchEvent(new Event("input"));
    const started = Date.now(), look = () => {
        const found = document.querySelectorAll(".md-search-result__item").length;
        if (found || Date.now() - started > 10000) resolve(found); else setTimeout(look, 100);
    };
    look();
})"""


class Browser:
    """Chromium by its debugging protocol, over a pair of pipes."""

    def __init__(self, program: str, profile: str):
        here, self._write = os.pipe()
        self._read, there = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (here, there)]

        def connect() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, preexec_fn=connect, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        for end in (here, there, *ends):
            os.close(end)
        self._count, self._rest, self.events = 0, b"", list[dict[str, Any]]()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        """What a command returns; events that come meanwhile join `events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def wait(self, event: str) -> None:
        while not any(e["method"] == event for e in self.events):
            self._next()

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "the page raised"))
        return answer["result"].get("value")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def close(self) -> None:
        self.send("Browser.close")
        self._process.wait()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/favicon.ico":  # which a browser asks for by itself
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of a folder, on this machine alone."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def opened(browser: Browser, address: str, width: int, scheme: str) -> None:
    browser.events.clear()
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.send("Page.navigate", url=address)
    browser.wait("Page.loadEventFired")
    browser.evaluate("document.fonts.ready.then(() => true)")
    browser.evaluate(RENDERED)


def complaints(browser: Browser, home: str) -> list[str]:
    """What is wrong with the page that is open."""
    found = list(browser.evaluate(FINDINGS))
    for event in browser.events:
        its = event["params"]
        match event["method"]:
            case "Network.requestWillBeSent" if not its["request"]["url"].startswith(
                (home, "data:", "blob:", "about:")
            ):
                found.append(f"request to another host: {its['request']['url']}")
            case "Network.responseReceived" if its["response"]["status"] >= 400:
                found.append(f"{its['response']['status']}: {its['response']['url']}")
            case "Network.loadingFailed" if not its.get("canceled"):
                found.append(f"failed to load: {its['errorText']}")
            case "Runtime.exceptionThrown":
                found.append(f"error: {its['exceptionDetails'].get('exception', {}).get('description', '')[:200]}")
            case "Runtime.consoleAPICalled" if its["type"] in ("error", "warning", "assert"):
                found.append(f"console: {[a.get('value', a.get('description')) for a in its['args']]}")
            case "Log.entryAdded" if its["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {its['entry']['text']} {its['entry'].get('url', '')}")
    return found


def shoot(browser: Browser, path: Path, width: int) -> None:
    height = min(browser.evaluate("document.documentElement.scrollHeight"), MOST_PIXELS)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    image = browser.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    path.write_bytes(base64.b64decode(image["data"]))


def check(browser: Browser, target: Path, shots: Path) -> int:
    """The number of pages with something wrong, of a file or a folder."""
    folder = target if target.is_dir() else target.parent
    pages = sorted(p for p in folder.rglob("*.html") if p.name != "404.html") if target.is_dir() else [target]
    wrong = 0
    with served(folder.resolve()) as home:
        for page in pages:
            name = page.relative_to(folder).as_posix()
            for size, width in WIDTHS.items():
                for scheme in SCHEMES:
                    opened(browser, home + name, width, scheme)
                    found = complaints(browser, home)
                    shoot(browser, shots / f"{name.replace('/', '-').removesuffix('.html')}-{size}-{scheme}.png", width)
                    wrong += bool(found)
                    for line in found:
                        print(f"{name}, {size}, {scheme}: {line}")
        if (folder / "search").is_dir():
            for address in (f"{home}index.html", f"{(folder / 'index.html').resolve().as_uri()}"):
                opened(browser, address, WIDTHS["desktop"], "light")
                results = browser.evaluate(SEARCH)
                print(f"search from {address.partition(':')[0]}: {results} pages")
                wrong += not results
    print(f"{target}: {len(pages)} pages, opened {len(pages) * len(WIDTHS) * len(SCHEMES)} times, {wrong} with faults")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", type=Path, default=[Path("site")], help="pages, or folders of pages")
    parser.add_argument("--shots", type=Path, default=Path("site-shots"), help="folder for the screenshots")
    parser.add_argument("--chromium", default="chromium", help="the program")
    options = parser.parse_args()
    missing = [str(target) for target in options.targets if not target.exists()]
    if missing:
        parser.error(f"there is no {missing[0]}; build the site with `make docs`, or name a page that exists")
    options.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(options.chromium, profile)
        try:
            return int(sum(check(browser, target, options.shots) for target in options.targets) > 0)
        finally:
            browser.close()


if __name__ == "__main__":
    sys.exit(main())
