#!/bin/bash
# Runs common tools that copy and check files on a mount.
#
#     file_tools.sh EXPORT MOUNT SCRATCH
#
# EXPORT is the output of `mount-ckpt export` with the options of MOUNT: the same files on a disk.
set -euo pipefail
want=$(realpath "$1") mount=$(realpath "$2") scratch=$(realpath "$3")
fail() { echo "file_tools: $*" >&2; exit 1; }

same_tree() { # TOOL COPY
    diff -r --exclude=.mount-ckpt --exclude=.mount-ckpt-export.json "$want" "$2" || fail "$1: the copy differs"
    # Every copy contains the status files. Their size is 0, as in /proc, since it is unknown before they are read.
    # Tools that use the size (rsync, tar) create empty files; tools that read to the end (cp, cat) copy their text.
    for live in plan.json stats.json metrics.prom; do
        [ -f "$2/.mount-ckpt/$live" ] || fail "$1: .mount-ckpt/$live is missing in the copy"
    done
    echo "$1: $(find "$2" -type f | wc -l) files, stats.json $(stat -c %s "$2/.mount-ckpt/stats.json") bytes"
}

cp -r "$mount" "$scratch/cp"
same_tree "cp -r" "$scratch/cp"
rsync -a "$mount/" "$scratch/rsync"
same_tree "rsync -a" "$scratch/rsync"
[ -z "$(rsync -aci --exclude=.mount-ckpt "$mount/" "$scratch/rsync")" ] || fail "rsync -c sees differences after rsync -a"
rsync -a --exclude=.mount-ckpt "$mount/" "$scratch/rsync-bare"
[ ! -e "$scratch/rsync-bare/.mount-ckpt" ] || fail "rsync --exclude=.mount-ckpt copied it"
mkdir "$scratch/tar"
tar -cf - -C "$mount" . | tar -xf - -C "$scratch/tar"
same_tree "tar" "$scratch/tar"
(cd "$want" && sha256sum ./*) >"$scratch/sums"
(cd "$mount" && sha256sum --quiet -c "$scratch/sums") || fail "sha256sum differs"

count=0
for file in "$mount"/*; do
    name=${file##*/}
    size=$(stat -c %s "$want/$name")
    cat "$file" | cmp - "$want/$name" || fail "cat: $name"
    for block in 512 4096 1M; do
        dd if="$file" iflag=direct bs=$block status=none | cmp - "$want/$name" || fail "dd iflag=direct bs=$block: $name"
    done
    for part in 1 4097 $((size / 2)); do
        cmp <(head -c "$part" "$file") <(head -c "$part" "$want/$name") || fail "head -c $part: $name"
        cmp <(tail -c "$part" "$file") <(tail -c "$part" "$want/$name") || fail "tail -c $part: $name"
    done
    count=$((count + 1))
done
echo "cat, dd iflag=direct, head -c, tail -c, sha256sum: $count files"

python3 - "$want" "$mount" <<'END'
import sys
from pathlib import Path

want, mount = map(Path, sys.argv[1:])
for path in mount.iterdir():
    if path.is_file():
        # Buffered, as most programs read, and unbuffered.
        for buffering in (-1, 0):
            with open(path, "rb", buffering=buffering) as file:
                blocks = []
                while block := file.read(4096):
                    blocks.append(block)
            assert b"".join(blocks) == (want / path.name).read_bytes(), f"{path.name}, buffering {buffering}"
print("python open().read(4096): the same bytes")
END
