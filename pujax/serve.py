"""`pujax serve`: a run's model, or any other, behind OpenAI's API, by llama.cpp."""

import sys
from dataclasses import dataclass
from shlex import quote
from typing import Any

from pujax.config.commands import command, one_source
from pujax.errors import require
from pujax.files.locate import soft_prompt_file
from pujax.inference.finished import require_kind, source_of, users_of


@dataclass(frozen=True)
class ServeConfig:
    """Everything `python -m pujax.serve` is told.

    Attributes:
        run: a run's directory, or a folder of runs: its newest finished one; or
        model: a hub id, a Hugging Face directory, a GGUF file, package://NAME/FILE.
        soft_prompt: a file of `pujax adapt`, which leads each conversation, or a list of them, of
            which each request chooses one by name.
        host: the address to listen on; 0.0.0.0 is every one of this machine, for anyone.
        port: to listen on; 0 picks a free one.
        kind: how the exported file stores matrices: F16, Q8_0, Q4_1 or Q4_0.
        parallel: requests that are answered at a time.
        context: prompt and answer of a request, in tokens; llama.cpp rounds it up.
        threads: of the processor; null is llama.cpp's own choice.
    """

    run: str | None = None
    model: str | None = None
    soft_prompt: Any = None
    host: str = "127.0.0.1"
    port: int = 8080
    kind: str = "Q8_0"
    parallel: int = 4
    context: int = 2048
    threads: int | None = None

    def __post_init__(self) -> None:
        one_source(self.run, self.model)
        require(self.host.strip() != "", "host", self.host, "give an address; 0.0.0.0 is every one")
        require(0 <= self.port < 2**16, "port", self.port, "must lie in [0, 65536)")
        require_kind(self.kind)
        for key in ("parallel", "context"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be positive")
        many = self.threads is None or self.threads > 0
        require(many, "threads", self.threads, "must be positive, or null")
        users_of(self.soft_prompt)


def run(settings: ServeConfig) -> None:
    """Serve as told, until Ctrl-C, SIGTERM or a closed terminal."""
    from pujax.inference.serving import require_free, require_server, serve, to_serve

    require_server()
    source_of(settings.run, settings.model)
    require_free(settings.host, settings.port)
    users = users_of(settings.soft_prompt)
    for path in users.values():
        soft_prompt_file(path)

    def say(text: str) -> None:
        print(f"pujax.serve: {text}", file=sys.stderr, flush=True)

    served = to_serve(settings.run, settings.model, kind=settings.kind, say=say, users=users)

    def ready(address: str) -> None:
        print(f"{served.name} is served at {address}/v1 until Ctrl-C. Ask it, as:")
        print(
            f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json' "
            '-d \'{"messages": [{"role": "user", "content": "Hello"}]}\''
        )
        print(
            f"  pujax collect teacher=llamacpp teacher.base_url={address}/v1 "
            f"{quote(f'teacher.model={served.name}')} ..."
        )
        if len(users) > 1:
            print(
                f"For one of its users ({', '.join(users)}) a request has "
                f'"chat_template_kwargs": {{"soft_prompt": "{next(iter(users))}"}} beside '
                '"messages"'
            )

    serve(
        served,
        host=settings.host,
        port=settings.port,
        parallel=settings.parallel,
        context=settings.context,
        threads=settings.threads,
        ready=ready,
    )


main = command("serve", ServeConfig, run, folder="tools")

if __name__ == "__main__":
    main()
