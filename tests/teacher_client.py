"""How the tests of the teacher's room make prompts, settings, replies and collections."""

import asyncio

from pujax.records import Prompt
from pujax.teacher.anchors import collect
from pujax.teacher.endpoint import HttpTeacher
from pujax.teacher.settings import CollectConfig, TeacherConfig

KEY = "sk-very-secret"
TURN = {"role": "user", "content": "Hi"}


def user(*texts):
    return [Prompt(f"id-{text}", ({"role": "user", "content": text},)) for text in texts]


def many(count):
    return user(*(f"prompt {n}" for n in range(count)))


def at(server, **settings):
    return TeacherConfig(**{"base_url": server.url, "model": "m", "max_tokens": 8} | settings)


def run(prompts, server, store, said=None, teacher=None, **settings):
    settings = CollectConfig(**{"timeout": 60.0, "retries": 5} | settings)
    said = [] if said is None else said
    return collect(lambda: prompts, teacher or at(server), store, settings, say=said.append)


def ask(settings, messages=(TURN,), **protocol):
    async def once():
        async with HttpTeacher(settings, timeout=60.0, connections=1, **protocol) as http:
            return await http.ask(messages)

    return asyncio.run(once())


def replies(*bodies):
    """A server's replies in turn; the last goes on."""
    left = list(bodies)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def error(status, message="no", code=None, **headers):
    return status, headers, {"error": {"message": message, "code": code}}
