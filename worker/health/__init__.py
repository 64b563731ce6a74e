"""Whether a process is live, ready and started, over HTTP and to systemd: `report` is the door.

`server` answers in a process of its own. `python -m worker.health ready` asks.
"""
