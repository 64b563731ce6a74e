"""`python -m producer`, which is `smallcat`."""

import sys

from producer import name_conflict

if conflict := name_conflict():
    print(f"smallcat: {conflict}", file=sys.stderr)
    sys.exit(2)

from producer.cli.main import main

main()
