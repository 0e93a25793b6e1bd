"""Progress bars keep to standard error."""

import os
import subprocess
import sys


def test_a_bar_leaves_standard_output_alone() -> None:
    """On a terminal, here one that is pretended, what is printed beside a bar goes where it was sent."""
    code = "from quantrack.progress import track\nfor item in track(range(3), 'working'):\n    print('item', item)"
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "item 0\nitem 1\nitem 2\n"
    assert "working" in done.stderr


def test_there_may_be_no_standard_output() -> None:
    code = "from quantrack.progress import track\nimport sys\nsys.exit(len(list(track(range(3), 'working'))))"
    assert subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "{code}" >&-'], check=False).returncode == 3
