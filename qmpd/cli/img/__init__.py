"""The subcommands of qmpd-img; each module declares its own with `@subcommand`."""
