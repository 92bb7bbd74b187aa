"""Serve a GGUF file as an OpenAI-compatible endpoint on 127.0.0.1, until SIGTERM or SIGINT.

python experiments/quickstart/serve_teacher.py MODEL.gguf [--port 8080] [--parallel 4]
"""

import argparse
import os
import signal
from pathlib import Path

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--port", type=int, default=8080, help="0 picks a free one")
    parser.add_argument("--parallel", type=int, default=4, help="requests answered at a time")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not options.gguf.is_file():
        parser.error(f"no file {options.gguf}")
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # the server's threads inherit the mask
    settings = xllamacpp.CommonParams()
    settings.model.path = str(options.gguf)
    settings.model_alias = {options.gguf.name}  # what answers name: not the file's whole path
    settings.port = options.port
    settings.n_parallel = options.parallel
    settings.n_ctx = 1024 * options.parallel  # shared by the requests in flight
    settings.cpuparams.n_threads = options.threads
    server = xllamacpp.Server(settings)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait(stops)
    os._exit(0)  # the library's own shutdown waits for ever when a request is in flight


if __name__ == "__main__":
    main()
