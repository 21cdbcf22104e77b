# Written from the declarations that --help shows: python -m qmpd.manual

_qmpd_ctl() {
  local current=${COMP_WORDS[COMP_CWORD]} before="" command="" word=""
  (( COMP_CWORD > 0 )) && before=${COMP_WORDS[COMP_CWORD-1]}
  local -r known=" demo events graph monitor-command replay "
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    if [[ -z $command && $known == *" $word "* ]]; then command=$word; fi
  done
  case "$command:$before" in
    "demo:--document") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "events:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "events:--count") COMPREPLY=(); return ;;
    "graph:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "graph:--format") COMPREPLY=( $(compgen -W "tree dot mermaid svg" -- "$current") ); return ;;
    "monitor-command:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "replay:--socket") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "replay:--set") COMPREPLY=(); return ;;
  esac
  case "$command" in
    "demo") COMPREPLY=( $(compgen -W "-h --help --document --keep" -- "$current") ) ;;
    "events") COMPREPLY=( $(compgen -W "-h --help --socket --count" -- "$current") ) ;;
    "graph") COMPREPLY=( $(compgen -W "-h --help --socket --format" -- "$current") ) ;;
    "monitor-command") COMPREPLY=( $(compgen -W "-h --help --socket --pretty" -- "$current") ) ;;
    "replay") COMPREPLY=( $(compgen -W "-h --help --socket --set --step --fix" -- "$current") ) ;;
    '') COMPREPLY=( $(compgen -W "--help --version -h demo events graph monitor-command replay" -- "$current") ) ;;
  esac
  [[ $current != -* && -n $command ]] && COMPREPLY+=( $(compgen -f -- "$current") )
  return 0
}
complete -o filenames -F _qmpd_ctl qmpd-ctl
