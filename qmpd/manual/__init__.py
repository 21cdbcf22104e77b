"""Man pages and shell completions, written from what `--help` is written from."""
