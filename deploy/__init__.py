"""How smallcat runs: the embedded stack for one machine, and the files for containers and clusters."""
