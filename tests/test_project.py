"""The promises that tie the project's files together."""

import ast
import pickletools
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from quantrack.quantization.recipe import read_recipe
from quantrack.quantization.steps import STEPS
from quantrack.settings import (
    BaselineSettings,
    BenchmarkSettings,
    CompareSettings,
    DataSettings,
    OnnxSettings,
    PromoteSettings,
    PtqSettings,
    QatSettings,
    ReproduceSettings,
    SensitivitySettings,
    default_texts,
)

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src/quantrack"
ENTRY_POINTS = {
    "main": PtqSettings,
    "ptq": PtqSettings,
    "baseline": BaselineSettings,
    "evaluate": OnnxSettings,
    "benchmark": BenchmarkSettings,
    "sensitivity": SensitivitySettings,
    "qat": QatSettings,
    "compare": CompareSettings,
    "reproduce": ReproduceSettings,
    "promote": PromoteSettings,
    "data": DataSettings,
}
# Bottom first: a room may import only those before it.
ROOMS = ("schemes", "datasets", "detector", "quantization", "onnx", "runtime", "evaluation", "comparison", "tracking")
KEEPERS = {
    "mlflow": {"tracking"},
    "ultralytics": {"detector"},
    "brevitas": {"quantization", "onnx"},
}


def test_conda_environment_pins_what_pyproject_pins() -> None:
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    assert conda[-1]["pip"] == pinned
    assert all("==" in requirement for requirement in pinned)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_mlproject_parameters_are_the_settings(name: str) -> None:
    entry = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"][name]
    declared = {key: value.get("default", "") for key, value in entry["parameters"].items()}
    assert declared == default_texts(ENTRY_POINTS[name])
    for key in declared:
        assert f"--{key.replace('_', '-')} {{{key}}}" in entry["command"]
    pipeline = "ptq" if name == "main" else name
    assert f"python pipelines/{pipeline}.py" in entry["command"]
    assert (ROOT / f"pipelines/{pipeline}.py").is_file()


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.endswith("uv run pytest")]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci/run").read_text().splitlines()


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_only_what_lies_below(path: Path) -> None:
    room = _room(path)
    for module in _imports(path):
        for library, keepers in KEEPERS.items():
            if module.split(".")[0] == library:
                assert room in keepers, f"{room} must not know {library}"
        parts = module.split(".")
        if parts[0] == "quantrack" and len(parts) > 1 and parts[1] in ROOMS and room in ROOMS:
            assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{room} imports {parts[1]} above it"


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.name)
def test_pipelines_know_no_library_that_a_room_keeps(path: Path) -> None:
    assert not {module.split(".")[0] for module in _imports(path)} & KEEPERS.keys()


def test_calibration_list_names_the_hundred_smallest_train_pictures() -> None:
    lines = (ROOT / "datasets/quantize-calib/quant100.txt").read_text().splitlines()
    assert len(lines) == 100
    assert lines[0] == "datasets/coco2017/source-data/train2017/000000000009.jpg"
    assert lines == sorted(lines)


@pytest.mark.parametrize("path", ["datasets/demo/yolov10n-demo.pt", "tests/small/small.pt"])
def test_committed_checkpoints_name_no_folder_of_the_machine_that_trained_them(path: str) -> None:
    with zipfile.ZipFile(ROOT / path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        texts = [value for _, value, _ in pickletools.genops(archive.read(pickled)) if isinstance(value, str)]
    assert "train_args" in texts, "not what Ultralytics saves"
    assert [text for text in texts if text.startswith(("/", "~")) or text == "git"] == []


def test_the_recipes_of_the_docs(tmp_path):
    usage = (ROOT / "docs/usage.md").read_text()
    example = tmp_path / "example.yaml"
    example.write_text(usage.split("```yaml\n")[1].split("```")[0])
    assert read_recipe(example).steps
    assert [name for name in STEPS if f"`{name}`" not in usage] == []
