"""`python -m pujax.generate`: answers from a run, a Hugging Face directory or a GGUF file."""

import sys

import hydra
from omegaconf import DictConfig

from pujax.errors import ConfigError
from pujax.run.compose import conf_dir, from_hydra, register
from pujax.run.settings import GenerateConfig

register("generate_schema", GenerateConfig)


@hydra.main(config_path=f"{conf_dir()}/tools", config_name="generate", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Print an answer to `prompt`, or one to each line of standard input."""
    from pujax.run.generator import Generator  # jax with it: --help does not need that

    try:
        settings = from_hydra(GenerateConfig, composed)
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
    except ConfigError as error:
        sys.exit(f"pujax.generate: {error}")


if __name__ == "__main__":
    main()
