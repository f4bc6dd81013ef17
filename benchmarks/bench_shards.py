"""What planning and joining cost beside the work itself: seconds and memory, no model.

    python benchmarks/bench_shards.py --rows 12000 --shares 100 --seeds 5

Freezes the tasks of ``--seeds`` runs of a preset in ``--shares`` shares, reads them again, looks at all of them as the
engines do twice a second, and joins the shares of one row file of ``--rows`` made-up responses.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT))
from lib.driver.cli import build_parser
from lib.driver.plan import make_plans
from lib.driver.tasks import freeze, make_tasks, read_tasks
from lib.evaluate.sides import Sides
from lib.record.paths import run_paths
from lib.record.rows import fill_rows, write_jsonl
from lib.record.shards import close_share


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - started:.2f} s, {peak_gib:.2f} GiB at most so far")


def never(*_: object) -> None:
    raise SystemExit("a row that a share holds was asked for again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--shares", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="words of a response")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [str(seed) for seed in range(arguments.seeds)]
        argv = ["--presets", "simple", "--seeds", *seeds, "--shards", str(arguments.shares), "--output-dir", folder]
        with timed("planning"):
            plans = make_plans(build_parser().parse_args(argv))
            wanted = make_tasks(plans, arguments.shares)
            frozen, _ = freeze(Path(folder), plans, wanted, "python run_all.py", never)
            tasks = read_tasks(frozen.folder)
        with timed(f"looking at {len(tasks.all)} tasks once"):
            tasks.ready(tasks.states(), set())
        rows = [{"id": place, "prompt": f"prompt {place}"} for place in range(arguments.rows)]
        paths, protocol = run_paths(folder, "one"), {"adapter": ["a"]}
        for index in range(1, arguments.shares + 1):
            part = f"tuned {index}-of-{arguments.shares}"
            _, share, log = Sides(paths, "04", "ailuminate_preds", protocol, part).share(rows)
            made = [
                {**row, "response": "word " * arguments.tokens, "protocol_hash": log.protocol_hash} for row in share
            ]
            write_jsonl(log.path, made)
            close_share(log.path)
        with timed(f"joining {arguments.rows} rows of {arguments.shares} shares"):
            log = Sides(paths, "04", "ailuminate_preds", protocol).log()
            joined = fill_rows(log, rows, never, never)
        print(f"{len(joined)} rows, {log.path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
