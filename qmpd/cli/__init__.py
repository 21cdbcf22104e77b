"""Command-line tools: qmpd-ctl and qmpd-img."""
