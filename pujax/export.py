"""`python -m pujax.export`: a run or a model as a Hugging Face directory, GGUF or PEFT adapter."""

import sys

import hydra
from omegaconf import DictConfig

from pujax.errors import ConfigError
from pujax.run.compose import conf_dir, from_hydra, register
from pujax.run.settings import ExportConfig

register("export_schema", ExportConfig)


# In a folder of its own, where `model` is a key and not the group of conf/model/.
@hydra.main(config_path=f"{conf_dir()}/tools", config_name="export", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Export as told, and print where to."""
    try:
        settings = from_hydra(ExportConfig, composed)
        from pujax.run.finished import export

        print(export(settings))
    except ConfigError as error:
        sys.exit(f"pujax.export: {error}")


if __name__ == "__main__":
    main()
