"""`pujax generate`: answers from a run, a Hugging Face directory or a GGUF file."""

import sys

from pujax.run.commands import command
from pujax.run.settings import GenerateConfig


def run(settings: GenerateConfig) -> None:
    """Print an answer to `prompt`, or one to each line of standard input."""
    from pujax.run.generator import Generator  # jax with it: --help does not need that

    prompts = [settings.prompt] if settings.prompt is not None else list(sys.stdin)
    conversations = []
    for prompt in prompts:
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        conversations.append([*system, {"role": "user", "content": prompt.rstrip("\n")}])
    for answer in Generator.load(settings.model or settings.run or "").answer(
        conversations,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
    ):
        print(answer.text)
        if not answer.finished:
            print(f"[cut at max_tokens={settings.max_tokens}]", file=sys.stderr)


main = command("generate", GenerateConfig, run, folder="tools")

if __name__ == "__main__":
    main()
