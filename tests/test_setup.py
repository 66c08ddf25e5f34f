"""The package's declarations agree with one another and with what the code imports."""

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from safetensors.torch import load_file

import nfhelpers

# name to import -> name to install, where they differ
INSTALLED_AS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "IPython": "ipython"}
INSTALLED_AS |= {"mamba_ssm": "mamba-ssm", "cycler": "matplotlib"}
# name in pyproject.toml -> name on conda-forge, where they differ
CONDA_NAMES = {"torch": "pytorch-gpu", "playwright": "playwright-python", "soundfile": "pysoundfile"}


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def environment(repository):
    return yaml.safe_load((repository / "environment.yml").read_text())


def requirement(text):
    """'torch>=2.9; marker' -> ('torch', '>=2.9')."""
    name, bound = re.fullmatch(r"([\w.-]+)\s*([^;]*?)\s*(?:;.*)?", text).groups()
    return name, bound


def declared(project, *extras):
    """{name: bound} of the core dependencies and the named extras."""
    more = [text for extra in extras for text in project["optional-dependencies"][extra]]
    return dict(map(requirement, project["dependencies"] + more))


def imported_modules(folder):
    """{dotted module: files that import it} for every absolute import below a folder."""
    modules = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in names:
                modules.setdefault(name, set()).add(path.name)
    return modules


def third_party(modules):
    """Names to install of the imported packages that are neither ours nor of the standard library."""
    packages = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"nfhelpers"}
    return {INSTALLED_AS.get(name, name) for name in packages}


def test_every_import_is_declared(project, repository):
    modules = imported_modules(repository / "nfhelpers")
    assert third_party(modules) - set(declared(project, "notebooks", "cuda")) == set()


def test_every_core_dependency_is_imported(project, repository):
    modules = imported_modules(repository / "nfhelpers")
    unused = set(declared(project)) - third_party(modules) - {"tensorboard", "scikit-learn"}
    assert not unused and "torch.utils.tensorboard" in modules  # of scikit-learn only photographs are read


def test_environment_and_pyproject_are_in_step(project, environment):
    extras = project["optional-dependencies"]
    wanted = {CONDA_NAMES.get(name, name): bound for name, bound in declared(project, *extras).items()}
    conda = dict(requirement(text) for text in environment["dependencies"] if isinstance(text, str))
    tools = {"pip": "", "make": "", "python": project["requires-python"]}
    assert conda == {**wanted, **tools}


def test_constraints_pin_what_is_declared(project, repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    assert set(declared(project, "notebooks", "dev")) - {"huggingface_hub"} <= names
    assert not [pin for pin in pins.values() if "+" in pin], "a local version cannot be installed from PyPI"
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))], "these follow from torch"


def test_licence_version_and_package_data(project, repository):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert citation["version"] == nfhelpers.__version__ and "version" in project["dynamic"]
    tools = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]
    assert {"presets.toml", "kernels/native.cpp"} <= set(tools["setuptools"]["package-data"]["nfhelpers"])


def python(code, **environment):
    """What a program prints in a fresh interpreter with these environment variables; and its warnings."""
    command, options = [sys.executable, "-W", "always", "-c", code], dict(capture_output=True, text=True)
    done = subprocess.run(command, env=os.environ | environment, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_import_is_lazy_and_needs_no_gpu_packages():
    code = """
import sys
sys.modules["triton"] = sys.modules["mamba_ssm"] = None  # importing either raises ImportError
import nfhelpers
assert "torch" not in sys.modules
scan = nfhelpers.selective_scan
assert "torch" in sys.modules
import torch
y = scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3), -torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1))
print(y[0, 0, 1].item())
"""
    # h1 = exp(-1) * 1 + 1
    assert float(python(code)[0]) == pytest.approx(1.36787944, abs=1e-6)


HEAVY = "diffusers transformers matplotlib scipy.stats skimage torch.utils.tensorboard".split()
HEAVY += "mamba_ssm triton torch._dynamo".split()


def test_models_and_training_import_nothing_heavy():
    python(f"""
import sys, nfhelpers.models, nfhelpers.train, nfhelpers.evaluate, nfhelpers.spectrograms, nfhelpers.run
import nfhelpers.kernels.local_scan, nfhelpers.kernels.native, torch
nfhelpers.selective_scan(*torch.ones(2, 1, 2, 3), torch.ones(2, 2), *torch.ones(2, 1, 2, 3))
assert not [name for name in {HEAVY} if name in sys.modules]
""")


def test_a_broken_install_is_named(tmp_path):
    """Without a compiler and with a broken Triton the chunked scan runs."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('driver is too old')")
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
torch.cuda.is_available = lambda: True
from nfhelpers import kernels
status = kernels.backend_status()
assert "compiler" in status["native"] and "driver is too old" in status["triton"]
print(kernels.choose_backend("cpu"), kernels.choose_backend("cuda"))
"""
    out, errors = python(code, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert out.split() == ["chunked", "chunked"]
    assert "compiler" in errors and "driver is too old" in errors


def test_rooms_import_one_way(repository):
    """kernels -> flow, images -> models -> graphs, samplers -> metrics ... train -> plots -> widgets, run."""
    floors = "kernels files|flow images|models|graphs|samplers|metrics spectrograms|classical|evaluate"
    floors = [floor.split() for floor in f"{floors}|checkpoint|train".split("|")]
    floor_of = {room: number for number, floor in enumerate(floors) for room in floor}
    for path in (repository / "nfhelpers").rglob("*.py"):
        room = path.relative_to(repository / "nfhelpers").parts[0].removesuffix(".py")
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        for node in top if room in floor_of else ():
            if node.module == "nfhelpers":
                rooms = [alias.name for alias in node.names]
            else:
                rooms = node.module.split(".")[1:2] if str(node.module).startswith("nfhelpers.") else []
            upwards = [x for x in rooms if x != room and floor_of.get(x, 99) >= floor_of[room]]
            assert not upwards, (path, upwards)


def test_shipped_weights_are_finite(repository):
    for file in (repository / "checkpoints").rglob("*.safetensors"):
        bad = [name for name, x in load_file(file).items() if not x.isfinite().all()]
        assert not bad, (file.parent.name, bad)


def test_public_names_resolve():
    for name in nfhelpers.__all__:
        assert getattr(nfhelpers, name) is not None and name in dir(nfhelpers)
    assert nfhelpers.selective_scan is nfhelpers.kernels.selective_scan
    with pytest.raises(AttributeError):
        nfhelpers.selective_scam  # noqa: B018


FIELDS = ["v1-cifar10", "multidir-cifar10", "v2-cifar10", "field-photos", "field-cifar10"]


def test_every_checkpoint_has_a_card_and_is_small(repository):
    folders = list((repository / "checkpoints").iterdir())
    assert {*FIELDS, "diffae-photos", "localmamba-fsdd"} <= {folder.name for folder in folders}
    for folder in folders:
        assert f"# {folder.name}" in (folder / "README.md").read_text()
        assert (folder / "model.safetensors").stat().st_size <= 15e6
