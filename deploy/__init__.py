"""How smallcat runs: `local` on one machine; the files for containers and clusters."""
