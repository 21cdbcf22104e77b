# Written from the declarations that --help shows: python -m qmpd.manual

_qmpd_storage_daemon() {
  local current=${COMP_WORDS[COMP_CWORD]} before="" command="" word=""
  (( COMP_CWORD > 0 )) && before=${COMP_WORDS[COMP_CWORD-1]}
  command=
  case "$command:$before" in
    ":--blockdev") COMPREPLY=(); return ;;
    ":--chardev") COMPREPLY=(); return ;;
    ":--export") COMPREPLY=(); return ;;
    ":--luks-policy") COMPREPLY=(); return ;;
    ":--monitor") COMPREPLY=(); return ;;
    ":--nbd-server") COMPREPLY=(); return ;;
    ":--object") COMPREPLY=(); return ;;
    ":--pidfile") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    ":-T"|":--trace") COMPREPLY=(); return ;;
  esac
  case "$command" in
    '') COMPREPLY=( $(compgen -W "--blockdev --chardev --daemonize --export --help --luks-policy --monitor --nbd-server --object --pidfile --trace --version -T -V -h" -- "$current") ) ;;
  esac
  [[ $current != -* && -n $command ]] && COMPREPLY+=( $(compgen -f -- "$current") )
  return 0
}
complete -o filenames -F _qmpd_storage_daemon qmpd-storage-daemon
