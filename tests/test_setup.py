"""The package's declarations agree with one another and with what the code imports."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import nfhelpers

# name to import -> name to install, where they differ
INSTALLED_AS = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "IPython": "ipython",
    "mamba_ssm": "mamba-ssm",
}
# name in pyproject.toml -> name on conda-forge, where they differ
CONDA_NAMES = {"torch": "pytorch-gpu", "playwright": "playwright-python"}
# Declared in the core, imported by another package: torch.utils.tensorboard needs it.
INDIRECT = {"tensorboard": "torch.utils.tensorboard"}


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
    texts = [
        *project["dependencies"],
        *(t for extra in extras for t in project["optional-dependencies"][extra]),
    ]
    return dict(map(requirement, texts))


def imported_modules(folder):
    """{dotted module: files that import it} for every absolute import below a folder."""
    modules = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                modules.setdefault(name, set()).add(path.name)
    return modules


def third_party(modules):
    """Names to install of the imported packages that are neither ours nor of the standard library."""
    packages = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"nfhelpers"}
    return {INSTALLED_AS.get(name, name) for name in packages}


# ---------------------------------------------------------------- pyproject, environment, constraints


def test_every_import_is_declared(project, repository):
    modules = imported_modules(repository / "nfhelpers")
    assert third_party(modules) - set(declared(project, "notebooks", "cuda")) == set()


def test_extras_are_imported_only_where_they_are_at_hand(project, repository):
    """widgets.py and the live figure of train.py run in a notebook, the Triton rooms on a GPU."""
    modules = imported_modules(repository / "nfhelpers")
    core = set(declared(project))
    beyond = {name: files for name, files in modules.items() if third_party([name]) - core}
    files = set().union(*beyond.values())
    assert files <= {"widgets.py", "triton_scan.py", "local_scan.py", "train.py"}, beyond


def test_every_core_dependency_is_imported(project, repository):
    modules = imported_modules(repository / "nfhelpers")
    for name in declared(project):
        if name in INDIRECT:
            assert INDIRECT[name] in modules, f"{name} is declared, but nothing imports {INDIRECT[name]}"
        elif name == "scikit-learn":  # only its photographs are read, without importing it
            assert "sklearn" in (repository / "nfhelpers" / "images.py").read_text()
        else:
            assert name in third_party(modules), f"{name} is declared, but nothing imports it"


def test_environment_and_pyproject_are_in_step(project, environment):
    extras = project["optional-dependencies"]
    wanted = {CONDA_NAMES.get(name, name): bound for name, bound in declared(project, *extras).items()}
    conda = dict(requirement(text) for text in environment["dependencies"] if isinstance(text, str))
    tools = {"pip": "", "make": "", "python": project["requires-python"]}
    assert conda == {**wanted, **tools}


def test_environment_is_conda_forge_only(environment):
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["--no-deps", "-e ."], "pip must not replace what conda installed"


def test_constraints_pin_what_is_declared(project, repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    assert pins["torch"] == "2.13.0"
    assert set(declared(project, "notebooks", "dev")) - {"huggingface_hub"} <= names
    assert not [pin for pin in pins.values() if "+" in pin], "a local version cannot be installed from PyPI"
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))], "these follow from torch"


def test_licence_and_version(project, repository):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (repository / "LICENSE").read_text()[:200]
    assert citation["version"] == nfhelpers.__version__
    assert "version" in project["dynamic"]


def test_ci_and_make_agree(repository):
    workflow = yaml.safe_load((repository / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    script = repository / ".ci/run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert script.read_text().rstrip().endswith("make test")


# ---------------------------------------------------------------- import nfhelpers


def python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )


def test_import_is_lazy_and_needs_no_gpu_packages(repository):
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
    done = python(code, cwd=repository)
    assert done.returncode == 0, done.stderr
    # h1 = exp(-1) * 1 + 1
    assert float(done.stdout) == pytest.approx(1.36787944, abs=1e-6)


def test_public_names_resolve():
    for name in nfhelpers.__all__:
        assert getattr(nfhelpers, name) is not None
        assert name in dir(nfhelpers)
    assert nfhelpers.selective_scan is nfhelpers.kernels.selective_scan
    with pytest.raises(AttributeError, match="public names are"):
        nfhelpers.selective_scam  # noqa: B018


def test_presets_are_package_data():
    spec = importlib.util.find_spec("nfhelpers")
    folder = spec.submodule_search_locations[0]
    project = tomllib.loads(open(f"{folder}/../pyproject.toml").read())
    shipped = project["tool"]["setuptools"]["package-data"]["nfhelpers"]
    assert {"presets.toml", "kernels/native.cpp"} <= set(shipped)


OTHER_CARDS = [
    "diffae-photos",
    "diffae-photos-latent",
    "diffae-cifar10",
    "diffae-cifar10-128",
    "localmamba-fsdd",
]
CARDS = ["v1-photos", "multidir-photos", "lightweight-photos", "v2-photos", "field-photos", "field-cifar10"]


@pytest.mark.parametrize(
    "page", ["benchmarks/README.md", *(f"checkpoints/{name}/README.md" for name in CARDS)]
)
@pytest.mark.parametrize("results", ["means-photos", "means-cifar10", "samples-photos", "samples-cifar10"])
def test_quoted_results_are_the_measured_ones(repository, page, results):
    """Every PSNR of a model, and its distance to biharmonic inpainting, stands on the page as in results/."""
    record = json.loads((repository / f"benchmarks/results/{results}.json").read_text())
    text = (repository / page).read_text()
    quoted = record["command"] in " ".join(text.replace("\\", " ").split())
    assert quoted or not page.startswith("benchmarks")
    models = [name for name in CARDS if page in ("benchmarks/README.md", f"checkpoints/{name}/README.md")]
    for row in record["rows"]:
        if not quoted or row["model"] not in models or (row["kind"] == "mean") != results.startswith("means"):
            continue
        assert f"{row['psnr']:.2f} ± {row['psnr_se']:.2f}" in text, (row["model"], row["kind"])
        if row["kind"] == "mean":
            gap, error = row["versus_biharmonic"], row["versus_biharmonic_se"]
            assert f"{gap:+.2f} ± {error:.2f}" in text, row["model"]


@pytest.mark.parametrize(
    ("results", "wanted"),
    [
        ("pca-cifar10", lambda row: row["method"].startswith("autoencoder")),
        ("scales-diffae", lambda row: row["model"] == "diffae-photos"),
    ],
)
def test_autoencoders_quote_what_was_measured(repository, results, wanted):
    record = json.loads((repository / f"benchmarks/results/{results}.json").read_text())
    rows = [row for row in record["rows"] if wanted(row)]
    assert rows
    for row in rows:
        card = repository / f"checkpoints/{row['model']}/README.md"
        text = card.read_text()
        gain, error = row["versus_first"], row["versus_first_se"]
        assert f"{row['psnr']:.2f} ± {row['psnr_se']:.2f}" in text, row
        assert f"{gain:+.2f} ± {error:.2f}" in text, row
        assert record["command"] in " ".join(text.replace("\\", " ").split())


def test_generated_digits_quote_what_was_measured(repository):
    record = json.loads((repository / "benchmarks/results/localmamba-fsdd.json").read_text())
    for page in ("checkpoints/localmamba-fsdd/README.md", "benchmarks/README.md"):
        text = (repository / page).read_text()
        assert record["command"] in " ".join(text.replace("\\", " ").split())
        for row in record["rows"]:
            accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_se']:.1f}"
            numbers = (
                f"| {accuracy} | {row['frechet']:.2f} | {row['nearest']:.3f} | {100 * row['copies']:.1f} |"
            )
            assert numbers in text, row


def test_every_checkpoint_has_a_card_and_is_small(repository):
    folders = sorted(path.name for path in (repository / "checkpoints").iterdir())
    assert folders == sorted(CARDS + OTHER_CARDS)
    for name in folders:
        assert f"# {name}" in (repository / "checkpoints" / name / "README.md").read_text()
        assert (repository / "checkpoints" / name / "model.safetensors").stat().st_size <= 15e6
