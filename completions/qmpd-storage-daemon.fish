# Written from the declarations that --help shows: python -m qmpd.manual

complete -c qmpd-storage-daemon -l blockdev -x -d 'a block node, as blockdev-add makes it'
complete -c qmpd-storage-daemon -l chardev -x -d 'a socket for --monitor'
complete -c qmpd-storage-daemon -l daemonize -d 'go to the background once everything is there'
complete -c qmpd-storage-daemon -l export -x -d 'a block export, as block-export-add makes it'
complete -c qmpd-storage-daemon -s h -l help -d 'show this help'
complete -c qmpd-storage-daemon -l luks-policy -x -d 'what LUKS volumes must be like'
complete -c qmpd-storage-daemon -l monitor -x -d 'a QMP monitor on a --chardev'
complete -c qmpd-storage-daemon -l nbd-server -x -d 'the NBD server, as nbd-server-start makes it'
complete -c qmpd-storage-daemon -l object -x -d 'an object, as object-add makes it'
complete -c qmpd-storage-daemon -l pidfile -r -d 'write the process id here'
complete -c qmpd-storage-daemon -s T -l trace -x -d 'turn on trace switches (monitor.*, qcow2.l2, ...)'
complete -c qmpd-storage-daemon -s V -l version -d 'show the version'
