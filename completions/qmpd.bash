# Written from the declarations that --help shows: python -m qmpd.manual

_qmpd() {
  local current=${COMP_WORDS[COMP_CWORD]} before="" command="" word=""
  (( COMP_CWORD > 0 )) && before=${COMP_WORDS[COMP_CWORD-1]}
  command=
  case "$command:$before" in
    ":-qmp") COMPREPLY=(); return ;;
    ":-chardev") COMPREPLY=(); return ;;
    ":-mon") COMPREPLY=(); return ;;
    ":-object") COMPREPLY=(); return ;;
    ":-blockdev") COMPREPLY=(); return ;;
    ":-device") COMPREPLY=(); return ;;
    ":-export") COMPREPLY=(); return ;;
    ":-nbd-server") COMPREPLY=(); return ;;
    ":-luks-policy") COMPREPLY=(); return ;;
    ":-guest") COMPREPLY=(); return ;;
    ":-machine") COMPREPLY=(); return ;;
    ":-M") COMPREPLY=(); return ;;
    ":-accel") COMPREPLY=(); return ;;
    ":-cpu") COMPREPLY=(); return ;;
    ":-smp") COMPREPLY=(); return ;;
    ":-m") COMPREPLY=(); return ;;
    ":-name") COMPREPLY=(); return ;;
    ":-uuid") COMPREPLY=(); return ;;
    ":-display") COMPREPLY=(); return ;;
    ":-rtc") COMPREPLY=(); return ;;
    ":-boot") COMPREPLY=(); return ;;
    ":-overcommit") COMPREPLY=(); return ;;
    ":-global") COMPREPLY=(); return ;;
    ":-pidfile") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    ":-msg") COMPREPLY=(); return ;;
    ":-D") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    ":-T") COMPREPLY=(); return ;;
    ":-trace") COMPREPLY=(); return ;;
  esac
  case "$command" in
    '') COMPREPLY=( $(compgen -W "-D -M -S -T -accel -blockdev -boot -chardev -cpu -daemonize -device -display -export -global -guest -h -help -luks-policy -m -machine -mon -msg -name -nbd-server -no-reboot -no-shutdown -no-user-config -nodefaults -nographic -object -overcommit -pidfile -qmp -rtc -smp -trace -uuid -version" -- "$current") ) ;;
  esac
  [[ $current != -* && -n $command ]] && COMPREPLY+=( $(compgen -f -- "$current") )
  return 0
}
complete -o filenames -F _qmpd qmpd
