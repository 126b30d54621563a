"""Shell completion: what may stand at the cursor, and the scripts with which bash, zsh and fish ask for it.

A script calls ``smpo __complete WORDS..`` at each press of Tab, so it need not be printed again for a new version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from smpo_fast.config import arguments, loading, recipes
from smpo_fast.config.commands import COMMANDS, Command
from smpo_fast.config.sibling_flags import ALIASES, SWITCHES

REQUEST = "__complete"
FILES = "@files"  # stands for the names of files
_RECIPES = {"--config": ".toml", "--ds_config": ".json"}


def candidates(words: Sequence[str]) -> list[str]:
    """The words that may stand in place of the last of ``words``, which are those after ``smpo``, or ``FILES``.

    What ends in '=' or '.' is the beginning of a setting. A word ``--flag=value`` or ``section.key=value`` is
    completed as a whole; FILES then stands for what follows its '='.
    """
    typed = words[-1] if words else ""
    if len(words) < 2:
        found = [*COMMANDS, "--help", "--version"]
    elif words[0] in COMMANDS:
        found = list(_of_command(COMMANDS[words[0]], words[1:-1], typed))
    else:
        found = []
    return [word for word in found if word == FILES or word.startswith(typed)]


def script(shell: str) -> str:
    """The script for 'bash', 'zsh' or 'fish', to be stored where that shell looks for completions."""
    return _SCRIPTS[shell].replace("REQUEST", REQUEST).replace("FILES", FILES)


def _of_command(command: Command, before: Sequence[str], typed: str) -> Iterator[str]:
    flags = _flags(command)
    name, equals, _ = typed.partition("=")
    if name in flags and equals:
        yield from _assigned(name, flags[name])
    elif before and flags.get(before[-1]) and before[-1] != "--set":
        yield from flags[before[-1]]
    elif typed.startswith("-"):
        yield from flags
    elif command.settings == "run" or _last_flag(before) == "--set":
        yield from _settings(typed, command.set_section)
        yield from _positional(command)
    else:
        yield from _positional(command)


def _flags(command: Command) -> dict[str, list[str]]:
    """The flags of a command with the values that each takes; none for a switch."""
    flags = {a.flag: _flag_values(a) for a in arguments.declared(command.arguments) if not a.positional}
    if command.settings:
        flags["--config"] = [*recipes.names(".toml"), FILES]
    if command.settings == "set":
        flags["--set"] = [FILES]
    if command.settings == "run":
        fields = dict(loading.keys())
        flags |= {f"--{flag}": _values(fields[key].annotation) for flag, key in ALIASES.items()}
        flags |= {f"--{flag}": [] for flag in SWITCHES}
    return {**flags, "--help": [], "--version": []}


def _flag_values(argument: arguments.Declared) -> list[str]:
    if not argument.metavar:
        return []
    shipped = recipes.names(_RECIPES[argument.flag]) if argument.flag in _RECIPES else []
    return [*shipped, *_values(argument.field.annotation)]


def _positional(command: Command) -> Iterator[str]:
    for argument in arguments.declared(command.arguments):
        if argument.positional:
            yield from _values(argument.field.annotation)


def _settings(typed: str, section: str) -> Iterator[str]:
    """Sections until one is typed, then its keys, then the values of a key. section: the only one; '' for all."""
    fields = {name: field for name, field in loading.keys() if name.startswith(f"{section}." if section else "")}
    name, equals, _ = typed.partition("=")
    if equals:
        yield from _assigned(name, _values(fields[name].annotation) if name in fields else [])
    elif "." in typed or section:
        yield from (f"{name}=" for name in fields)
    else:
        yield from dict.fromkeys(f"{name.partition('.')[0]}." for name in fields)


def _assigned(name: str, values: Sequence[str]) -> Iterator[str]:
    yield from (value if value == FILES else f"{name}={value}" for value in values)


def _values(annotation: Any) -> list[str]:
    """The words that a value may be, as far as its type says; text may be the name of a file."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation) if word != ""]
    inner = get_args(annotation) or (annotation,)
    return [FILES] if str in inner or Path in inner else []


def _last_flag(words: Sequence[str]) -> str:
    return next((word for word in reversed(words) if word.startswith("--")), "")


# bash splits a word at '=', which is undone for the program and done again for its answers.
_BASH = """# bash completion of smpo: source this file, or store it as ~/.local/share/bash-completion/completions/smpo
_smpo() {
    local -a words=()
    local i piece glue="" answer
    for ((i = 1; i <= COMP_CWORD; i++)); do
        piece=${COMP_WORDS[i]}
        if [[ ${#words[@]} -gt 0 && ($piece == "=" || -n $glue) ]]; then words[-1]+=$piece; else words+=("$piece"); fi
        if [[ $piece == "=" ]]; then glue=yes; else glue=""; fi
    done
    local typed=${words[-1]} value assigned=""
    value=$typed
    if [[ $typed == *=* ]]; then assigned="${typed%%=*}=" value=${typed#*=}; fi
    COMPREPLY=()
    while IFS= read -r answer; do
        if [[ $answer == "FILES" ]]; then
            compopt -o filenames 2>/dev/null
            while IFS= read -r answer; do COMPREPLY+=("$answer"); done < <(compgen -f -- "$value")
        elif [[ -n $answer ]]; then
            if [[ $answer == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
            COMPREPLY+=("${answer#"$assigned"}")
        fi
    done < <(smpo REQUEST "${words[@]}" 2>/dev/null)
}
complete -F _smpo smpo
"""
_ZSH = """#compdef smpo
# zsh completion of smpo: source this file after compinit, or store it as _smpo in a folder of $fpath
_smpo() {
    local -a answers open closed
    local answer files=""
    answers=("${(@f)$(smpo REQUEST "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    for answer in $answers; do
        case $answer in
            FILES) files=yes ;;
            *[=.]) open+=("$answer") ;;
            *) closed+=("$answer") ;;
        esac
    done
    compadd -S '' -a open
    compadd -a closed
    if [[ -n $files ]]; then
        compset -P '*='
        _files
    fi
}
if [[ $funcstack[1] == _smpo ]]; then _smpo "$@"; else compdef _smpo smpo; fi
"""
_FISH = """# fish completion of smpo: store this file as ~/.config/fish/completions/smpo.fish
function __smpo_candidates
    set -l typed (commandline -ct)
    for answer in (smpo REQUEST (commandline -opc)[2..] $typed 2>/dev/null)
        if test "$answer" = FILES
            set -l assigned (string match -r '^[^=]*=' -- $typed)
            for file in (__fish_complete_path (string replace -r '^[^=]*=' '' -- "$typed"))
                echo "$assigned$file"
            end
        else
            echo $answer
        end
    end
end
complete -c smpo -f -a '(__smpo_candidates)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
