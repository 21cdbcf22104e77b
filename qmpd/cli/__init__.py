"""The tools for people: qmpd-ctl (a QMP client) and qmpd-img (images); one file for each subcommand."""
