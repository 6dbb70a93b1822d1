"""What each command of the command line does; may import everything, is imported by `hybrid.cli` only."""
