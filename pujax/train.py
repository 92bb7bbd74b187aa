"""`pujax train`: SFT on the anchors, then alignment, evaluated and resumable."""

from dataclasses import asdict
from pathlib import Path

from pujax.config.commands import command, swept
from pujax.config.functions import build_loss, foresee, foresee_metrics
from pujax.config.settings import TrainConfig
from pujax.config.sweeps import beside_others, note_done, title
from pujax.errors import require
from pujax.files.settings import flat
from pujax.files.weight_files import require_model_files
from pujax.run.compilation import compile_once
from pujax.run.directory import OUTPUT, finished, run_directory, traces
from pujax.run.processes import first, opened, require_same, several, together, told
from pujax.run.trackers import require_trackers
from pujax.run.unanswered import refuse_unanswered
from pujax.teacher.preferences import refuse_bad_rows
from pujax.teacher.prompts import refuse_bad_prompts, refuse_missing
from pujax.teacher.store import require_store


def run(config: TrainConfig) -> None:
    """Train as told, in a directory of the run's own or in the one to go on with.

    What a sweep goes through is in the directories' names; a job of it that is done is not done
    again. Jobs that run beside each other write what they have to say into their directories.
    """
    require_trackers(config.log.to)
    with together(config.distributed):
        require_same(flat(asdict(config)))
        apart = swept()
        require(
            not (several() and beside_others()),
            "hydra/launcher",
            "a process a job",
            "several processes do one run already: leave the launcher out",
        )
        if apart and config.resume == "auto" and (done := told(lambda: finished(config, apart))):
            if first():
                note_done(done)
                print(f"{title(apart)}: done in {done}: not run again (resume=never begins anew)")
            return
        told(lambda: require_sources(config))
        with opened(lambda: run_directory(config, apart)) as directory:
            refuse_unanswered(config, begun=bool(traces(directory)))
            compile_once()
            from pujax.run.trial import try_settings

            try_settings(config)  # before what takes seconds to import
            import rich

            from pujax.run.fit import fit

            if not beside_others():
                fit(config, directory)
                if apart and first():
                    note_done(directory)
                return
            print(f"{title(apart)}: begun, see {directory / OUTPUT}", flush=True)
            with (directory / OUTPUT).open("a", encoding="utf-8") as output:
                rich.reconfigure(file=output)  # of this process, which has no other job meanwhile
                fit(config, directory, console=rich.get_console())
        note_done(directory)
        print(f"{title(apart)}: done in {directory}", flush=True)


def require_sources(config: TrainConfig) -> None:
    """Refuse what is not there, and preferences that can't be used, before jax is imported.

    Raises `WeightsError`, `ConfigError`, `PromptError` and `StoreError`.
    """
    data = config.data
    foresee(config.labels, "labels", config.trusted)
    foresee(config.scorer.score, "scorer.score", config.trusted)
    build_loss(config.loss, config.trusted, make=foresee)
    foresee_metrics(config.eval, config.trusted)
    optional = {"data.gate.check": data.gate.check, "teacher.protocol": config.teacher.protocol}
    for key, value in optional.items():
        if value is not None:
            foresee(value, key, config.trusted)
    require_model_files(config.model.path)
    for key in ("prompts", "heldout", "preferences"):
        if (source := getattr(data, key)) is not None:
            refuse_missing(source, f"data.{key}")
    rated = [data.preferences, data.heldout if data.anchors is None else None]
    for source in rated if data.on_bad_row == "error" else ():
        if source is not None:
            refuse_bad_rows(source, weights=data.dimensions or None)
    for source in (data.prompts, data.heldout if data.anchors is not None else None):
        if source is not None:
            refuse_bad_prompts(source)
    if data.anchors is not None and not config.teacher.asks:
        require_store(Path(data.anchors))


main = command("train", TrainConfig, run)

if __name__ == "__main__":
    main()
