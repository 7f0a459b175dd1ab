"""Creates an entry in the layout of huggingface_hub's cache, and checks that huggingface_hub accepts it.

    python hub_cache.py CHECKPOINT CACHE NAME

Copies CHECKPOINT into CACHE as NAME (`org/name`): blobs, a snapshot of symlinks, a ref. Prints the snapshot's directory.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from huggingface_hub import scan_cache_dir, snapshot_download
from huggingface_hub.file_download import repo_folder_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"

checkpoint, cache, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
entry = cache / repo_folder_name(repo_id=name, repo_type="model")
snapshot = entry / "snapshots" / COMMIT
for directory in (entry / "blobs", entry / "refs", snapshot):
    directory.mkdir(parents=True)
(entry / "refs" / "main").write_text(COMMIT)
for file in checkpoint.iterdir():
    blob = entry / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    shutil.copyfile(file, blob)
    (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))

found = Path(snapshot_download(name, cache_dir=cache, local_files_only=True))
assert found == snapshot, f"huggingface_hub finds {found}, expected {snapshot}"
report = scan_cache_dir(cache)
assert not report.warnings and [repo.repo_id for repo in report.repos] == [name], report
print(snapshot)
