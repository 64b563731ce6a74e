#!/bin/sh
# Draws .smallcat/schedulers/schedulers.png: python -m deploy.local -- sh docs/schedulers.sh
# That of the documents is docs/schedulers.png: name it as an argument to draw it anew.
# The page with the same pictures, and the pictures themselves, are in .smallcat/schedulers/ then.
set -eu
schedulers=$(python -c 'from worker.contract.choices import Scheduler; print(",".join(list(Scheduler)[1:]))')
folder=.smallcat/schedulers
rm -rf "$folder"
mkdir -p "$folder"
printf 'a small cat\na red circle\n' > "$folder/prompts.txt"
smallcat ingest "$folder/prompts.txt" --seed-start 7 --grid "scheduler=$schedulers" steps=3,6,20 --download "$folder/pictures"
smallcat gallery "$folder/prompts.txt.manifest.jsonl" --embed
python -m deploy.grid "$folder/prompts.txt.manifest.jsonl" "${1:-$folder/schedulers.png}"
