"""The guest's helper as the one file that goes onto the seed: what it holds, and how it runs."""

import ast
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from casemate_agent.guest import archive, casemate_guest, entry

ENTRY = Path(entry.__file__)
SOURCES = sorted(Path(casemate_guest.__file__).parent.glob("*.py"))


def test_the_same_modules_make_the_same_bytes_in_any_order() -> None:
    modules = {"casemate_guest/b.py": b"B = 1\n", "casemate_guest/a.py": b"A = 1\n"}
    assert archive.archive(modules) == archive.archive(dict(reversed(modules.items())))


def test_it_holds_every_module_as_it_is_and_nothing_else() -> None:
    with zipfile.ZipFile(io.BytesIO(archive.helper())) as file:
        assert file.namelist() == ["__main__.py", *(f"casemate_guest/{path.name}" for path in SOURCES)]
        assert file.read("__main__.py") == ENTRY.read_bytes()
        for path in SOURCES:
            assert file.read(f"casemate_guest/{path.name}") == path.read_bytes()


@pytest.mark.parametrize("path", [ENTRY, *SOURCES], ids=lambda path: path.name)
def test_a_module_needs_the_standard_library_alone_and_python_3_9(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 9))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names), names


def test_it_starts_under_its_old_name_without_what_is_slow_to_import(tmp_path: Path) -> None:
    """Images that exist start ``casemate_guest.py``; on an emulated processor each of these costs a good part of a second."""
    helper = tmp_path / "casemate_guest.py"
    helper.write_bytes(archive.helper())
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-I", "-S", "-E", "-X", "importtime", helper, f"root={tmp_path}", f"socket={tmp_path}/s"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        loaded = set()
        for line in process.stderr:
            if "helper 1." in line:
                break
            loaded.add(line.rpartition("|")[2].strip())
        process.terminate()
        process.stderr.read()
    assert process.returncode == 0
    assert "casemate_guest.helper" in loaded
    assert not loaded & {"asyncio", "subprocess", "typing", "tarfile", "casemate_guest.copying"}


def test_what_goes_wrong_in_it_is_told_by_file_and_line(tmp_path: Path) -> None:
    modules = {"__main__.py": ENTRY.read_bytes(), "casemate_guest/__init__.py": b""}
    helper = tmp_path / "casemate_guest.py"
    helper.write_bytes(archive.archive({**modules, "casemate_guest/main.py": b"def main(words):\n    return len(7)\n"}))
    done = subprocess.run([sys.executable, "-I", "-S", "-E", helper], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f'File "{helper}/casemate_guest/main.py", line 2, in main\n' in done.stderr
    helper.write_bytes(archive.archive(modules))
    done = subprocess.run([sys.executable, "-I", "-S", "-E", helper], capture_output=True, text=True, check=False)
    assert "No module named 'casemate_guest.main'" in done.stderr
