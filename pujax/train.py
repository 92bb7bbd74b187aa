"""`pujax train`: SFT on the anchors, then alignment, evaluated and resumable."""

from pujax.config.commands import command, swept
from pujax.config.settings import TrainConfig
from pujax.run.compilation import compile_once
from pujax.run.directory import run_directory
from pujax.run.trackers import require_trackers


def run(config: TrainConfig) -> None:
    """Train as told, in a directory of the run's own or in the one to go on with.

    What a sweep goes through is in the directories' names.
    """
    require_trackers(config.log.to)
    with run_directory(config, swept()) as directory:
        compile_once()
        from pujax.run.fit import fit

        fit(config, directory)


main = command("train", TrainConfig, run)

if __name__ == "__main__":
    main()
