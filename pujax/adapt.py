"""`pujax adapt`: a soft prompt fitted to one user's preferences, with all weights frozen."""

from pujax.config.commands import command
from pujax.config.functions import build_loss, foresee
from pujax.config.tool_settings import AdaptConfig, own_names
from pujax.errors import require
from pujax.files.locate import at_home
from pujax.files.soft_prompt import load_fitted, require_place
from pujax.inference.finished import refuse_run, source_of
from pujax.run.compilation import compile_once
from pujax.teacher.preferences import refuse_bad_rows
from pujax.teacher.prompts import refuse_missing
from pujax.text import counted


def run(settings: AdaptConfig) -> None:
    """Fit it, write it, and say how the model ranks its user's pairs before and after."""
    source, of_run = source_of(settings.run, settings.model)
    refuse_run(at_home(settings.out))
    load_fitted(settings.fitted)
    build_loss(settings.loss, settings.trusted, make=foresee)
    for key in ("preferences", "heldout"):
        if (given := getattr(settings, key)) is not None:
            refuse_missing(given, key)
            if settings.on_bad_row == "error":
                with own_names():
                    count = refuse_bad_rows(given, weights=settings.dimensions or None)
                if count is not None and key == "preferences":
                    remedy = f"preferences has {counted(count, 'prompt')}: lower it"
                    require(settings.batch <= count, "batch", settings.batch, remedy)
    require_place(at_home(settings.out))
    compile_once()
    from pujax.run.adapting import adapt  # jax with it: --help does not need that

    system = of_run if settings.system is None else settings.system
    made = adapt(settings, source, system, print)
    if made.before is not None and made.after is not None:
        of = settings.heldout or f"{settings.preferences}, to which it was fitted"
        print(
            f"{of}: of {counted(made.before.pairs, 'pair')} {made.before.raw:.0%} were ranked as "
            f"the user does, {made.after.raw:.0%} are now (by log-probs a token "
            f"{made.before.normalized:.0%} and {made.after.normalized:.0%})"
        )
    to = "`pujax generate`, `chat`, `serve` or `export`"
    print(f"{settings.out}: give it as soft_prompt={settings.out} to {to}")


main = command("adapt", AdaptConfig, run, folder="tools", shared=("loss",))

if __name__ == "__main__":
    main()
