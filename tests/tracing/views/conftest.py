"""Captures made by hand, and a browser without a screen."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmir_iree.tracing.capture import (
    Call,
    Capture,
    CaptureManifest,
    DispatchRun,
    MachineInfo,
    Site,
    ZoneTotal,
    write_rows,
)

LAYERS = 22

# kind, shape of the result, bytes of the weight, time in µs, name of the weight in a layer.
_LAYER = (
    ("norm_quantize", "1x2048", 8_192, 4, None),
    ("quantized_matmul", "1x2560x2048", 2_949_120, 170, "attn_qkv"),
    ("rotary", "1x32x64", 16_384, 3, None),
    ("paged_attention", "1x32x64", 1_310_720, 90, None),
    ("quantized_matmul", "1x2048x2048", 2_359_296, 140, "attn_output"),
    ("norm_quantize", "1x2048", 8_192, 4, None),
    ("quantized_matmul", "1x11264x2048", 12_976_128, 690, "ffn_gate_up"),
    ("silu_quantize", "1x5632", 45_056, 8, None),
    ("quantized_matmul", "1x2048x5632", 6_488_064, 360, "ffn_down"),
)


def make_manifest(**changes: Any) -> CaptureManifest:
    values: dict[str, Any] = {
        "created": "2026-03-01T12:00:00Z",
        "subject": "bundles/tinyllama",
        "phase": "decode",
        "functions": ("decode",),
        "batch_size": 1,
        "context": 512,
        "processes": 2,
        "device": "local-task",
        "target": "llvm-cpu",
        "flags": ("--iree-llvmcpu-target-cpu=host",),
        "versions": {"iree-base-compiler": "3.13.0", "iree-base-runtime": "3.13.0"},
        "modules": {"decode.vmfb": "0" * 64},
        "machine": MachineInfo(cpu="A processor of two cores", cores=2, bandwidth_bytes_s=2.1e10, peak_macs_s=1.4e11),
        "sources": ("ireeprof", "ir"),
        "missing": {"tracy": "it was not asked for"},
    }
    return CaptureManifest(**{**values, **changes})


def layered_sites() -> list[Site]:
    """The dispatches of one decode step of a model with 22 layers."""
    sites = []

    def add(kind: str, shape: str, nbytes: int, layer: int | None, weight: str | None, ordinal: int) -> None:
        key = f"decode$async_dispatch_{ordinal}_{kind}_{shape}_i8xi8xf32"
        is_matmul = kind == "quantized_matmul"
        sites.append(
            Site(
                function="decode",
                site=len(sites),
                key=key,
                executable=f"decode$async_dispatch_{ordinal}",
                kind=kind,
                op=f"torch.operator llmir.{kind}",
                line=100 + len(sites),
                weight=weight,
                layer=layer,
                shape=shape,
                bytes_read=nbytes,
                bytes_written=8_192,
                flops=int(nbytes / 1.125) * 4 if is_matmul else nbytes,
            )
        )

    add("embedding", "1x2048", 2_048, None, "token_embd.weight", 0)
    for layer in range(LAYERS):
        for ordinal, (kind, shape, nbytes, _, weight) in enumerate(_LAYER, 1):
            add(kind, shape, nbytes, layer, weight and f"blk.{layer}.{weight}.weight", ordinal)
    add("quantized_matmul", "1x32000x2048", 36_864_000, None, "output.weight", 20)
    return sites


@pytest.fixture
def make_capture(tmp_path: Path) -> Callable[..., Capture]:
    """Writes a capture; by default that of a decode step with 22 layers, five calls in each of two processes."""

    def make(
        manifest: CaptureManifest | None = None,
        sites: Sequence[Site] | None = None,
        durations: Callable[[Site], int] | None = None,
        zones: Sequence[ZoneTotal] = (),
        name: str = "decode",
    ) -> Capture:
        manifest = manifest or make_manifest()
        rows = layered_sites() if sites is None else list(sites)
        times = {kind + shape: 1000 * microseconds for kind, shape, _, microseconds, _ in _LAYER}
        times |= {"embedding1x2048": 2_000, "quantized_matmul1x32000x2048": 1_900_000}
        calls, runs = [], []
        for process in range(manifest.processes):
            clock = 5_000_000
            for call in range(5):
                start = clock
                clock += 30_000
                for site in rows:
                    wobble = 1 + ((site.site * 7 + call * 3 + process) % 11) / 100
                    duration = durations(site) if durations else times[site.kind + (site.shape or "")]
                    duration = int(duration * wobble)
                    runs.append(
                        DispatchRun(
                            process=process,
                            call=call,
                            function=site.function,
                            site=site.site,
                            key=site.key,
                            start_ns=clock,
                            duration_ns=duration,
                            tile_ns=int(duration * 1.8),
                            tiles=32,
                            workgroups=(32, 1, 1),
                        )
                    )
                    clock += duration + 1_500
                wall = clock + 20_000 - start
                calls.append(
                    Call(process=process, call=call, function=manifest.functions[0], start_ns=start, wall_ns=wall)
                )
                clock += 400_000
        folder = tmp_path / f"{name}.llmtrace"
        folder.mkdir()
        for row, table in ((Call, calls), (DispatchRun, runs), (Site, rows), (ZoneTotal, list(zones))):
            write_rows(folder, row, table)
        return Capture.create(folder, manifest)

    return make


class Browser:
    """Chromium, driven through ChromeDriver by the commands of W3C's WebDriver."""

    _ELEMENT = "element-6066-11e4-a52e-4f735466cecf"

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        options = {
            "binary": shutil.which("chromium"),
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
            ],
        }
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{session['sessionId']}"
        self.command("POST", "/timeouts", {"script": 20_000, "pageLoad": 20_000})

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=40) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def command(self, method: str, path: str, body: Any = None) -> Any:
        return self._send(method, self._session + path, body)

    def devtools(self, name: str, **arguments: Any) -> None:
        self.command("POST", "/goog/cdp/execute", {"cmd": name, "params": arguments})

    def open(self, page: Path, scheme: str = "light", width: int = 1400, height: int = 900) -> None:
        """Open a file, as one who prefers dark or light; what was logged before is forgotten."""
        self.command("POST", "/url", {"url": "about:blank"})
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.logs("browser")
        self.logs("performance")
        self.command("POST", "/url", {"url": page.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of an async function in the page, and return what it returns."""
        body = f"(async (...args) => {{ {script} }})(...arguments).then(arguments[arguments.length - 1])"
        return self.command("POST", "/execute/async", {"script": body, "args": list(arguments)})

    def faint_texts(self) -> list[str]:
        """Visible texts with a contrast below 4.5, what WCAG asks of small ones, to the colour behind them."""
        checked, found = self.run(_FAINT_TEXTS)
        assert checked > 20
        return list(found)

    def wait(self, expression: str) -> None:
        """Wait until an expression of the page is true."""
        deadline = time.monotonic() + 10
        while not self.run(f"return Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.03)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, on what has the focus; "Shift+Tab" holds the first of two."""
        actions = []
        for key in keys:
            names = [key] if len(key) == 1 else key.split("+")
            codes = [_KEYS.get(name, name) for name in names]
            actions += [{"type": "keyDown", "value": code} for code in codes]
            actions += [{"type": "keyUp", "value": code} for code in reversed(codes)]
        self.command("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def logs(self, kind: str) -> list[dict[str, Any]]:
        return list(self.command("POST", "/se/log", {"type": kind}))

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened, itself included."""
        events = (json.loads(entry["message"])["message"] for entry in self.logs("performance"))
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.command("GET", "/screenshot")))

    def picture(self, file: Path, *selectors: str, margin: int = 16) -> None:
        """Take a picture of the smallest part of the page that holds all that is named, in view or not."""
        self.devtools("Emulation.setScrollbarsHidden", hidden=True)
        clip = self.run(
            "const boxes = args[0].map((selector) => document.querySelector(selector).getBoundingClientRect());"
            "const least = (values) => Math.min(...values), most = (values) => Math.max(...values);"
            "const [x, y] = [least(boxes.map((box) => box.left)), least(boxes.map((box) => box.top))];"
            "return { x: x + scrollX, y: y + scrollY, width: most(boxes.map((box) => box.right)) - x,"
            " height: most(boxes.map((box) => box.bottom)) - y };",
            list(selectors),
        )
        clip = {
            "x": max(clip["x"] - margin, 0),
            "y": max(clip["y"] - margin, 0),
            "width": clip["width"] + 2 * margin,
            "height": clip["height"] + 2 * margin,
            "scale": 1,
        }
        arguments = {"cmd": "Page.captureScreenshot", "params": {"clip": clip, "captureBeyondViewport": True}}
        file.write_bytes(base64.b64decode(self.command("POST", "/goog/cdp/execute", arguments)["data"]))

    def close(self) -> None:
        self.command("DELETE", "")


_FAINT_TEXTS = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => channels(colour).slice(0, 3).map((value) => value / 255)
  .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
  .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
const ratio = (one, two) => {
  const [low, high] = [luminance(one), luminance(two)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const behind = (element) => {
  // The only text that stands on a shape of its own colour follows it.
  if (element.classList.contains("on-bar")) return getComputedStyle(element.previousElementSibling).fill;
  for (let at = element; at; at = at.parentElement) {
    const colour = at instanceof SVGElement ? "rgba(0, 0, 0, 0)" : getComputedStyle(at).backgroundColor;
    if ((channels(colour)[3] ?? 1) > 0) return colour;
  }
};
const found = [];
const walker = document.createTreeWalker(document.getElementById("main"), NodeFilter.SHOW_TEXT);
let checked = 0;
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim();
  const element = walker.currentNode.parentElement;
  if (!text || element.tagName === "NOSCRIPT" || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const contrast = ratio(element instanceof SVGElement ? style.fill : style.color, behind(element));
  checked += 1;
  if (contrast < 4.5) found.push(`${text.slice(0, 40)}: ${contrast.toFixed(2)}`);
}
return [checked, found];
"""

_KEYS = {
    "Tab": "\ue004",
    "Enter": "\ue007",
    "Shift": "\ue008",
    "Escape": "\ue00c",
    "End": "\ue010",
    "Home": "\ue011",
    "Left": "\ue012",
    "Up": "\ue013",
    "Right": "\ue014",
    "Down": "\ue015",
}


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium without a screen; skips where it is not installed."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}", "--log-level=OFF"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "ChromeDriver does not listen"
            time.sleep(0.05)
        chromium = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("chromium"))
        try:
            yield chromium
        finally:
            chromium.close()
    finally:
        driver.terminate()
        driver.wait(timeout=20)
