"""Finding plugins: the built-in ones, another distribution's, and one that cannot be imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import discovery
from bench.errors import BenchError
from bench.plugin import REGISTRY

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both third-party distributions, installed by pip."""
    base = tmp_path_factory.mktemp("plugins")
    packages = ROOT / "tests" / "plugin_package"
    sources = [shutil.copytree(packages / name, base / name) for name in ("halftone", "broken")]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--target", str(base / "site"), *map(str, sources)], check=True, capture_output=True,
    )
    return base / "site"


def bench(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-m", "bench", *words], env=env, cwd=folder, capture_output=True, text=True)


def test_every_module_in_the_plugin_folders_is_found() -> None:
    found = list(discovery.builtin_modules())
    files = [p for folder in ("attacks", "defenses", "metrics", "bench/data") for p in (ROOT / folder).glob("*.py")]
    assert len(found) == len([p for p in files if p.stem != "__init__"])
    discovery.load()
    assert {"none", "noise", "aspl", "finetune"} <= set(REGISTRY.names("defense"))


def test_finding_and_listing_plugins_imports_nothing_heavy() -> None:
    script = ("import sys\nfrom bench.cli import run\nassert run(['--help']) == 0 and run(['list']) == 0\n"
              "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'wandb', 'pandas', 'scipy', 'torchmetrics',"
              " 'torchvision'}\nprint('heavy:', sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_another_distributions_plugin_is_listed_shown_and_in_the_help(site: Path, tmp_path: Path) -> None:
    listed, shown, helped = (bench(site, tmp_path, *words)
                             for words in (["list", "defense"], ["show", "defense/halftone"], ["--help"]))
    assert (listed.returncode, shown.returncode, helped.returncode) == (0, 0, 0)
    assert "Adds a checkerboard of half the budget" in listed.stdout
    assert "defense.eps" in shown.stdout
    assert "8.0" in shown.stdout
    assert " halftone " in helped.stdout


def test_a_broken_distribution_warns_once_and_leaves_the_rest_working(site: Path, tmp_path: Path) -> None:
    listed = bench(site, tmp_path, "list", "defense")
    assert listed.stderr.count("warning") == 1
    assert "bench-broken 1.2.3" in listed.stderr
    assert "a_package_that_nobody_has" in listed.stderr
    assert "smudge" not in listed.stdout


def test_choosing_a_broken_plugin_raises_its_own_error(site: Path, tmp_path: Path) -> None:
    for words in (["plan", "-m", "defense=smudge"], ["show", "defense/smudge"]):
        done = bench(site, tmp_path, *words)
        assert done.returncode == 2
        assert "plugin 'smudge' cannot be used" in done.stderr
        assert "ModuleNotFoundError: No module named 'a_package_that_nobody_has'" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_plugin_that_fails_to_import_is_kept_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "broken", {})
    discovery._import("ghost", "no_such_module_at_all", "ghost-package 9.9")
    assert discovery.warnings() == ["plugin 'ghost' is broken and left out (ghost-package 9.9: ModuleNotFoundError: "
                                    "No module named 'no_such_module_at_all')"]
    with pytest.raises(BenchError, match=r"'ghost' cannot be used, its import failed\. ghost-package 9\.9"):
        discovery.raise_if_broken("ghost")
    discovery.raise_if_broken("other")
