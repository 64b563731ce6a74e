#!/bin/sh
# Draws docs/schedulers.png: python -m deploy.local -- sh docs/schedulers.sh
# The page with the same pictures, and the pictures themselves, are in .smallcat/schedulers/ then.
set -eu
schedulers=$(python -c 'from worker.contract.choices import Scheduler; print(",".join(list(Scheduler)[1:]))')
folder=.smallcat/schedulers
rm -rf "$folder"
mkdir -p "$folder"
printf 'a small cat\na red circle\n' > "$folder/prompts.txt"
smallcat ingest "$folder/prompts.txt" --seed-start 7 --grid "scheduler=$schedulers" steps=3,6,20 --download "$folder/pictures"
smallcat gallery "$folder/prompts.txt.manifest.jsonl" --embed
python -m deploy.grid "$folder/prompts.txt.manifest.jsonl" docs/schedulers.png
