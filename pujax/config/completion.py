"""What a shell completes after `pujax`: commands, settings and choices, said once in its language.

The script has it all in it, so that a key press starts no Python; a pujax of other settings wants
its script made anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from pujax.config.commands import groups_of
from pujax.config.compose import conf_dir
from pujax.config.help import choices_of
from pujax.config.overrides import kinds_of
from pujax.errors import one_of
from pujax.files.settings import flat
from pujax.text import secret_name

OPTIONS = ("--help", "--version", "--multirun", "--cfg", "--hydra-help")
"""What every command takes beside settings."""

WORDS = {
    "resume": ("auto", "never"),  # or a run's directory
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "data.gate.answer": ("off", "exact", "contains"),
    "data.on_bad_row": ("error", "drop"),
    "data.on_too_long": ("error", "drop", "truncate"),
    "scorer.by": ("reference", "policy"),
    "optim.schedule": ("cosine", "constant"),
    "teacher.thoughts": ("strip", "keep", "fail"),
    "format": ("hf", "gguf", "peft"),
    "dtype": ("float32", "bfloat16", "float16"),
    "kind": ("F16", "Q8_0", "Q4_1", "Q4_0"),
}
"""What settings take of words alone, which the records' own checks say."""

BASH = """\
# What bash completes after pujax, made by `pujax --completion bash`.
@KNOWN@
_pujax() {
    local line=${COMP_LINE:0:COMP_POINT} command=${COMP_WORDS[1]-} IFS=$' \\t\\n'
    local word=${line##*[[:space:]]} found key value begun start end=' ' known i
    local added=${word%%[^+]*}  # + or ++ before a key
    if (( COMP_CWORD == 1 )); then
        found=$(compgen -W "$_pujax_commands" -S ' ' -- "$word")
    elif [[ $word == *=* ]]; then
        key=${word%%=*} value=${word#*=}
        begun=${value##*,} begun=${begun##[[@]}
        start=${value%"$begun"}  # the values before it, of a list or a sweep
        [[ $value == \\[* ]] && end=
        known=$(_pujax_values "$command ${key#"$added"}")
        if [[ $known ]]; then
            found=$(compgen -W "$known" -S "$end" -- "$begun")
        elif [[ $start || $COMP_WORDBREAKS != *=* ]]; then  # bash takes it for part of the name
            found=$(compgen -f -- "$begun" | while IFS= read -r i; do printf '%q\\n' "$i"; done)
        fi
        # What bash takes for the word begins after the sign, unless it was told otherwise.
        [[ $COMP_WORDBREAKS == *=* ]] || start=$key=$start
        found=${found:+$start${found//$'\\n'/$'\\n'$start}}
    else
        found=$(compgen -P "$added" -W "$(_pujax_keys "$command")" -- "${word#"$added"}")
    fi
    IFS=$'\\n'
    COMPREPLY=($found)
    if [[ $word == *=* && -z $known ]]; then
        for i in "${!COMPREPLY[@]}"; do
            [[ -d ${COMPREPLY[i]#"$start"} ]] && COMPREPLY[i]+=/
        done
    fi
    return 0
}
complete -o nospace -o default -F _pujax pujax
"""

ZSH = """\
#compdef pujax
# What zsh completes after pujax, made by `pujax --completion zsh`.
@KNOWN@
_pujax() {
    local -a found
    if (( CURRENT == 2 )); then
        compadd -- ${=_pujax_commands}
    elif [[ $PREFIX == *=* ]]; then
        found=(${=$(_pujax_values "$words[2] ${${PREFIX%%=*}#+}")})
        compset -P '*[=,\\[@]'
        if (( $#found )); then compadd -- $found; else _files; fi
    else
        found=(${=$(_pujax_keys $words[2])})
        compset -P '+'
        compadd -S '' -- $found
    fi
}
if [[ $funcstack[1] == _pujax ]]; then
    _pujax "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _pujax pujax
fi
"""

SHELLS = {"bash": BASH, "zsh": ZSH}


def script(shell: str, commands: Sequence[str]) -> str:
    """The script to source in bash, or to have among zsh's functions as `_pujax`.

    The `commands` must have been imported. Raises `ConfigError` for another shell.
    """
    one_of("--completion", shell, SHELLS)
    keys, values = [], []
    for command in commands:
        known = dict(_completed(command))
        signs = [f"{key}=" for key in known]
        keys.append(f"    {command}) echo '{' '.join([*signs, *OPTIONS])}' ;;")
        values += [
            f"    '{command} {key}') echo '{' '.join(choices)}' ;;"
            for key, choices in known.items()
            if choices
        ]
    told = [
        f"_pujax_commands='{' '.join([*commands, '--help', '--version', '--completion'])}'",
        *("_pujax_keys() {", "  case $1 in", *keys, "  esac", "}"),
        *("_pujax_values() {", "  case $1 in", *values, "  esac", "}"),
    ]
    return SHELLS[shell].replace("@KNOWN@", "\n".join(told))


def _completed(command: str) -> Iterator[tuple[str, list[str]]]:
    """The keys of a command, each with what there is to pick: groups, then settings."""
    root = Path(conf_dir())
    conf = root if (root / f"{command}.yaml").is_file() else root / "tools"
    groups = groups_of(command, conf)
    yield from choices_of(conf, groups).items()
    schema = OmegaConf.get_type(ConfigStore.instance().load(f"{command}_schema.yaml").node)
    assert schema is not None  # commands register records
    for key, kind in kinds_of(schema):
        # What has a secret's name is refused: a key is never typed.
        if not is_dataclass(kind) and key not in groups and not secret_name(key):
            yield key, ["true", "false"] if kind is bool else list(WORDS.get(key, ()))
    for group in groups:
        if group != "experiment":  # whose files set settings of everywhere
            yield from ((key, []) for key in _inside(root, group))


def _inside(root: Path, group: str) -> Iterator[str]:
    """The keys of the functions that the files of a group of conf/ name."""
    for file in sorted((root / group).glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if text.startswith("# @package"):
            continue
        for key in flat(yaml.safe_load(text), group):
            name = key.rpartition(".")[2]
            if name not in ("_target_", "_partial_", "defaults"):
                yield key
