# Written from the declarations that --help shows: python -m qmpd.manual

_qmpd_ctl() {
  local current=${COMP_WORDS[COMP_CWORD]} before="" command="" word=""
  (( COMP_CWORD > 0 )) && before=${COMP_WORDS[COMP_CWORD-1]}
  local -r known=" demo events export graph luks monitor-command replay "
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$command $word" in "luks backup"|"luks restore"|"luks compare"|"luks verify"|"luks add-key"|"luks change-key"|"luks remove-key") command="$command $word"; break ;; esac
    if [[ -z $command && $known == *" $word "* ]]; then command=$word; fi
  done
  case "$command:$before" in
    "demo:--document") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "events:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "events:--count") COMPREPLY=(); return ;;
    "export:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "export:--listen") COMPREPLY=(); return ;;
    "export:--name") COMPREPLY=(); return ;;
    "export:--id") COMPREPLY=(); return ;;
    "export:--description") COMPREPLY=(); return ;;
    "graph:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "graph:--format") COMPREPLY=( $(compgen -W "tree dot mermaid svg" -- "$current") ); return ;;
    "luks backup:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks restore:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks compare:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks verify:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks verify:--secret") COMPREPLY=(); return ;;
    "luks add-key:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks add-key:--secret") COMPREPLY=(); return ;;
    "luks add-key:--key-slot") COMPREPLY=(); return ;;
    "luks add-key:--backup") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks add-key:--new-secret") COMPREPLY=(); return ;;
    "luks add-key:--pbkdf") COMPREPLY=( $(compgen -W "pbkdf2 argon2i argon2id" -- "$current") ); return ;;
    "luks add-key:--iter-time") COMPREPLY=(); return ;;
    "luks add-key:--iterations") COMPREPLY=(); return ;;
    "luks add-key:--pbkdf-memory") COMPREPLY=(); return ;;
    "luks add-key:--pbkdf-parallel") COMPREPLY=(); return ;;
    "luks change-key:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks change-key:--secret") COMPREPLY=(); return ;;
    "luks change-key:--key-slot") COMPREPLY=(); return ;;
    "luks change-key:--backup") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks change-key:--old-secret") COMPREPLY=(); return ;;
    "luks change-key:--new-secret") COMPREPLY=(); return ;;
    "luks change-key:--pbkdf") COMPREPLY=( $(compgen -W "pbkdf2 argon2i argon2id" -- "$current") ); return ;;
    "luks change-key:--iter-time") COMPREPLY=(); return ;;
    "luks change-key:--iterations") COMPREPLY=(); return ;;
    "luks change-key:--pbkdf-memory") COMPREPLY=(); return ;;
    "luks change-key:--pbkdf-parallel") COMPREPLY=(); return ;;
    "luks remove-key:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks remove-key:--secret") COMPREPLY=(); return ;;
    "luks remove-key:--key-slot") COMPREPLY=(); return ;;
    "luks remove-key:--backup") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks remove-key:--old-secret") COMPREPLY=(); return ;;
    "monitor-command:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "replay:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "replay:--set") COMPREPLY=(); return ;;
  esac
  case "$command" in
    "demo") COMPREPLY=( $(compgen -W "-h --help --document --keep" -- "$current") ) ;;
    "events") COMPREPLY=( $(compgen -W "-h --help --socket --count" -- "$current") ) ;;
    "export") COMPREPLY=( $(compgen -W "-h --help --socket --listen --name --id --description --writable" -- "$current") ) ;;
    "graph") COMPREPLY=( $(compgen -W "-h --help --socket --format" -- "$current") ) ;;
    "luks backup") COMPREPLY=( $(compgen -W "-h --help --socket" -- "$current") ) ;;
    "luks restore") COMPREPLY=( $(compgen -W "-h --help --socket --force" -- "$current") ) ;;
    "luks compare") COMPREPLY=( $(compgen -W "-h --help --socket" -- "$current") ) ;;
    "luks verify") COMPREPLY=( $(compgen -W "-h --help --socket --secret --json" -- "$current") ) ;;
    "luks add-key") COMPREPLY=( $(compgen -W "-h --help --socket --secret --key-slot --backup --force --new-secret --pbkdf --iter-time --iterations --pbkdf-memory --pbkdf-parallel" -- "$current") ) ;;
    "luks change-key") COMPREPLY=( $(compgen -W "-h --help --socket --secret --key-slot --backup --force --old-secret --new-secret --pbkdf --iter-time --iterations --pbkdf-memory --pbkdf-parallel" -- "$current") ) ;;
    "luks remove-key") COMPREPLY=( $(compgen -W "-h --help --socket --secret --key-slot --backup --force --old-secret" -- "$current") ) ;;
    "monitor-command") COMPREPLY=( $(compgen -W "-h --help --socket --pretty" -- "$current") ) ;;
    "replay") COMPREPLY=( $(compgen -W "-h --help --socket --set --step --fix" -- "$current") ) ;;
    '') COMPREPLY=( $(compgen -W "--help --version -h demo events export graph luks monitor-command replay" -- "$current") ) ;;
    "luks") COMPREPLY=( $(compgen -W "backup restore compare verify add-key change-key remove-key" -- "$current") ) ;;
  esac
  [[ $current != -* && -n $command ]] && COMPREPLY+=( $(compgen -f -- "$current") )
  return 0
}
complete -o filenames -F _qmpd_ctl qmpd-ctl
