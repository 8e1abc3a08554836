"""Folders that cannot be written to: the error gives the reason, and does not call them full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sam.runtime.disk
from hf_sam.runtime.disk import check_disk, check_writable


def test_a_folder_that_can_be_written_to_is_left_as_it_is(tmp_path):
    assert check_writable(tmp_path / "a" / "b") == tmp_path
    check_disk(tmp_path / "a", 1, "a file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert check_writable(tmp_path / "link" / "a") == tmp_path / "link"


def message_of(kind, folder) -> str:
    with pytest.raises(kind) as caught:
        check_disk(folder, 1, "a file")
    message = str(caught.value)
    assert repr(str(folder)) in message
    assert "No disk space" not in message
    assert message.endswith("Choose another output folder, or make it writable.")
    return message


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in message_of(NotADirectoryError, tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file" in message_of(NotADirectoryError, tmp_path / "file" / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "nothing can be created in" in message_of(FileNotFoundError, tmp_path / "link" / "a")


def test_without_permission(tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    folder.chmod(0o555)
    before = os.geteuid()
    if before == 0:  # who may write everywhere: become nobody, who may at least look into the folder
        for above in (tmp_path, *tmp_path.parents[:3]):
            above.chmod(0o755) if above.stat().st_uid == 0 and above != Path("/tmp") else None
        os.seteuid(65534)
    try:
        assert f"you may not write to {folder}" in message_of(PermissionError, folder / "a")
    finally:
        os.seteuid(before)


def test_a_read_only_file_system(tmp_path):
    """Mounted where that is allowed, in a namespace of its own."""
    program = (
        "import runpy, sys\n"
        "resources = runpy.run_path(sys.argv[1])\n"
        "try: resources['check_writable'](sys.argv[2] + '/a')\n"
        "except OSError as error: print(error)\n"
    )
    shell = 'mount -t tmpfs -o ro tmpfs "$4" && exec "$1" -c "$2" "$3" "$4"'
    arguments = [sys.executable, program, hf_sam.runtime.disk.__file__, str(tmp_path)]
    done = subprocess.run(["unshare", "-rm", "sh", "-c", shell, "sh", *arguments], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert f"the file system of {tmp_path} is read-only" in done.stdout, done.stderr


def test_a_full_disk_is_called_one(tmp_path):
    with pytest.raises(OSError, match=rf"No disk space: a file needs {2**40} MiB, but only \d+ are free at {tmp_path}"):
        check_disk(tmp_path / "a", 2**60, "a file")
