"""The contact sheet of a run, as one self-contained page: `write` is the door."""
