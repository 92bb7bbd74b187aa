"""How fast and in how much memory `python -m pujax.collect` asks a server with 50 ms of latency.

python experiments/collect_load/run.py 20000 100000 [--faults 0.33] >> results.md

Prints a table. The server is a process of its own, so the memory is the command's alone.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def measure(count: int, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    serve = [sys.executable, ROOT / "tests" / "teacher_server.py", "--latency", "0.05"]
    serve += ["--faults", str(options.faults)]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "prompts.jsonl").open("w") as prompts:
            for n in range(count):
                row = {"id": f"p{n}", "prompt": f"Prompt number {n}: " + "word " * 40}
                prompts.write(json.dumps(row) + "\n")
        start = time.perf_counter()
        collect = [sys.executable, "-m", "pujax.collect", "store=anchors.jsonl"]
        collect += ["data.prompts=prompts.jsonl", "teacher=generic", "teacher.model=m"]
        collect += [f"teacher.base_url=http://127.0.0.1:{port}/v1"]
        collect += [f"collect.concurrency={options.concurrency}"]
        collect += ["collect.timeout=10", "collect.retries=30"]
        running = subprocess.Popen(
            collect,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(running.pid, 0)
        seconds = time.perf_counter() - start
        stored = sum(1 for _ in (folder / "anchors.jsonl").open())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as reply:
        stats = json.load(reply)
    server.terminate()
    server.wait()
    if status or stored != count:
        raise SystemExit(f"the command ended with status {status}, {stored} of {count} stored")
    return [
        f"{count:,}",
        f"{options.faults:g}",
        f"{seconds:.1f}",
        f"{count / seconds:.0f}",
        f"{usage.ru_utime + usage.ru_stime:.1f}",
        f"{usage.ru_maxrss / 1024:.0f}",
        f"{stats['requests']:,}",
        f"{stats['delivered']:,}",
        f"{stats['more_than_once']:,}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--faults", type=float, default=0.0)
    options = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("httpx", "tenacity", "aiolimiter"))
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {packages}\n")
    titles = "prompts|fault rate|seconds|prompts/s|CPU seconds|peak MB|requests|delivered|twice"
    print(f"| {titles.replace('|', ' | ')} |")
    print("|---" * len(titles.split("|")) + "|")
    for count in options.counts:
        print("| " + " | ".join(measure(count, options)) + " |", flush=True)


if __name__ == "__main__":
    main()
