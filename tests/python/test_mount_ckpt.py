"""Tests the installed Python package `mount_ckpt` with unmodified safetensors and numpy.

    .ci/wheel                                    builds the wheel, installs it, and runs this file
    python tests/python/test_mount_ckpt.py -v    needs an installed package and the permission to mount
"""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy
from safetensors import deserialize, safe_open

import mount_ckpt
from mount_ckpt import _command

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CHECKPOINT = GOLDEN / "mimo-v2-flash/checkpoint"
SMALL = GOLDEN / "qwen3-moe/checkpoint"
EXPERTS = "model.layers.1.mlp.experts.gate_and_up_projs"
NORM = "model.layers.1.input_layernorm.weight"


def eventually(holds) -> bool:
    """Waits up to a minute until `holds()` is true. Returns whether it became true."""
    for _ in range(600):
        if holds():
            return True
        time.sleep(0.1)
    return False


def tensors(path: Path) -> dict:
    """Every tensor of a directory: dtype, shape and bytes."""
    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        for name, tensor in deserialize(shard.read_bytes()):
            found[name] = (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
    return found


def bf16(data) -> numpy.ndarray:
    """Converts BF16 bytes to F32, since numpy has no BF16."""
    return (numpy.frombuffer(bytes(data), "<u2").astype("<u4") << 16).view("<f4")


def python(program: str, *args: str, **options) -> subprocess.Popen:
    """Starts a Python program that imports the package first. Its stdout is a pipe."""
    program = f"import os, signal, sys, mount_ckpt\nsrc = {str(SMALL)!r}\n{program}"
    command = [sys.executable, "-c", program, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


class Case(unittest.TestCase):
    """A test with its own directory for temporary files, which must be empty at the end."""

    def setUp(self) -> None:
        contexts = contextlib.ExitStack()
        self.addCleanup(contexts.close)
        self.directory = Path(contexts.enter_context(tempfile.TemporaryDirectory())).resolve()
        contexts.enter_context(mock.patch.object(tempfile, "tempdir", str(self.directory)))
        contexts.enter_context(mock.patch.dict(os.environ, {"TMPDIR": str(self.directory)}))

    def mounts(self) -> list:
        """Mount points below the directory, from the mount table."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [at for at in (line.split()[4] for line in lines) if self.directory in Path(at).parents]

    def tearDown(self) -> None:
        self.assertEqual(self.mounts(), [], "everything is unmounted")
        self.assertEqual(os.listdir(self.directory), [], "and temporary directories are removed")


class Mounts(Case):
    def test_a_with_block_reads_the_golden_bytes(self) -> None:
        with mount_ckpt.mount(CHECKPOINT) as path:
            self.assertIsInstance(path, Path)
            self.assertIn(str(path), self.mounts())
            got = tensors(path)
        expected = dict(deserialize((GOLDEN / "mimo-v2-flash/native.safetensors").read_bytes()))
        reference = expected[EXPERTS]
        self.assertEqual(got[EXPERTS][:2], (reference["dtype"], reference["shape"]))
        numpy.testing.assert_array_equal(bf16(got[EXPERTS][2]), bf16(reference["data"]))
        self.assertFalse(path.exists(), "the temporary directory is removed")

    def test_options_reach_the_command(self) -> None:
        options = {"include": [r".*\.experts\.", r".*layernorm"], "exclude": r".*down_projs"}
        options.update(dtype="f32", ep_size=3, file_mode=0o440)
        with mount_ckpt.mount(CHECKPOINT, **options) as path:
            self.assertEqual((path / "config.json").stat().st_mode & 0o777, 0o440)
            ranks = sorted(entry.name for entry in path.glob("ep-*"))
            self.assertEqual(ranks, [f"ep-{rank:04}-of-0003" for rank in range(3)])
            whole = tensors(path)
            self.assertIn(EXPERTS, whole)
            self.assertIn(NORM, whole)
            self.assertFalse([name for name in whole if "down_projs" in name or "lm_head" in name])
            (shard,) = (path / "ep-0001-of-0003").glob("*.safetensors")
            with safe_open(shard, "numpy") as opened:
                rank = opened.get_tensor(EXPERTS)
        dtype, shape, data = whole[EXPERTS]
        self.assertEqual(dtype, "F32")
        experts = numpy.frombuffer(data, numpy.float32).reshape(shape)
        numpy.testing.assert_array_equal(rank, experts[1:2])

    def test_to_is_native_unless_given(self) -> None:
        for options, name in [
            ({}, EXPERTS),
            ({"to": "transformers"}, "model.layers.1.mlp.experts.gate_up_proj"),
            ({"to": "hf"}, "model.layers.1.mlp.experts.0.up_proj.weight"),
            ({"to": None}, EXPERTS),
        ]:
            with mount_ckpt.mount(CHECKPOINT, **options) as path:
                self.assertIn(name, tensors(path))

    def test_an_error_in_the_block_unmounts_and_is_raised(self) -> None:
        with self.assertRaises(ZeroDivisionError):
            with mount_ckpt.mount(SMALL) as path:
                self.assertIn(str(path), self.mounts())
                1 / 0
        self.assertFalse(path.exists())

    def test_close_unmounts_once_and_keeps_a_directory_that_was_given(self) -> None:
        with tempfile.TemporaryDirectory() as at:
            mounted = mount_ckpt.mount(SMALL, at=at)
            self.assertEqual(mounted.path, Path(at))
            self.assertTrue((mounted.path / "config.json").is_file())
            mounted.close()
            mounted.close()
            self.assertIn("closed", repr(mounted))
            self.assertEqual(os.listdir(at), [])

    def test_a_relative_mount_point_survives_chdir(self) -> None:
        here = os.getcwd()
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            try:
                os.mkdir("view")
                mounted = mount_ckpt.mount(SMALL, at="view")
            finally:
                os.chdir(here)
            self.assertTrue((mounted.path / "config.json").is_file())
            mounted.close()
            self.assertEqual(os.listdir(directory), ["view"])

    def test_a_garbage_collected_mount_is_unmounted(self) -> None:
        mounted = mount_ckpt.mount(SMALL)
        path = mounted.path
        del mounted
        gc.collect()
        self.assertFalse(path.exists())

    def test_a_view_that_was_unmounted_by_hand_closes(self) -> None:
        with mount_ckpt.mount(SMALL) as path:
            _command.run(["umount", path])
        self.assertFalse(path.exists())

    def test_two_views_at_once(self) -> None:
        bf16, f32 = mount_ckpt.mount(SMALL, dtype="bf16"), mount_ckpt.mount(SMALL, dtype="f32")
        with bf16 as one, f32 as two:
            self.assertNotEqual(one, two)
            listed = {mount["mount"]: mount for mount in mount_ckpt.status()}
            for path in (one, two):
                self.assertEqual(listed[str(path)]["source"], str(SMALL))
                self.assertIs(listed[str(path)]["alive"], True)
            name = "model.layers.0.mlp.experts.down_projs"
            self.assertEqual((tensors(one)[name][0], tensors(two)[name][0]), ("BF16", "F32"))

    def test_a_view_outlives_the_thread_that_mounted_it(self) -> None:
        found = []
        thread = threading.Thread(target=lambda: found.append(mount_ckpt.mount(SMALL)))
        thread.start()
        thread.join()
        (mounted,) = found
        self.assertTrue((mounted.path / "config.json").is_file())
        mounted.close()

    def test_a_view_in_use_is_detached_and_open_files_stay_readable(self) -> None:
        with mount_ckpt.mount(CHECKPOINT) as path:
            shard = next(path.glob("model-*.safetensors"))
            whole = shard.read_bytes()
            opened = open(shard, "rb")
        self.assertFalse(path.exists())
        with opened:
            self.assertEqual(opened.read(), whole)

    def test_the_exit_of_a_forked_child_keeps_the_view(self) -> None:
        program = """
with mount_ckpt.mount(src) as path:
    child = os.fork()
    if child == 0:
        sys.exit(0 if (path / "config.json").is_file() else 1)
    _, status = os.waitpid(child, 0)
    print(status, (path / "config.json").is_file(), path, flush=True)
"""
        process = python(program)
        printed, _ = process.communicate()
        status, there, path = printed.split()
        self.assertEqual((process.returncode, status, there), (0, "0", "True"))
        self.assertFalse(Path(path).exists())

    def test_the_end_of_the_interpreter_unmounts(self) -> None:
        for end in ["", "raise SystemExit(3)", "undefined", "os._exit(0)"]:
            with self.subTest(end):
                program = f"kept = mount_ckpt.mount(src)\nprint(kept.path, flush=True)\n{end}"
                process = python(program, stderr=subprocess.DEVNULL)
                path = process.communicate()[0].strip()
                self.assertTrue(path)
                # After os._exit, the keeper process unmounts.
                self.assertTrue(eventually(lambda: not Path(path).exists()))

    def test_a_process_that_is_killed_leaves_no_view(self) -> None:
        for number in [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]:
            with self.subTest(number):
                program = "kept = mount_ckpt.mount(src); print(kept.path, flush=True)\n"
                process = python(program + "signal.pause()", stderr=subprocess.DEVNULL)
                with process.stdout:
                    path = process.stdout.readline().strip()
                self.assertIn(path, self.mounts())
                process.send_signal(number)
                process.wait()
                self.assertTrue(eventually(lambda: not Path(path).exists()))

    def test_a_view_stays_for_the_children_of_a_killed_process(self) -> None:
        program = """
kept = mount_ckpt.mount(src)
if os.fork() == 0:
    print(kept.path, flush=True)
    sys.stdin.readline()
    print(len((kept.path / "config.json").read_bytes()), flush=True)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""
        process = python(program, stdin=subprocess.PIPE)
        with process.stdin as stdin, process.stdout as stdout:
            path = stdout.readline().strip()
            process.wait()
            self.assertIn(path, self.mounts())
            stdin.write("\n")
            stdin.flush()
            self.assertGreater(int(stdout.readline()), 0)
        self.assertTrue(eventually(lambda: not Path(path).exists()))

    def test_ctrl_c_reaches_the_program_and_not_the_view(self) -> None:
        program = """
with mount_ckpt.mount(src) as path:
    try:
        print(path, flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print((path / "config.json").is_file(), flush=True)
"""
        process = python(program, start_new_session=True)
        with process.stdout as stdout:
            path = stdout.readline().strip()
            # To the whole process group, as a terminal does.
            os.killpg(process.pid, signal.SIGINT)
            self.assertEqual(stdout.read().strip(), "True")
        self.assertEqual(process.wait(), 0)
        self.assertFalse(Path(path).exists())


class Refusals(Case):
    def test_an_option_that_does_not_exist_is_a_usage_error(self) -> None:
        for call in (mount_ckpt.mount, mount_ckpt.inspect, mount_ckpt.verify):
            with self.assertRaises(mount_ckpt.UsageError) as caught:
                call(SMALL, bogus=1)
            self.assertRegex(str(caught.exception), r"^unexpected argument '--bogus' found")
            self.assertNotIn("Usage:", str(caught.exception))

    def test_a_value_that_does_not_fit_is_a_usage_error(self) -> None:
        for options, message in [
            ({"to": "sideways"}, "^invalid value 'sideways' for '--to <LAYOUT>'"),
            ({"ep_rank": 1}, "^the following required arguments were not provided"),
            ({"foreground": True}, "`foreground`"),
        ]:
            with self.assertRaisesRegex(mount_ckpt.UsageError, message):
                mount_ckpt.mount(SMALL, **options)

    def test_an_error_has_the_message_of_the_command(self) -> None:
        absent = self.directory / "absent"
        for src, message in [(absent, f"`{absent}`"), (GOLDEN, "config.json")]:
            words = [_command.find_command(), "inspect", str(src)]
            printed = subprocess.run(words, stderr=subprocess.PIPE, text=True).stderr
            for call in (mount_ckpt.mount, mount_ckpt.inspect):
                with self.assertRaises(mount_ckpt.Error) as caught:
                    call(src)
                self.assertNotIsInstance(caught.exception, mount_ckpt.UsageError)
                self.assertEqual(f"mount-ckpt: {caught.exception}\n", printed)
                self.assertIn(message, str(caught.exception))

    def test_a_mount_point_in_use_is_refused(self) -> None:
        with self.assertRaisesRegex(mount_ckpt.Error, "is not empty"):
            mount_ckpt.mount(SMALL, at=Path(__file__).parent)

    def test_a_missing_command_is_an_error_that_says_how_to_install_it(self) -> None:
        with mock.patch.dict(os.environ, {"MOUNT_CKPT": "/nonexistent"}):
            with self.assertRaisesRegex(mount_ckpt.Error, "MOUNT_CKPT names no program"):
                mount_ckpt.mount(SMALL)
        with mock.patch("shutil.which", return_value=None):
            with self.assertRaisesRegex(mount_ckpt.Error, "pip install mount-ckpt"):
                mount_ckpt.models()

    def test_a_command_that_cannot_mount_is_an_error(self) -> None:
        with mock.patch.dict(os.environ, {"MOUNT_CKPT": "false"}):
            with self.assertRaisesRegex(mount_ckpt.Error, "exit code 1"):
                mount_ckpt.mount(SMALL)


class Commands(Case):
    def test_inspect_is_the_plan(self) -> None:
        plan = mount_ckpt.inspect(SMALL, include=".*embed_tokens")
        self.assertEqual(
            [tensor["name"] for tensor in plan["tensors"]], ["model.embed_tokens.weight"]
        )

    def test_verify_reads_the_view(self) -> None:
        result = mount_ckpt.verify(SMALL, to="hf")
        self.assertEqual((result["ok"], result["failures"]), (True, 0))
        self.assertEqual(result["tensors"], len(mount_ckpt.inspect(SMALL, to="hf")["tensors"]))

    def test_export_writes_what_a_mount_shows(self) -> None:
        with tempfile.TemporaryDirectory() as out:
            printed = mount_ckpt.export(SMALL, out, to="transformers")
            self.assertIn("files written: ", printed)
            with mount_ckpt.mount(SMALL, "transformers") as path:
                self.assertEqual(tensors(Path(out)), tensors(path))

    def test_models_names_families(self) -> None:
        known = {model["name"]: model for model in mount_ckpt.models()}
        self.assertIn("mimo_v2_flash", known["mimo-v2-flash"]["model_types"])

    def test_options_become_arguments(self) -> None:
        for options, arguments in [
            ({"a": None, "b": False, "c_d": True}, ["--c-d"]),
            ({"ep_size": 8, "shard_size": "5GB"}, ["--ep-size=8", "--shard-size=5GB"]),
            ({"scales_from": Path("/a b")}, ["--scales-from=/a b"]),
            ({"include": ["x", "-y"], "exclude": ()}, ["--include=x", "--include=-y"]),
            ({"dir_mode": 0o550, "file_mode": "0440"}, ["--dir-mode=550", "--file-mode=0440"]),
        ]:
            self.assertEqual(_command.arguments(options), arguments)

    def test_the_module_runs_the_command_of_its_version(self) -> None:
        command = [sys.executable, "-m", "mount_ckpt", "-V"]
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        self.assertEqual(printed, f"mount-ckpt {mount_ckpt.__version__}\n")


if __name__ == "__main__":
    unittest.main()
