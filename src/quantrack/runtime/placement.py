"""Which provider ran how many nodes, from ONNX Runtime's own profile of one run."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from quantrack.runtime.session import Session, open_profiled


def nodes_by_provider(session: Session) -> dict[str, int]:
    """Nodes of the optimized graph by the provider that ran them, for example {'CPU...': 350}."""
    images = np.zeros((1, 3, session.imgsz, session.imgsz), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        profiled = open_profiled(session.path, session.provider, Path(folder) / "profile")
        profiled.run(None, {profiled.get_inputs()[0].name: images})
        events = json.loads(Path(profiled.end_profiling()).read_text())
    ran = {
        (event["name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    }
    return dict(Counter(provider for _, provider in ran))
