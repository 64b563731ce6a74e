#!/bin/sh
# Draws .smallcat/loras/loras.png: python -m deploy.local -- sh docs/loras.sh
# That of the documents is docs/loras.png: name it as an argument to draw it anew.
# The pictures themselves are in .smallcat/loras/ then.
set -eu
folder=.smallcat/loras
rm -rf "$folder"
mkdir -p "$folder"
printf 'a small cat\na rocket\na house\na robot\na panda\nan owl\na pizza\na fox\n' > "$folder/prompts.txt"
smallcat ingest "$folder/prompts.txt" --seed-start 7 --grid loras=none,pixel,sketch,neon --download "$folder/pictures"
python -m deploy.grid "$folder/prompts.txt.manifest.jsonl" "${1:-$folder/loras.png}"
