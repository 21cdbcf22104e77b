"""The subcommands of qmpd-ctl; each module declares its own with `@subcommand`."""
