"""The `smallcat` command: `main` is the door."""
