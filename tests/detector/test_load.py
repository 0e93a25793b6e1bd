from pathlib import Path

import pytest
import torch
from awake import boxes_and_scores, error_shares, wake
from torch import nn

from quantrack.detector.load import load_detector
from quantrack.detector.ultralytics_setup import prepare
from quantrack.errors import QuantrackError, UsageError
from quantrack.files import file_digest

IMGSZ = 64
ANCHORS = 8 * 8 + 4 * 4 + 2 * 2


def load(source: object, head: str = "one2many", imgsz: int = IMGSZ, seed: int = 0):
    return load_detector(str(source), head, imgsz, seed, trust_checkpoint=False)


@pytest.mark.parametrize("source", ["yolov10n", "yolov8n", "yolo11n", "yolov9t", "yolo26n"])
def test_one_to_many_head(source, capfd):
    detector = load(f"{source}.yaml")
    assert (detector.name, detector.head, detector.stride) == (source, "one2many", 32)
    assert len(detector.class_names) == 80
    assert not detector.model.training
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in detector.model.modules())
    assert not any(parameter.requires_grad for parameter in detector.model.parameters())
    output = detector.model(torch.rand(2, 3, IMGSZ, IMGSZ))
    assert output.shape == (2, 84, ANCHORS)
    assert output[:, 4:].min() >= 0
    assert output[:, 4:].max() <= 1
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("source", ["yolov10n", "yolo26n"])
def test_one_to_one_head(source):
    detector = load(f"{source}.yaml", "one2one", 128)
    output = detector.model(torch.rand(1, 3, 128, 128))
    assert output.shape == (1, 300, 6)
    scores = output[0, :, 4]
    assert torch.equal(scores, scores.sort(descending=True).values)
    assert set(output[0, :, 5].tolist()) <= set(range(80))


def test_fewer_anchors_than_detections():
    assert load("yolov10n.yaml", "one2one").model(torch.rand(1, 3, IMGSZ, IMGSZ)).shape == (1, ANCHORS, 6)


def test_fold_keeps_outputs(tmp_path):
    prepare()
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(3)
    before = DetectionModel("yolov10n.yaml", verbose=False).eval().requires_grad_(False)
    for module in before.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                nn.init.normal_(values)
            for values in (module.running_var, module.weight):
                nn.init.uniform_(values, 0.5, 2)
    wake(before, IMGSZ)
    torch.save({"model": before}, tmp_path / "awake.pt")
    images = torch.rand(1, 3, IMGSZ, IMGSZ)
    folded = load(tmp_path / "awake.pt").model
    with torch.no_grad():
        expected, found = before(images)[0], folded(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert max(error_shares(found, expected, folded, images, boxes_and_scores)) < 1e-4


def test_seed_and_scale_decide_the_digest():
    first = load("yolov10n.yaml", seed=1)
    again = load("yolov10n.yaml", seed=1)
    other = load("yolov10n.yaml", seed=2)
    assert first.digest == again.digest != other.digest
    assert torch.equal(next(first.model.parameters()), next(again.model.parameters()))
    assert load("yolov8n.yaml").digest != load("yolov8s.yaml").digest


def test_demo():
    detector = load("demo", "one2one")
    assert detector.name == "yolov10n-demo"
    assert len(detector.digest) == 64


def test_checkpoint_file(tmp_path):
    path = tmp_path / "mine.pt"
    torch.save({"model": build("DetectionModel", "yolov10n.yaml").half(), "ema": None}, path)
    detector = load(path)
    assert detector.name == "mine"
    assert detector.digest == file_digest(path)


def build(kind: str, source: str) -> nn.Module:
    prepare()
    from ultralytics.nn import tasks

    return getattr(tasks, kind)(source, verbose=False)


def test_segmentation_checkpoint(tmp_path):
    path = tmp_path / "segment.pt"
    torch.save({"model": build("SegmentationModel", "yolov8n-seg.yaml")}, path)
    with pytest.raises(QuantrackError, match="SegmentationModel, not a detection model"):
        load(path)


@pytest.mark.parametrize("source", ["yolov8n-seg.yaml", "yolov8n-cls.yaml", "yolov8n-pose.yaml", "yolov8n-obb.yaml"])
def test_other_tasks_architecture(source):
    with pytest.raises(QuantrackError, match="Quantrack takes detection models"):
        load(source)


@pytest.mark.parametrize(("source", "last"), [("yolov8s-world.yaml", "WorldDetect"), ("yoloe-11s.yaml", "YOLOEDetect")])
def test_detectors_that_take_texts_are_refused(source, last):
    with pytest.raises(
        QuantrackError, match=f"{source}: ends in {last}; Quantrack takes detectors that end in Detect or"
    ):
        load(source)


def test_unknown_head():
    with pytest.raises(UsageError, match=r"head=both: .*one2one or one2many"):
        load("yolov10n.yaml", "both")


def test_head_that_the_model_lacks():
    with pytest.raises(UsageError, match="has no one-to-one head; use head=one2many"):
        load("yolov8n.yaml", "one2one")


@pytest.mark.parametrize("imgsz", [0, -32, 100])
def test_image_size(imgsz):
    with pytest.raises(UsageError, match=f"imgsz={imgsz}: .*multiple"):
        load("yolov10n.yaml", imgsz=imgsz)


@pytest.mark.parametrize("source", ["none/weights.pt", "nothing.pt", "word", "none.yaml", "https://a.b/yolov8n.yaml"])
def test_missing_source(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuantrackError) as caught:
        load(source)
    assert source in str(caught.value)
    assert "\n" not in str(caught.value)


def test_architecture_file_runs_no_code(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "evil.yaml"
    code = f"__import__('pathlib').Path('{marker}').touch()"
    path.write_text(
        f'nc: 1\nactivation: "{code}"\nbackbone: [[-1, 1, Conv, [8, 3, 2]]]\nhead: [[[0], 1, Detect, [nc]]]\n'
    )
    with pytest.raises(QuantrackError, match="cannot be built"):
        load(path)
    assert not marker.exists()


def published(monkeypatch, tmp_path, download):
    prepare()
    import ultralytics.utils.downloads as downloads

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTRACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "attempt_download_asset", download)


def test_offline_names_the_demo(monkeypatch, tmp_path):
    def fail(file, **_):
        Path(file).write_bytes(b"half")
        raise ConnectionError("no network\nhere")

    published(monkeypatch, tmp_path, fail)
    with pytest.raises(QuantrackError, match=r"yolov10m\.pt.*-P model=demo -P data_root=demo") as caught:
        load("yolov10m.pt")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache/weights").iterdir()) == []


def test_download_goes_to_the_cache(monkeypatch, tmp_path):
    saved = tmp_path / "saved"
    torch.save({"model": build("DetectionModel", "yolov10n.yaml")}, saved)
    calls = []

    def fetch(file, **_):
        calls.append(file)
        Path(file).write_bytes(saved.read_bytes())
        return str(file)

    published(monkeypatch, tmp_path, fetch)
    assert load("yolov10n.pt").name == load("yolov10n.pt").name == "yolov10n"
    assert len(calls) == 1
    assert [path.name for path in (tmp_path / "cache/weights").iterdir()] == ["yolov10n.pt"]


@pytest.mark.real
@pytest.mark.parametrize("head", ["one2one", "one2many"])
def test_official_weights(real_inputs, head):
    detector = load(real_inputs / "weights/yolov10n.pt", head)
    assert detector.class_names[0] == "person"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({1: "a", 2: "b", 3: "c"}, "its classes are numbered 1, 2, 3, ..., not from 0; save it again"),
        (None, "no class names for 3 classes"),
        (["a", "b"], "2 class names for 3 classes"),
    ],
)
def test_class_names_that_are_not_numbered_from_zero(tmp_path, names, said):
    with pytest.raises(QuantrackError, match=said):
        load(saved_with_names(tmp_path, names))


@pytest.mark.parametrize("names", [{"0": "a", "1": "b", "2": "c"}, ["a", "b", "c"], {2: "c", 0: "a", 1: "b"}])
def test_class_names_are_taken_by_their_numbers(tmp_path, names):
    assert load(saved_with_names(tmp_path, names)).class_names == ("a", "b", "c")


def test_a_checkpoint_without_its_stride(tmp_path):
    path = saved_with_names(tmp_path, ["a", "b", "c"])
    content = torch.load(path, weights_only=False)
    del content["model"].stride
    torch.save(content, path)
    with pytest.raises(QuantrackError, match="does not say its stride; save it again with Ultralytics"):
        load(path)


def saved_with_names(folder, names):
    prepare()
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    model.names = names
    torch.save({"model": model}, folder / "own.pt")
    return folder / "own.pt"
