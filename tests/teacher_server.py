"""A teacher to test against: the chat-completions protocol over raw asyncio, with faults.

In a process of its own: `python tests/teacher_server.py --latency 0.05 --faults 0.3` prints its
port. GET /stats tells what it has seen.
"""

import argparse
import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FAULTS = (
    "429", "500", "503", "408", "reset", "half", "junk", "shape", "stall", "trickle", "slow",
)  # fmt: skip


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return self.body["messages"][-1]["content"]


Reply = tuple[int, dict[str, str], Any]


def completion(text: str | None, **message: Any) -> dict[str, Any]:
    """A chat completion; every one has the same id, as some servers send."""
    finish_reason = message.pop("finish_reason", "stop")
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "served-model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def echo(request: Request) -> Reply:
    return 200, {}, completion(f"answer to {request.prompt}")


@dataclass
class TeacherServer:
    """`reply` answers; before it, `faults` is the share of requests that go wrong on purpose.

    `delivered` counts the whole answers by prompt: what a provider would charge for.
    """

    reply: Callable[[Request], Reply] = echo
    latency: float = 0.0
    faults: float = 0.0
    stall: float = 3.0
    seed: int = 0
    faults_drawn: tuple[str, ...] = FAULTS
    keep: bool = True
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    seen: int = 0
    connections: int = 0
    busy: int = 0
    most_busy: int = 0
    delivered: Counter[str] = field(default_factory=Counter)
    faulted: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    # --- in a thread of the test's process ---

    def __enter__(self) -> "TeacherServer":
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=[self._run(ready)]
        )
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    async def _run(self, ready: threading.Event) -> None:
        self._ended = asyncio.Event()
        server = await asyncio.start_server(self.handle, "127.0.0.1", self.port, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._ended.wait()
        server.close()
        here = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not here]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the protocol ---

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection may be used again."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        if path == "/stats":
            await self._send(writer, 200, {}, self.stats())
            return True
        request = Request(method, path, headers, json.loads(raw))
        self.seen += 1
        if self.keep:
            self.requests.append(request)
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            if self.latency:
                await asyncio.sleep(self.latency)
            status, more, body = self.reply(request)
            if self._random.random() < self.faults:
                fault = self._random.choice(self.faults_drawn)
                self.faulted[fault] += 1
                return await self._fault(fault, writer, body, request)
            self.delivered[request.prompt] += status == 200
            await self._send(writer, status, more, body)
            return True
        finally:
            self.busy -= 1

    async def _fault(
        self, fault: str, writer: asyncio.StreamWriter, body: Any, request: Request
    ) -> bool:
        if fault.isdigit():
            wait = {"retry-after": "0.05"} if fault == "429" else {}
            error = {"error": {"message": f"fault {fault}", "code": None}}
            await self._send(writer, int(fault), wait, error)
            return True
        if fault == "junk":
            await self._send(writer, 200, {}, b"<html>not JSON</html>")
            return True
        if fault == "shape":
            await self._send(writer, 200, {}, {"id": "chatcmpl-1", "choices": []})
            return True
        data = json.dumps(body).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data)
        if fault == "reset":
            writer.transport.abort()
        elif fault == "half":
            writer.write(head + data[: len(data) // 2])
            await writer.drain()
        elif fault == "stall":
            await asyncio.sleep(self.stall)
        elif fault == "trickle":  # bytes keep coming, but never the last: only a deadline ends it
            writer.write(head)
            for start in range(min(len(data) - 1, int(self.stall / 0.1))):
                writer.write(data[start : start + 1])
                await writer.drain()
                await asyncio.sleep(0.1)
        else:  # slow, but whole
            writer.write(head)
            for start in range(0, len(data), 64):
                self.delivered[request.prompt] += start + 64 >= len(data)
                writer.write(data[start : start + 64])
                await writer.drain()
                await asyncio.sleep(0.01)
            return True
        return False

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, headers: dict[str, str], body: Any
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} Said", f"content-length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        await writer.drain()

    def stats(self) -> dict[str, Any]:
        return {
            "requests": self.seen,
            "connections": self.connections,
            "most_busy": self.most_busy,
            "delivered": self.delivered.total(),
            "prompts": len(self.delivered),
            "more_than_once": sum(count > 1 for count in self.delivered.values()),
            "faulted": dict(self.faulted),
        }


async def serve(teacher: TeacherServer) -> None:
    server = await asyncio.start_server(teacher.handle, "127.0.0.1", teacher.port, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    asyncio.run(serve(TeacherServer(keep=False, **vars(options))))
