"""Pictures of a report (or of an SVG) for the documentation, taken with headless Chromium.

    python benchmarks/screenshot_report.py report.html out.png [width] [dark] [height=PIXELS] [scale=2] [at=trial-12]

The whole page by default; ``at`` opens a candidate.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def chromium(url: str, folder: str, *options: str) -> str:
    """Runs headless Chromium on a page and returns what it printed."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("screenshots need Chromium: apt-get install chromium")
    done = subprocess.run(
        [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={folder}/profile", *options, url], capture_output=True, timeout=120, check=True)
    return done.stdout.decode(errors="replace")


def screenshot(page: Path, out: Path, width: int = 1280, dark: bool = False, height: int | None = None,
               scale: float = 1.0, at: str = "") -> None:
    """Writes a PNG of a page.

    Args:
        page: an HTML or SVG file.
        out: the picture.
        width: of the window; phones have about 390.
        dark: whether the reader prefers a dark page.
        height: of the window; None: as high as the page.
        scale: pixels of the picture per pixel of the page.
        at: the part of the address after ``#``.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Chromium's windows are at least 500 wide, so the page stands in a frame. The copy has a script that says how
        # high the page is, which the page's own content security policy would not let run.
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".svg":
            text = f'<!doctype html><meta name="color-scheme" content="light dark"><body style="margin:16px">{text}'
        text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
        copy, frame = Path(folder, "page.html"), Path(folder, "frame.html")
        copy.write_text(text + "<script>addEventListener('load', () => parent.postMessage("
                        "document.documentElement.getBoundingClientRect().height, '*'))</script>", encoding="utf-8")
        frame.write_text(
            '<meta name="color-scheme" content="light dark"><style>body{margin:0}iframe{border:0;display:block}</style>'
            "<script>addEventListener('message', (e) => document.body.dataset.height = Math.ceil(e.data))</script>"
            f'<iframe src="page.html{"#" + at if at else ""}" width="{width}" height="{height or 900}"></iframe>',
            encoding="utf-8")
        theme = ["--force-dark-mode"] if dark else []
        if height is None:
            found = re.search(r'data-height="(\d+)"', chromium(frame.as_uri(), folder, "--dump-dom",
                                                               "--virtual-time-budget=3000", *theme))
            height = int(found[1]) if found else 900
            frame.write_text(frame.read_text(encoding="utf-8").replace('height="900"', f'height="{height}"'),
                             encoding="utf-8")
        chromium(frame.as_uri(), folder, f"--screenshot={out.resolve()}", f"--window-size={width},{height}",
                 f"--force-device-scale-factor={scale:g}", "--virtual-time-budget=3000", *theme)


def main(arguments: list[str]) -> None:
    """Command line."""
    named = dict(a.split("=", 1) for a in arguments if "=" in a)
    words = [a for a in arguments if "=" not in a and a != "dark"]
    if len(words) not in (2, 3) or set(named) - {"height", "scale", "at"}:
        sys.exit(__doc__)
    screenshot(Path(words[0]), Path(words[1]), int(words[2]) if len(words) == 3 else 1280, "dark" in arguments,
               int(named["height"]) if "height" in named else None, float(named.get("scale", 1)), named.get("at", ""))


if __name__ == "__main__":
    main(sys.argv[1:])
