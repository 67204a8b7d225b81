"""Blocks of other packages join by the entry point group ``lacer.blocks``, with no change here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "plugin_package"

JOINS = """
import json
import numpy as np
import torch
from lacer.encoders import EncoderSpec, Limits, TextTable, build, cost, list_blocks, predict
from lacer.envs import task_card
from lacer.search.llm import facts
from lacer.search.study import Study
from lacer.search.llm.reply import reply_schema
from lacer.search.space import EncoderSpace

assert list_blocks()["vector", "waves"].__module__ == "lacer_waves"
card = task_card("lacer/KnownSources-v0", sources=["position", "trend"])
space = EncoderSpace(card)
assert "waves" in space.by_name["position.block"].options
assert space.by_name["position.waves.pitch"].options == (1.0, 4.0)
rng = np.random.default_rng(0)
point = next(p for p in (space.sample(rng) for _ in range(500)) if p["position.block"] == "waves")
assert space.from_ncode(space.to_ncode(point)) == point
spec = space.to_spec(point)
assert EncoderSpec.parse(spec.to_json(), card) == spec
assert space.from_spec(spec) == point
assert any(p.get("position.waves.pitch") != point["position.waves.pitch"] for p in space.neighbours(point))
assert "that come round, such as angles" in str(facts.space(Study(space)))
assert '"waves"' in json.dumps(reply_schema(space, 1))
encoder = build(spec, card, TextTable("hash"))
assert torch.isfinite(encoder(cost.observation(card, batch=3))).all()
assert predict(spec, card).by_name["position"].parameters == encoder.parameters_by_module()["position"]

from lacer.encoders.supernet import SharedSupernet, SupernetOptions

few = {"position.block": ["linear", "waves"], "trend.block": ["gru", "unused"], "fusion.block": ["concat"]}
net = SharedSupernet(card, SupernetOptions.from_decisions(card, few))
net.set_active(EncoderSpec.parse({"sources": {"position": {"block": "waves"}}, "fusion": {"block": "concat"}}, card))
assert torch.isfinite(net(cost.observation(card, batch=3))).all()

from lacer.search.cli import main

main(["blocks", "waves"])
print("joined")
"""


def python(path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with a folder of packages beside the installed ones."""
    env = {**os.environ, "COLUMNS": "160",
           "PYTHONPATH": os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([sys.executable, "-P", *args], capture_output=True, text=True, timeout=120, env=env,
                          check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built and installed by pip into a folder; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("plugin")
    copy = folder / "source"  # the build leaves files beside the sources
    for file in PACKAGE.rglob("*"):
        if file.suffix in (".py", ".toml"):
            (copy / file.relative_to(PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(PACKAGE)).write_bytes(file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(folder / "site"), str(copy)],
        capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def fake(folder: Path, name: str, code: str) -> None:
    """An installed package of one module with an entry point."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(f"[lacer.blocks]\nmine = {name}\n")


def test_a_block_of_another_package_joins(installed: Path) -> None:
    done = python(installed, "-c", JOINS)
    assert done.returncode == 0, done.stderr
    assert "joined" in done.stdout
    assert "left out" not in done.stderr
    for text in ("vector:waves", "such as angles", "Sitzmann et al. 2020", "1.0, 4.0", "544 parameters", "lacer_waves"):
        assert text in done.stdout  # what `lacer blocks waves` prints


@pytest.mark.slow
def test_packages_that_clash_or_cannot_be_imported(tmp_path: Path) -> None:
    fake(tmp_path, "other_gru", """
from typing import ClassVar, Literal
from lacer.encoders import BlockConfig, register_block

@register_block
class OtherGRU(BlockConfig):
    modality: ClassVar[str] = "series"
    block: Literal["gru"] = "gru"
""")
    errors = {"missing": "ModuleNotFoundError: No module named 'not_there'", "exits": "SystemExit: 3",
              "nameless": "TypeError: NoName needs `block:"}
    fake(tmp_path, "missing", "import not_there")
    fake(tmp_path, "exits", "raise SystemExit(3)")
    fake(tmp_path, "nameless", "from lacer.encoders import BlockConfig, register_block\n"
                               "@register_block\nclass NoName(BlockConfig): pass")
    done = python(tmp_path, "-c", "from lacer.encoders import list_blocks; blocks = list_blocks(); "
                                  "print(blocks['series', 'gru'], blocks['series', 'lstm'])")
    assert done.returncode == 0, done.stderr
    assert ("series block 'gru' of lacer.encoders.blocks.series_recurrent is replaced by that of other_gru"
            in done.stderr)
    assert "other_gru.OtherGRU" in done.stdout
    assert "LSTMConfig" in done.stdout
    for name, error in errors.items():
        assert f"the entry point mine = {name} of the package {name} 2.1 are left out: {error}" in done.stderr
