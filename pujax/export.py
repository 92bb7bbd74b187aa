"""`pujax export`: a run or a model as a Hugging Face directory, GGUF or PEFT adapter."""

from pujax.run.commands import command
from pujax.run.settings import ExportConfig


def run(settings: ExportConfig) -> None:
    """Export as told, and print where to."""
    from pujax.run.finished import export

    print(export(settings))


# In a folder of its own, where `model` is a key and not the group of conf/model/.
main = command("export", ExportConfig, run, folder="tools")

if __name__ == "__main__":
    main()
