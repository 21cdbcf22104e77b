# Written from the declarations that --help shows: python -m qmpd.manual

_qmpd_img() {
  local current=${COMP_WORDS[COMP_CWORD]} before="" command="" word=""
  (( COMP_CWORD > 0 )) && before=${COMP_WORDS[COMP_CWORD-1]}
  local -r known=" amend bench bitmap check commit compare convert create dd info luks map measure rebase resize snapshot "
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    if [[ -z $command && $known == *" $word "* ]]; then command=$word; fi
  done
  case "$command:$before" in
    "amend:-f"|"amend:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "amend:--object") COMPREPLY=(); return ;;
    "amend:-t"|"amend:--cache") COMPREPLY=(); return ;;
    "amend:-o"|"amend:--options") COMPREPLY=(); return ;;
    "bench:-f"|"bench:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "bench:--object") COMPREPLY=(); return ;;
    "bench:-t"|"bench:--cache") COMPREPLY=(); return ;;
    "bench:-c"|"bench:--count") COMPREPLY=(); return ;;
    "bench:-d"|"bench:--depth") COMPREPLY=(); return ;;
    "bench:-o"|"bench:--offset") COMPREPLY=(); return ;;
    "bench:-s"|"bench:--buffer-size") COMPREPLY=(); return ;;
    "bench:-S"|"bench:--step-size") COMPREPLY=(); return ;;
    "bench:-i"|"bench:--aio") COMPREPLY=(); return ;;
    "bench:--pattern") COMPREPLY=(); return ;;
    "bench:--flush-interval") COMPREPLY=(); return ;;
    "bitmap:-f"|"bitmap:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "bitmap:--object") COMPREPLY=(); return ;;
    "bitmap:--merge") COMPREPLY=(); return ;;
    "bitmap:-b"|"bitmap:--source-file") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "bitmap:-F"|"bitmap:--source-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "bitmap:-g"|"bitmap:--granularity") COMPREPLY=(); return ;;
    "check:-f"|"check:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "check:--object") COMPREPLY=(); return ;;
    "check:--output") COMPREPLY=( $(compgen -W "human json" -- "$current") ); return ;;
    "check:-r"|"check:--repair") COMPREPLY=( $(compgen -W "leaks all" -- "$current") ); return ;;
    "check:-T"|"check:--cache") COMPREPLY=(); return ;;
    "commit:-f"|"commit:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "commit:--object") COMPREPLY=(); return ;;
    "commit:-t"|"commit:--cache") COMPREPLY=(); return ;;
    "commit:-b"|"commit:--base") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "commit:-r"|"commit:--rate") COMPREPLY=(); return ;;
    "compare:--object") COMPREPLY=(); return ;;
    "compare:-f"|"compare:--a-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "compare:-F"|"compare:--b-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "compare:-T"|"compare:--cache") COMPREPLY=(); return ;;
    "convert:--object") COMPREPLY=(); return ;;
    "convert:-f"|"convert:--source-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "convert:-T"|"convert:--source-cache") COMPREPLY=(); return ;;
    "convert:-l"|"convert:--source-snapshot") COMPREPLY=(); return ;;
    "convert:-O"|"convert:--target-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "convert:-o"|"convert:--target-options") COMPREPLY=(); return ;;
    "convert:-t"|"convert:--target-cache") COMPREPLY=(); return ;;
    "convert:-B"|"convert:--backing") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "convert:-F"|"convert:--backing-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "convert:-S"|"convert:--sparse-size") COMPREPLY=(); return ;;
    "convert:-m"|"convert:--parallel") COMPREPLY=(); return ;;
    "convert:-r"|"convert:--rate") COMPREPLY=(); return ;;
    "create:--object") COMPREPLY=(); return ;;
    "create:-f"|"create:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "create:-o"|"create:--options") COMPREPLY=(); return ;;
    "create:-b"|"create:--backing") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "create:-F"|"create:--backing-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "create:--iterations") COMPREPLY=(); return ;;
    "dd:-f"|"dd:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "dd:--object") COMPREPLY=(); return ;;
    "dd:-O"|"dd:--output-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "dd:-o"|"dd:--options") COMPREPLY=(); return ;;
    "info:-f"|"info:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "info:--object") COMPREPLY=(); return ;;
    "info:--output") COMPREPLY=( $(compgen -W "human json" -- "$current") ); return ;;
    "luks:--object") COMPREPLY=(); return ;;
    "luks:--output") COMPREPLY=( $(compgen -W "human json" -- "$current") ); return ;;
    "luks:-f"|"luks:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "luks:-d"|"luks:--key-file") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks:--new-key-file") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "luks:--secret") COMPREPLY=(); return ;;
    "luks:--new-secret") COMPREPLY=(); return ;;
    "luks:-S"|"luks:--key-slot") COMPREPLY=(); return ;;
    "luks:--pbkdf") COMPREPLY=( $(compgen -W "pbkdf2 argon2i argon2id" -- "$current") ); return ;;
    "luks:--iter-time") COMPREPLY=(); return ;;
    "luks:--iterations") COMPREPLY=(); return ;;
    "luks:--pbkdf-memory") COMPREPLY=(); return ;;
    "luks:--pbkdf-parallel") COMPREPLY=(); return ;;
    "luks:--backup") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "map:-f"|"map:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "map:--object") COMPREPLY=(); return ;;
    "map:--output") COMPREPLY=( $(compgen -W "human json" -- "$current") ); return ;;
    "map:-s"|"map:--start-offset") COMPREPLY=(); return ;;
    "map:-l"|"map:--max-length") COMPREPLY=(); return ;;
    "measure:-f"|"measure:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "measure:--object") COMPREPLY=(); return ;;
    "measure:--output") COMPREPLY=( $(compgen -W "human json" -- "$current") ); return ;;
    "measure:-O"|"measure:--target-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "measure:-o"|"measure:--options") COMPREPLY=(); return ;;
    "measure:-s"|"measure:--size") COMPREPLY=(); return ;;
    "measure:-l"|"measure:--snapshot") COMPREPLY=(); return ;;
    "rebase:-f"|"rebase:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "rebase:--object") COMPREPLY=(); return ;;
    "rebase:-t"|"rebase:--cache") COMPREPLY=(); return ;;
    "rebase:-b"|"rebase:--backing") COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    "rebase:-F"|"rebase:--backing-format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "rebase:-T"|"rebase:--backing-cache") COMPREPLY=(); return ;;
    "resize:-f"|"resize:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "resize:--object") COMPREPLY=(); return ;;
    "resize:--preallocation") COMPREPLY=(); return ;;
    "snapshot:-f"|"snapshot:--format") COMPREPLY=( $(compgen -W "luks qcow2 raw" -- "$current") ); return ;;
    "snapshot:--object") COMPREPLY=(); return ;;
    "snapshot:-c"|"snapshot:--create") COMPREPLY=(); return ;;
    "snapshot:-a"|"snapshot:--apply") COMPREPLY=(); return ;;
    "snapshot:-d"|"snapshot:--delete") COMPREPLY=(); return ;;
  esac
  case "$command" in
    "amend") COMPREPLY=( $(compgen -W "-h --help -q --quiet -p --progress -f --format --image-opts --object -t --cache -o --options --force" -- "$current") ) ;;
    "bench") COMPREPLY=( $(compgen -W "-h --help -q --quiet -f --format --image-opts --object -U --force-share -t --cache -c --count -d --depth -o --offset -s --buffer-size -S --step-size -i --aio -w --write --pattern --flush-interval --no-drain" -- "$current") ) ;;
    "bitmap") COMPREPLY=( $(compgen -W "-h --help -f --format --image-opts --object --add --remove --clear --enable --disable --merge -b --source-file -F --source-format -g --granularity" -- "$current") ) ;;
    "check") COMPREPLY=( $(compgen -W "-h --help -q --quiet -f --format --image-opts --object -U --force-share --output -r --repair -T --cache" -- "$current") ) ;;
    "commit") COMPREPLY=( $(compgen -W "-h --help -q --quiet -p --progress -f --format --image-opts --object -t --cache -d --drop -b --base -r --rate" -- "$current") ) ;;
    "compare") COMPREPLY=( $(compgen -W "-h --help -q --quiet -p --progress --object -U --force-share -f --a-format -F --b-format --image-opts -s --strict -T --cache" -- "$current") ) ;;
    "convert") COMPREPLY=( $(compgen -W "-h --help -q --quiet -p --progress --object -U --force-share -f --source-format --image-opts --source-image-opts -T --source-cache -l --source-snapshot -O --target-format --target-image-opts -o --target-options -t --target-cache -c --compress -B --backing -F --backing-format -n --no-create --target-is-zero -S --sparse-size -m --parallel -W --oob-writes -C --copy-range-offloading -r --rate --bitmaps --skip-broken-bitmaps --salvage" -- "$current") ) ;;
    "create") COMPREPLY=( $(compgen -W "-h --help -q --quiet --object -f --format -o --options -b --backing -F --backing-format -u --backing-unsafe --iterations" -- "$current") ) ;;
    "dd") COMPREPLY=( $(compgen -W "-h --help -f --format --image-opts --object -U --force-share -O --output-format -o --options" -- "$current") ) ;;
    "info") COMPREPLY=( $(compgen -W "-h --help -f --format --image-opts --object -U --force-share --output -b --backing-chain" -- "$current") ) ;;
    "luks") COMPREPLY=( $(compgen -W "-h --help -q --quiet --image-opts --object --output -f --format --force -d --key-file --new-key-file --secret --new-secret -S --key-slot --pbkdf --iter-time --iterations --pbkdf-memory --pbkdf-parallel --backup" -- "$current") ) ;;
    "map") COMPREPLY=( $(compgen -W "-h --help -f --format --image-opts --object -U --force-share --output -s --start-offset -l --max-length" -- "$current") ) ;;
    "measure") COMPREPLY=( $(compgen -W "-h --help -f --format --image-opts --object -U --force-share --output -O --target-format -o --options -s --size -l --snapshot" -- "$current") ) ;;
    "rebase") COMPREPLY=( $(compgen -W "-h --help -q --quiet -p --progress -f --format --image-opts --object -U --force-share -t --cache -b --backing -F --backing-format -T --backing-cache -u --backing-unsafe -c --compress" -- "$current") ) ;;
    "resize") COMPREPLY=( $(compgen -W "-h --help -q --quiet -f --format --image-opts --object --shrink --preallocation" -- "$current") ) ;;
    "snapshot") COMPREPLY=( $(compgen -W "-h --help -q --quiet -f --format --image-opts --object -U --force-share -l --list -c --create -a --apply -d --delete" -- "$current") ) ;;
    '') COMPREPLY=( $(compgen -W "--help --version -h amend bench bitmap check commit compare convert create dd info luks map measure rebase resize snapshot" -- "$current") ) ;;
  esac
  [[ $current != -* && -n $command ]] && COMPREPLY+=( $(compgen -f -- "$current") )
  return 0
}
complete -o filenames -F _qmpd_img qmpd-img
