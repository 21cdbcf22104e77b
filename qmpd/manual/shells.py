"""Completion scripts for bash, zsh and fish: subcommands, options, formats, closed lists and paths."""

from __future__ import annotations

from qmpd.manual.pages import Argument, Kind, Page, Subpage, image_formats

__all__ = ["bash", "fish", "zsh"]

_ORIGIN = "# Written from the declarations that --help shows: python -m qmpd.manual"


def bash(page: Page) -> str:
    """Return the script of one program for bash 4.2 and later; it needs nothing but bash."""
    lines = [_ORIGIN, ""]
    function = f"_{page.name.replace('-', '_')}"
    lines += [f"{function}() {{", '  local current=${COMP_WORDS[COMP_CWORD]} before="" command="" word=""']
    lines += ["  (( COMP_CWORD > 0 )) && before=${COMP_WORDS[COMP_CWORD-1]}"]
    lines += _bash_command(page)
    lines += ['  case "$command:$before" in']
    for name, arguments in [("", page.arguments), *((one.name, one.arguments) for one in page.subpages)]:
        for argument in arguments:
            if argument.value:
                patterns = "|".join(f'"{name}:{flag}"' for flag in argument.flags)
                lines.append(f"    {patterns}) {_bash_values(argument)}; return ;;")
    lines += ["  esac", '  case "$command" in']
    for one in page.subpages:
        lines.append(f'    "{one.name}") {_bash_words(_flags(one.arguments))} ;;')
    words = sorted({*_flags(page.arguments), *(one.name.split()[0] for one in page.subpages)})
    lines.append(f"    '') {_bash_words(words)} ;;")
    for group in _groups(page):
        below = [one.name.split()[1] for one in page.subpages if one.name.startswith(f"{group} ")]
        lines.append(f'    "{group}") {_bash_words(below)} ;;')
    lines += ["  esac"]
    lines += ['  [[ $current != -* && -n $command ]] && COMPREPLY+=( $(compgen -f -- "$current") )']
    lines += ["  return 0", "}", f"complete -o filenames -F {function} {page.name}", ""]
    return "\n".join(lines)


def zsh(page: Page) -> str:
    """Return the completion function of one program for zsh 5."""
    lines = [f"#compdef {page.name}", _ORIGIN, "", "local context state line", "typeset -A opt_args", ""]
    if not page.subpages:
        return "\n".join([*lines, *_zsh_arguments(page.arguments, "'*:file:_files'"), ""])
    lines += ["_arguments -C \\", *(f"  {_zsh_option(one)} \\" for one in page.arguments)]
    lines += ["  '1:command:->command' \\", "  '*::argument:->argument'", "", "case $state in", "  command)"]
    lines += ["    local -a commands=("]
    lines += [f"      '{name}:{_quoted(help_)}'" for name, help_ in _first_words(page)]
    lines += ["    )", "    _describe command commands ;;", "  argument)", "    case $words[1] in"]
    for one in page.subpages:
        if " " not in one.name:
            lines += [
                f"      {one.name})",
                *(f"        {line}" for line in _zsh_arguments(one.arguments, _zsh_rest(one))),
            ]
            lines += ["        ;;"]
    for group in _groups(page):
        lines += [f"      {group})"]
        below = " ".join(one.name.split()[1] for one in page.subpages if one.name.startswith(f"{group} "))
        lines += [f"        _arguments '1:command:({below})' '*:file:_files'", "        ;;"]
    return "\n".join([*lines, "    esac ;;", "esac", ""])


def fish(page: Page) -> str:
    """Return the completions of one program for fish 3."""
    lines = [_ORIGIN, ""]
    names = " ".join(name for name, _ in _first_words(page))
    for argument in page.arguments:
        lines.append(_fish_option(page.name, argument, "__fish_use_subcommand" if page.subpages else ""))
    for name, text in _first_words(page):
        start = f"complete -c {page.name} -n 'not __fish_seen_subcommand_from {names}'"
        lines.append(f"{start} -f -a {name} -d '{_quoted(text)}'")
    for group in _groups(page):
        for one in page.subpages:
            if one.name.startswith(f"{group} "):
                start = f"complete -c {page.name} -n '__fish_seen_subcommand_from {group}'"
                lines.append(f"{start} -f -a {one.name.split()[1]} -d '{_quoted(one.summary)}'")
    for one in page.subpages:
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in one.name.split())
        lines += [_fish_option(page.name, argument, seen) for argument in one.arguments]
    return "\n".join([*lines, ""])


def _groups(page: Page) -> list[str]:
    """Return the words below which there are further subcommands."""
    return sorted({one.name.split()[0] for one in page.subpages if " " in one.name})


def _first_words(page: Page) -> list[tuple[str, str]]:
    plain = [(one.name, one.summary) for one in page.subpages if " " not in one.name]
    return sorted([*plain, *((group, f"{group} commands") for group in _groups(page))])


def _flags(arguments: tuple[Argument, ...]) -> list[str]:
    return [flag for argument in arguments for flag in argument.flags]


def _bash_command(page: Page) -> list[str]:
    """Return what finds the subcommand among the words so far."""
    if not page.subpages:
        return ["  command="]
    names = " ".join(name for name, _ in _first_words(page))
    lines = [f'  local -r known=" {names} "']
    lines += ['  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do']
    groups = _groups(page)
    if groups:
        alternatives = "|".join(f'"{one.name}"' for one in page.subpages if " " in one.name)
        lines += [f'    case "$command $word" in {alternatives}) command="$command $word"; break ;; esac']
    lines += ['    if [[ -z $command && $known == *" $word "* ]]; then command=$word; fi', "  done"]
    return lines


def _bash_words(words: list[str]) -> str:
    return f'COMPREPLY=( $(compgen -W "{" ".join(words)}" -- "$current") )'


def _bash_values(argument: Argument) -> str:
    match argument.kind:
        case Kind.FILE:
            return 'COMPREPLY=( $(compgen -f -- "$current") )'
        case Kind.FORMAT:
            return _bash_words(list(image_formats()))
        case Kind.CHOICE:
            return _bash_words(list(argument.choices))
        case _:
            return "COMPREPLY=()"


def _zsh_arguments(arguments: tuple[Argument, ...], rest: str) -> list[str]:
    return ["_arguments \\", *(f"  {_zsh_option(one)} \\" for one in arguments), f"  {rest}"]


def _zsh_rest(one: Subpage) -> str:
    return "'*:file:_files'" if Kind.FILE in one.operands or not one.operands else "'*: :_files'"


def _zsh_option(argument: Argument) -> str:
    """Return one specification of _arguments; repeated options are common in these programs, so none excludes."""
    actions = {Kind.FILE: "_files", Kind.FORMAT: f"({' '.join(image_formats())})"}
    action = f"({' '.join(argument.choices)})" if argument.choices else actions.get(argument.kind, " ")
    value = f":{_spec(argument.value)}:{action}" if argument.value else ""
    text = _spec(argument.help)
    return " ".join(f"'*{flag}[{text}]{value}'" for flag in argument.flags)


def _spec(text: str) -> str:
    """Return text without what has a meaning in a specification of _arguments."""
    return _quoted(text).replace("[", "(").replace("]", ")").replace(":", "\\:")


def _fish_option(program: str, argument: Argument, condition: str) -> str:
    parts = [f"complete -c {program}"]
    if condition:
        parts.append(f"-n '{condition}'")
    for flag in argument.flags:
        if flag.startswith("--"):
            parts.append(f"-l {flag[2:]}")
        else:
            parts.append(f"-s {flag[1:]}" if len(flag) == 2 else f"-o {flag[1:]}")
    if argument.value:
        words = argument.choices or (image_formats() if argument.kind is Kind.FORMAT else ())
        parts.append("-r" if argument.kind is Kind.FILE else "-x")
        if words:
            parts.append(f"-a '{' '.join(words)}'")
    parts.append(f"-d '{_quoted(argument.help)}'")
    return " ".join(parts)


def _quoted(text: str) -> str:
    """Return text without what would end a string in single quotes."""
    return text.replace("'", "`").replace("\\", "/")
