"""`python -m producer`."""

from producer.cli.main import main

main()
