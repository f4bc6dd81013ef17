"""Opening and scrolling of the report site with as many rows as real runs have, in a headless Chromium.

    python benchmarks/bench_site.py
    python benchmarks/bench_site.py --runs 3 --questions 1319 --prompts 240 --json

The rows are made up (``tests/made_up.py``), their texts as long as those of real runs. The plain way, drawing every row
at once, is timed on the same page beside ours. The network is off; each time is the median of several openings.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT_ROOT), str(PROJECT_ROOT / "tests")]

from chromium import Chromium, find_chromium  # noqa: E402
from made_up import make_results  # noqa: E402

from lib.reports import site  # noqa: E402

# Mean lengths of GSM8K: about 46 words a question, twice that an answer.
WORDS = 46
# From the start of the navigation until the list is drawn and its filters answer, in ms.
READY = "performance.getEntriesByName('rows-ready')[0].startTime"
FRAMES = """(async () => {
  const grid = document.getElementById('grid'), times = [];
  let last = await new Promise(requestAnimationFrame);
  for (let step = 0; step < 120; step++) {
    grid.scrollTop += 700;
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  return times;
})()"""
FILTER = """(() => {
  const control = document.getElementById('outcome'), begun = performance.now();
  control.value = 'wrong';
  control.dispatchEvent(new Event('input', {bubbles: true}));
  document.getElementById('grid').getBoundingClientRect();
  return performance.now() - begun;
})()"""
# What a list without a window would do: an element a row, all at once, for every run.
PLAIN = """(() => {
  const data = JSON.parse(document.getElementById('data').textContent), begun = performance.now();
  const list = document.createElement('div');
  for (const axis of Object.values(data.axes))
    for (const rows of axis.rows)
      for (const row of rows) {
        const line = document.createElement('div'), item = axis.items[row.item];
        for (const text of [item.id, item.question || item.hazard, row.outcome, row.text]) {
          const cell = document.createElement('span');
          cell.textContent = text;
          line.append(cell);
        }
        list.append(line);
      }
  document.body.append(list);
  list.getBoundingClientRect();
  return performance.now() - begun;
})()"""


def measure(page: Path, num_openings: int) -> dict[str, float]:
    """Milliseconds, medians over ``num_openings``."""
    found: dict[str, list[float]] = {name: [] for name in ("ready_ms", "filter_ms", "frame_p95_ms", "plain_ms")}
    with Chromium() as browser:
        browser.offline()
        browser.window(1280, 900)
        for _ in range(num_openings):
            browser.open(page)
            found["ready_ms"].append(browser.run(READY))
            found["frame_p95_ms"].append(statistics.quantiles(browser.run(FRAMES), n=20)[-1])
            found["filter_ms"].append(browser.run(FILTER))
            found["plain_ms"].append(browser.run(PLAIN))
            if browser.errors:
                raise SystemExit(f"the page has errors: {browser.errors}")
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the site over made-up runs and measure it."""
    with tempfile.TemporaryDirectory(prefix="bench-site-") as folder:
        names = [f"run_{number}" for number in range(args.runs)]
        make_results(Path(folder), names, questions=args.questions, prompts=args.prompts, words=WORDS)
        started = time.perf_counter()
        page = site.write_site(folder, Path(folder) / "reports")
        write_s = round(time.perf_counter() - started, 2)
        size_mb = round(page.stat().st_size / 1e6, 1)
        times = measure(page, args.openings)
    num_rows = (args.runs + 1) * (args.questions + args.prompts)
    return {"num_rows": num_rows, "size_mb": size_mb, "write_s": write_s, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs beside the untuned model")
    parser.add_argument("--questions", type=int, default=1319)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--openings", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    if not find_chromium():
        raise SystemExit("no chromium on this machine")
    version = subprocess.run([find_chromium(), "--version"], capture_output=True, text=True).stdout.strip()
    measured = {**run(args), "browser": version, "machine": platform.processor() or platform.machine()}
    if args.json:
        print(json.dumps(measured))
        return
    print(
        f"{measured['num_rows']:,} rows, {measured['size_mb']} MB, written in {measured['write_s']} s ({version})\n"
        f"interactive after {measured['ready_ms']:.0f} ms; a filter {measured['filter_ms']:.0f} ms; "
        f"95 % of frames while scrolling within {measured['frame_p95_ms']:.0f} ms\n"
        f"drawing every row at once instead: {measured['plain_ms']:.0f} ms more before the first answer"
    )


if __name__ == "__main__":
    main()
